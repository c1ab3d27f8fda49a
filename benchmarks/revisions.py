"""Import another revision of the package beside this one, under a name of its own.

    python benchmarks/revisions.py HEAD~1 [--name functional_optim_before]

`git archive` writes the package of the revision into a folder, and its name is replaced
in all of its files: in imports, in texts, and in what it registers with torch, where
two packages of one name would clash. `WORKING_TREE` stands for the files as they are.
"""

from __future__ import annotations

import argparse
import importlib
import io
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from types import ModuleType

PACKAGE = "functional_optim"
BEFORE = "functional_optim_before"
WORKING_TREE = "."
ROOT = pathlib.Path(__file__).resolve().parent.parent
_RENAMED = {".py", ".cpp", ".cu", ".h", ".pyi", ".txt"}


def resolved(revision: str) -> str:
    """Return the hash of a revision, with `-dirty` for changed files not committed."""
    if revision != WORKING_TREE:
        return _git("rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    head = _git("rev-parse", "HEAD").decode().strip()
    changed = _git("status", "--porcelain", "--", PACKAGE)
    return f"{head}-dirty" if changed else head


def export(revision: str, folder: pathlib.Path, name: str = BEFORE) -> pathlib.Path:
    """Write the package of a revision into a folder, under another name.

    Args:
        revision: What git understands, or `WORKING_TREE`.
        folder: Where to; it may be there.
        name: The name that it shall have; not there yet in the folder.

    Returns:
        The folder, which must stand in `sys.path` for an import.
    """
    target = folder / name
    if target.exists():
        msg = f"{target} is there already; choose another folder or name"
        raise FileExistsError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    if revision == WORKING_TREE:
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / PACKAGE, target, ignore=left_out)
    else:
        archive = io.BytesIO(_git("archive", "--format=tar", revision, PACKAGE))
        with tempfile.TemporaryDirectory() as passing:
            with tarfile.open(fileobj=archive) as files:
                files.extractall(passing, filter="data")
            shutil.move(pathlib.Path(passing) / PACKAGE, target)
    _rename(target, name)
    return folder


def imported(folder: pathlib.Path, name: str = BEFORE) -> ModuleType:
    """Import what `export` wrote.

    Raises:
        ImportError: a package of this name came from elsewhere.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    module = importlib.import_module(name)
    place = pathlib.Path(str(module.__file__)).resolve()
    if not place.is_relative_to(folder.resolve()):
        msg = f"{name} was imported from {place}, not from {folder}"
        raise ImportError(msg)
    return module


def _rename(package: pathlib.Path, name: str) -> None:
    """Replace the name of the package in its files."""
    if name == PACKAGE:
        return
    for path in package.rglob("*"):
        if path.suffix in _RENAMED:
            text = path.read_text("utf-8")
            path.write_text(text.replace(PACKAGE, name), "utf-8")


def _git(*arguments: str) -> bytes:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout


def main() -> None:
    """Export a revision, import it beside this one, and say that both are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="what git understands, or . for these files")
    parser.add_argument("--name", default=BEFORE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(ROOT))
        place = export(options.revision, pathlib.Path(folder), options.name)
        for module in (importlib.import_module(PACKAGE), imported(place, options.name)):
            print(f"{module.__name__} {module.__version__} from {module.__file__}")
        print(f"{options.name} is {resolved(options.revision)} in {place}")


if __name__ == "__main__":
    main()

"""Break the library one formula at a time, and show that its tests notice.

    python tests/mutate.py                     all mutations of mutations.txt
    python tests/mutate.py --only _clipping    those with this text in their line
    python tests/mutate.py --jobs 4            four at once

Each mutation runs in a copy of its own in a temporary directory; the checkout is only
read. A mutation is killed if a test fails. One that survives is a hole in the tests, or
changes nothing that can be seen: then replace it.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from mutations import MUTATIONS, PACKAGE, ROOT, Mutation

COPIED = [
    PACKAGE,
    "tests",
    "property_tests",
    "benchmarks",
    "docs",
    "examples",
    "pyproject.toml",
]

# Many kills in few seconds, by themselves: then the rest need not be collected.
FIRST = [
    "tests/core/test_rule.py",
    "tests/algebra/test_mixed_dtypes.py",
    "tests/test_regressions.py",
    "tests/transforms/test_bad_input.py",
    "tests/schedules/test_schedules.py",
    "tests/schedules/test_bad_input.py",
    "tests/transforms/test_torch_parity.py",
    "tests/core/test_readings.py",
    "tests/transforms/test_contract.py",
    "property_tests/test_plain_loops.py",
]
LAST = ["tests/testing/test_check_transform.py", "property_tests/test_laws.py"]
LEFT_OUT = {
    "tests/test_mutations.py": "does not find the old text, and would kill everything",
    "tests/test_layering.py": "judges the source text, not what it computes",
    "tests/test_words.py": "judges the source text, likewise",
    "tests/test_readme.py": "README.md is not copied: its numbers are no specification",
    "tests/test_documentation.py": "compares pages with printed reports, likewise",
    "tests/test_examples.py": "trains a model for what smaller tests see",
    "property_tests/test_laws.py::test_table_is_current": "looks at docs/laws.md only",
}

# Loaded by pytest before everything else. Tests that name what is broken go first.
PLUGIN = f"""
import os
import pathlib
import {PACKAGE}

found = pathlib.Path({PACKAGE}.__file__).resolve()
assert found.is_relative_to(pathlib.Path(__file__).resolve().parent), found
print("tested:", found)
words = os.environ["BROKEN_NAMES"].split()


def plain(text):
    return text.replace("_", "").lower()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda i: not any(plain(w) in plain(i.nodeid) for w in words))
"""


# Importing torch takes longer than most kills: one process does it, and forks.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo"])
OUTPUT = "output.txt"
_VENV = pathlib.Path(sys.prefix).resolve()


@dataclasses.dataclass(frozen=True)
class Result:
    """What the tests say about a copy."""

    killed: bool
    """Whether a test failed; an import that fails is too easy, and does not count."""
    by: str
    """Which test, or why there is none."""
    seconds: float


def stages() -> list[list[str]]:
    """Return the test files in two parts: what is fast, and the rest."""
    found = [
        f"{folder}/{path.name}"
        for folder in ("tests", "property_tests")
        for path in sorted((ROOT / folder).glob("test_*.py"))
    ]
    rest = [f for f in found if f not in {*FIRST, *LAST, *LEFT_OUT}]
    return [FIRST, rest + LAST]


def copied(folder: pathlib.Path, mutation: Mutation | None) -> None:
    """Copy what the tests need, and break one formula in the copy."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "tested_copy.py").write_text(PLUGIN)
    if mutation is not None:
        path = mutation.source(folder)
        path.write_text(mutation.applied(path.read_text()))


def tested(mutation: Mutation | None) -> Result:
    """Run the tests on a copy until one fails."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = pathlib.Path(name)
        copied(folder, mutation)
        names = [] if mutation is None else _public_names(mutation.source())
        for files in stages():
            code, output = _pytest(folder, files, names)
            if code:
                break
    failed = re.search(r"^FAILED (.+?::.+?)(?: - .*)?$", output, re.MULTILINE)
    if code == 0:
        by = "nothing"
    elif code == 1 and failed:
        by = failed[1]
    else:
        by = f"no test, they did not run: {output.strip()[-500:]}"
    return Result(code == 1 and bool(failed), by, time.monotonic() - start)


def _public_names(path: pathlib.Path) -> list[str]:
    """Return the public classes and functions of a file."""
    names = re.findall(r"^(?:class|def) ([a-zA-Z]\w+)", path.read_text(), re.MULTILINE)
    return [name for name in names if not name.endswith("State")]


def _pytest(
    folder: pathlib.Path, files: list[str], names: list[str]
) -> tuple[int | None, str]:
    """Return the exit code and what was printed."""
    process = SERVER.Process(target=_run_pytest, args=(folder, files, names))
    process.start()
    process.join()
    output = (folder / OUTPUT).read_text()
    assert f"tested: {folder.resolve()}" in output, output
    return process.exitcode, output


def _run_pytest(folder: pathlib.Path, files: list[str], names: list[str]) -> None:
    """Be the process that imports the copy and tests it."""
    os.chdir(folder)
    # The checkout goes, but for installed packages, and the copy comes before those.
    kept = [p for p in sys.path if ROOT not in _inside(p) or _VENV in _inside(p)]
    sys.path[:] = [str(folder), *kept]
    sys.dont_write_bytecode = True
    os.environ |= {
        "PYTHONPATH": str(folder),  # For tests that start a process.
        "HYPOTHESIS_PROFILE": "mutants",
        "BROKEN_NAMES": " ".join(names),
    }
    with (folder / OUTPUT).open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    import pytest

    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "tested_copy"]
    options += [f"--deselect={name}" for name in LEFT_OUT]
    sys.exit(pytest.main([*options, *files]))


def _inside(path: str) -> list[pathlib.Path]:
    """Return a path and the folders that it is in."""
    resolved = pathlib.Path(path).resolve()
    return [resolved, *resolved.parents]


def main() -> int:
    """Try the mutations; 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="text in the lines to try")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="do not run the unbroken copy first, which takes minutes",
    )
    args = parser.parse_args()
    for mutation in MUTATIONS:
        mutation.applied(mutation.source().read_text())
    chosen = [m for m in MUTATIONS if args.only in str(m)]
    if not args.trust:
        result = tested(None)
        print(
            f"unbroken copy: failed by {result.by}  {result.seconds:.0f} s", flush=True
        )
        if result.by != "nothing":
            return 1
    killed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutation, result in zip(chosen, pool.map(tested, chosen), strict=True):
            killed += result.killed
            verdict = "killed  " if result.killed else "SURVIVED"
            line = f"{verdict} {mutation}  by {result.by}  {result.seconds:.0f} s"
            print(line, flush=True)
    print(f"killed {killed} of {len(chosen)}")
    return int(killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main())

"""The house keeps its floors: arrows go down, in place only where it is allowed."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

import functional_optim

ROOT = pathlib.Path(functional_optim.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
each_file = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: str(path.relative_to(ROOT))
)

# From the ground up; a module imports only from its own floor and those below.
FLOORS = [
    "_messages",
    "algebra",
    "core",
    "schedules",
    "transforms",
    "optimizers",
    "execution",
    "torch_optimizer",
    "optim_wrapper",
    "config",
    "inspection",
    "integrations",
    "testing",
    "__init__",
]
IN_PLACE_ALLOWED = {"algebra", "execution", "torch_optimizer", "optim_wrapper"}


def _room(path: pathlib.Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def _floor(room: str) -> int:
    return FLOORS.index(room)


def _module(path: pathlib.Path) -> str:
    name = ".".join(["functional_optim", *path.relative_to(ROOT).with_suffix("").parts])
    return name.removesuffix(".__init__").removeprefix("functional_optim.")


MODULES = {_module(path) for path in FILES}


def _imports(path: pathlib.Path) -> set[str]:
    """Return the library's modules that a file imports, types included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, module = node.module.partition(".")
            if package == "functional_optim":
                for alias in node.names:
                    inner = f"{module}.{alias.name}".removeprefix(".")
                    found.add(inner if inner in MODULES or not module else module)
    return found


@each_file
def test_arrows_go_down(path: pathlib.Path) -> None:
    """A module imports from lower floors, or its own, also for annotations only."""
    room = _room(path)
    if room == "__init__":
        return
    for module in _imports(path):
        other = module.split(".")[0]
        assert _floor(other) <= _floor(room), f"{room} imports {module}"


def test_no_circles() -> None:
    """No module imports itself through others, annotations included."""
    left = {_module(path): _imports(path) for path in FILES}
    while leaves := [name for name in left if not left[name] & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, f"{sorted(left)} are in a circle, or import one that is"


@each_file
def test_transforms_do_not_import_each_other(path: pathlib.Path) -> None:
    """Combinators take transforms as arguments; leaves stand alone."""
    if _room(path) == "transforms" and path.name != "__init__.py":
        assert not [m for m in _imports(path) if m.startswith("transforms")]


@each_file
def test_in_place_only_where_allowed(path: pathlib.Path) -> None:
    """`x_()`, `out=` and `_foreach_*_` stand only in the algebra and the executors."""
    room = _room(path)
    if room in IN_PLACE_ALLOWED:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        assert "out" not in {k.arg for k in node.keywords}, f"out= at {node.lineno}"
        if isinstance(node.func, ast.Attribute):
            name = node.func.attr
            in_place = re.fullmatch(r"[a-z]\w*[a-z0-9]_|_foreach_\w+_", name)
            assert not in_place, f"{name} at line {node.lineno}"


@each_file
def test_rooms_are_small_and_named(path: pathlib.Path) -> None:
    """One noun of the field a file, at most 500 lines, with a name that says which."""
    assert len(path.read_text().splitlines()) <= 500
    assert not re.fullmatch(r"_?(utils?|helpers?|common|base|misc)\.py", path.name)


def test_suppressions_are_few() -> None:
    """At most five suppressions in the package, per-file ignores counted."""
    pattern = re.compile(r"# type: ignore|# noqa|# pragma")
    count = sum(len(pattern.findall(path.read_text())) for path in FILES)
    config = (ROOT.parent / "pyproject.toml").read_text()
    per_file = re.findall(r'^"functional_optim/.*= \[(.*)\]', config, re.MULTILINE)
    count += sum(entry.count('"') // 2 for entry in per_file)
    assert count <= 5, count


def test_recording_stands_in_two_places() -> None:
    """Grad mode is decided in `Chain` and `apply_updates` and nowhere else."""
    places = [
        path.name
        for path in FILES
        # Laws look on from outside; optimizers step where nothing is recorded.
        if _floor(_room(path)) <= _floor("execution")
        for line in path.read_text().splitlines()
        if re.search(r"with recording\(|no_grad|enable_grad|\.detach\(", line)
        and "def " not in line
    ]
    # init and update of a chain, and apply_updates; `detach` also hands tensors out.
    assert places.count("_chain.py") == 2
    assert set(places) == {"_chain.py", "_apply.py", "_state_dict.py"}, places


@each_file
def test_no_combinator_is_special(path: pathlib.Path) -> None:
    """Combinators are known by their methods, so that a user's is one, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            asked = set(re.findall(r"\w+", ast.unparse(node.args[1])))
            found = asked & {"Chain", "Masked", "Named", "Partition", "SkipNonfinite"}
            assert not found or path.name == "_chain.py", f"{found}: {node.lineno}"

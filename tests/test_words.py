"""The house explains itself: one name for one thing, plain first lines, short docs."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import functional_optim as fo
from functional_optim import optimizers, schedules, testing, transforms
from functional_optim.integrations import mmengine

ROOT = pathlib.Path(fo.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
each_file = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: str(path.relative_to(ROOT))
)
PUBLIC_MODULES: list[ModuleType] = [
    fo,
    optimizers,
    schedules,
    transforms,
    testing,
    testing.laws,
    testing.strategies,
    mmengine,
]
# Each names something that it does not explain; `stands_for` is a member's name.
BANNED = re.compile(
    r"\b(told|tells?|stands?|asks?|asked|lies?|apart|somebody|nobody|whom?)\b"
    r"|what others"
)
SECTIONS = re.compile(
    r"^ *(Args|Returns|Raises|Yields|State|Shapes|Source):$", re.MULTILINE
)


def _definitions(
    node: ast.AST, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the classes and functions of a file, with the names on the way."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            yield (*names, child.name), child
            yield from _definitions(child, (*names, child.name))
        else:
            yield from _definitions(child, names)


def _public_names() -> set[tuple[str, str]]:
    """Return the names that users can reach, by the module that defines them."""
    found = set()
    for module in PUBLIC_MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            found.add((module.__name__, name))
            home = value if hasattr(value, "__qualname__") else type(value)
            if not inspect.ismodule(value):
                found.add((home.__module__, home.__qualname__))
    return found


def _is_public(module: str, names: tuple[str, ...]) -> bool:
    inner = [name for name in names[1:] if re.match(r"_(?!_)", name)]
    return (module, names[0]) in _public_names() and not inner


def _module(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def test_no_name_is_used_twice() -> None:
    """A class or a function of a module has a name of its own in the package."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: used for name, used in homes.items() if len(used) > 1}


@each_file
def test_first_lines_have_plain_words(path: pathlib.Path) -> None:
    """Verb and object, in the words of torch and optax."""
    tree = ast.parse(path.read_text())
    for node in [tree, *(found for _, found in _definitions(tree))]:
        first = (ast.get_docstring(node) or "").partition("\n")[0]
        found = BANNED.search(first)
        assert not found, f"{found[0]!r} in {first!r}"


@each_file
def test_sections_are_for_public_names(path: pathlib.Path) -> None:
    """What no user can reach is explained in a sentence or two."""
    for names, node in _definitions(ast.parse(path.read_text())):
        if SECTIONS.search(ast.get_docstring(node, clean=False) or ""):
            assert _is_public(_module(path), names), ".".join(names)

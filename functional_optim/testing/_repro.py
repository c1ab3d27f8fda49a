"""A failure as a program: what can be pasted and run."""

from __future__ import annotations

import ast
from typing import Any

import functional_optim as fo
from functional_optim import schedules
from functional_optim.core._traversal import children_of
from functional_optim.testing._examples import Example

_KNOWN = {
    **dict.fromkeys(schedules.__all__, "functional_optim.schedules"),
    **dict.fromkeys(fo.__all__, "functional_optim"),
    "inf": "math",
    "nan": "math",
    "tensor": "torch",
}
"""Where the names come from that a transform of ours is printed with."""


def program(law: str, transform: Any, example: Example) -> str:
    """Return the program in which a law fails on an example."""
    imports, made = transform_code(transform)
    text = repr(example)
    lines = [
        "import torch",
        "from functional_optim.testing import Example, laws",
        *imports,
        *context_import(example),
        "",
        f"transform = {made}",
        f"example = {text}",
        f"laws.{law}(transform, example)",
    ]
    return "\n".join(lines)


def context_import(example: Example) -> list[str]:
    """Return the line that an example with contexts needs."""
    return ["from functional_optim import Context"] if example.contexts else []


def transform_code(transform: Any) -> tuple[list[str], str]:
    """Return imports and an expression that makes a transform, if its repr does.

    What prints as `<...>`, or with names that nobody can import, is not written: the
    expression says that it is the transform that was checked.
    """
    kind = type(transform)
    text = repr(transform)
    if text.startswith("<") and not getattr(transform, "__dict__", {}):
        text = f"{kind.__qualname__}()"
    names = _names(text)
    known = {c.__qualname__: c.__module__ for c in _kinds(transform)} | _KNOWN
    if not names or not names <= known.keys() | {"torch"}:
        return [], f"...  # the {kind.__qualname__} that was checked"
    modules: dict[str, list[str]] = {}
    for name in sorted(names - {"torch"}):
        modules.setdefault(known[name], []).append(name)
    own = modules.pop("__main__", [])  # Nothing to import it from.
    notes = [f"# {name} is yours: paste this below it." for name in own]
    return notes + [
        f"from {module} import {', '.join(parts)}" for module, parts in modules.items()
    ], text


def _names(text: str) -> set[str]:
    """Return the names in an expression that is a call; none if it is no call."""
    try:
        made = ast.parse(text, mode="eval").body
    except SyntaxError:
        return set()
    if not isinstance(made, ast.Call):
        return set()
    return {node.id for node in ast.walk(made) if isinstance(node, ast.Name)}


def _kinds(transform: Any) -> list[type]:
    """Return the classes that a transform is made of."""
    values = getattr(transform, "__dict__", {}).values()
    found = [type(transform), *(type(value) for value in values)]
    for inner in children_of(transform).values():
        found += _kinds(inner)
    return [kind for kind in found if kind.__module__ != "builtins"]

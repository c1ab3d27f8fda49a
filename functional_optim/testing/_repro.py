"""Write the report of a failure, with a program that reproduces it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
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
"""The modules of the names in the repr of a transform of this library."""


def report(
    summary: Sequence[str], transform: Any, example: Example, imported: str, call: str
) -> str:
    """Return a summary of a failure and the program in which the call fails."""
    imports, made = _transform_code(transform)
    if example.contexts:
        imports.append("from functional_optim import Context")
    program = [
        "import torch",
        f"from functional_optim.testing import Example, {imported}",
        *imports,
        "",
        f"transform = {made}",
        f"example = {example!r}",
        call,
    ]
    code = [f"    {line}".rstrip() for line in "\n".join(program).splitlines()]
    title = "The smallest case found, to paste and run:"
    return "\n".join([*summary, "", title, "", *code])


def _transform_code(transform: Any) -> tuple[list[str], str]:
    """Return imports and an expression that makes a transform.

    The expression is `...` if the repr is none, or has names that cannot be imported.
    """
    kind = type(transform)
    text = repr(transform)
    if text.startswith("<") and not getattr(transform, "__dict__", {}):
        text = f"{kind.__qualname__}()"
    names = _names(text)
    known = {c.__qualname__: c.__module__ for c in _classes(transform)} | _KNOWN
    if not names or not names <= known.keys() | {"torch"}:
        return [], f"...  # the {kind.__qualname__} that was checked"
    modules: dict[str, list[str]] = {}
    for name in sorted(names - {"torch"}):
        modules.setdefault(known[name], []).append(name)
    own = modules.pop("__main__", [])  # Nothing to import it from.
    imports = [f"# {name} is yours: paste this below it." for name in own]
    for module, parts in modules.items():
        imports.append(f"from {module} import {', '.join(parts)}")
    return imports, text


def _names(text: str) -> set[str]:
    """Return the names in an expression that is a call; none if it is no call."""
    try:
        made = ast.parse(text, mode="eval").body
    except SyntaxError:
        return set()
    nodes = ast.walk(made) if isinstance(made, ast.Call) else ()
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def _classes(transform: Any) -> list[type]:
    """Return the classes of a transform, its attributes and the transforms inside."""
    values = getattr(transform, "__dict__", {}).values()
    found = [type(transform), *(type(value) for value in values)]
    for inner in children_of(transform).values():
        found += _classes(inner)
    return [kind for kind in found if kind.__module__ != "builtins"]

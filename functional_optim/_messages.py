"""Format names, numbers and tables for messages, and suggest the right name."""

from __future__ import annotations

import difflib
import pathlib
import sys
from typing import TYPE_CHECKING, NoReturn

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def format_names(names: Iterable[str], most: int = 5) -> str:
    """Format the first names of a list, and how many there are."""
    names = list(names)
    text = ", ".join(repr(name) for name in names[:most])
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return f"[{text}{more}]"


def first_line(error: Exception) -> str:
    """Format an error on one line: its type and its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def format_bytes(count: int) -> str:
    """Format a number of bytes, such as "1.5 MiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:,.1f} {unit}"


def pluralize(number: int, what: str) -> str:
    """Format a number with its noun, such as "2 tensors"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def format_columns(
    rows: list[tuple[str, ...]], align: str, gap: str = "  "
) -> list[str]:
    """Align the cells of rows in columns, "<" to the left and ">" to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, align, widths, strict=True)
        )
        for row in rows
    ]


_OURS = tuple(
    f"{pathlib.Path(str(file)).parent}/" for file in (__file__, torch.__file__)
)


def user_stacklevel() -> int:
    """Return the `stacklevel` that points a warning at user code."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    return level


def close_matches(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Return the names that are spelled like a wrong one, the closest first."""
    folded: dict[str, list[str]] = {}
    for right in known:
        folded.setdefault(right.lower(), []).append(right)
    found = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=cutoff)
    return [right for one in found for right in folded[one]]


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Suggest the right names, at the end of an error message.

    Example:
        >>> did_you_mean("norm_decay_mul", ["lr_mult", "norm_decay_mult"])
        "did you mean 'norm_decay_mult'?"
        >>> did_you_mean("x", ["lr_mult", "norm_decay_mult"])
        "the names are ['lr_mult', 'norm_decay_mult']"
    """
    known = list(known)
    alike = close_matches(name, known, cutoff)
    if alike:
        return f"did you mean {' or '.join(map(repr, alike))}?"
    return f"the names are {format_names(sorted(known), most=40)}"


def no_attribute(module: str, names: Iterable[str]) -> Callable[[str], NoReturn]:
    """Return a `__getattr__` for a module, with an error that suggests names."""

    def refuse(name: str) -> NoReturn:
        # Python itself looks up names like __wrapped__, and needs no suggestion.
        similar = [] if name.startswith("_") else close_matches(name, names)
        hint = f"; {did_you_mean(name, names)}" if similar else ""
        raise AttributeError(f"module {module!r} has no attribute {name!r}{hint}")

    return refuse

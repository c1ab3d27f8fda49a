"""Names: of parameters, to look entries up by, and of parts of a pipeline."""

from __future__ import annotations

import difflib
import pathlib
import sys
from typing import TYPE_CHECKING, NoReturn

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def shown(names: Iterable[str], most: int = 5) -> str:
    """Return a list of names short enough for an error message."""
    names = list(names)
    text = ", ".join(repr(name) for name in names[:most])
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return f"[{text}{more}]"


def first_line(error: Exception) -> str:
    """Return what an error says, on one line.

    Example:
        >>> first_line(ValueError("too long"))
        'ValueError: too long'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def shown_bytes(count: int) -> str:
    """Return bytes as text, such as "1.5 MiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:,.1f} {unit}"


def counted(number: int, what: str) -> str:
    """Return a number with its noun, such as "2 passes"."""
    plural = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{plural}"


def columns(rows: list[tuple[str, ...]], align: str) -> list[str]:
    """Lay rows out in columns, "<" to the left and ">" to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, align, widths, strict=True)
        )
        for row in rows
    ]


_OURS = tuple(
    f"{pathlib.Path(str(file)).parent}/" for file in (__file__, torch.__file__)
)


def callers_level() -> int:
    """Return the `stacklevel` of the caller outside of this library and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    return level


def near(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Return the names that are spelled nearly like a wrong one, the nearest first.

    Example:
        >>> near("AdamW", ["adam", "adamw", "sgd"])
        ['adamw', 'adam']
    """
    folded: dict[str, list[str]] = {}
    for right in known:
        folded.setdefault(right.lower(), []).append(right)
    found = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=cutoff)
    return [right for one in found for right in folded[one]]


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the end of an error message: what a wrong name may have meant.

    Example:
        >>> did_you_mean("norm_decay_mul", ["lr_mult", "norm_decay_mult"])
        "did you mean 'norm_decay_mult'?"
        >>> did_you_mean("x", ["lr_mult", "norm_decay_mult"])
        "the names are ['lr_mult', 'norm_decay_mult']"
    """
    known = list(known)
    alike = near(name, known, cutoff)
    if alike:
        return f"did you mean {' or '.join(map(repr, alike))}?"
    return f"the names are {shown(sorted(known), most=40)}"


def no_attribute(module: str, names: Iterable[str]) -> Callable[[str], NoReturn]:
    """Return the `__getattr__` of a module, whose error suggests the near name.

    Example:
        >>> no_attribute("fo", ["adamw", "sgd"])("AdamW")
        Traceback (most recent call last):
        AttributeError: module 'fo' has no attribute 'AdamW'; did you mean 'adamw'?
    """

    def refuse(name: str) -> NoReturn:
        msg = f"module {module!r} has no attribute {name!r}"
        # Python itself looks up names like __wrapped__, and expects nothing.
        if not name.startswith("_") and near(name, names):
            msg += f"; {did_you_mean(name, names)}"
        raise AttributeError(msg)

    return refuse

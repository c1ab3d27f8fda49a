"""Spelling: the names that a wrong one is near to."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, NoReturn

from functional_optim._messages import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def near(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Return the names that are spelled nearly like a wrong one, the nearest first.

    Args:
        name: The wrong name.
        known: The right ones; upper and lower case are the same.
        cutoff: How similar they must be, from 0 to 1.

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

    Args:
        name: The wrong name.
        known: The right ones.
        cutoff: How similar, from 0 to 1, what is suggested must be; nothing that is
            similar enough, and all names are listed.

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

    Args:
        module: Name of the module.
        names: Its public names.

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

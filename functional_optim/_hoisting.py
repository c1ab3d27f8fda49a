"""Arithmetic on single numbers, done once for all parts of a step.

An executor runs the same update on one unit of parameters after the other. What an
update derives from a step count or from a joint norm is the same in each of them: a
dozen operations on 0-dim tensors, which cost as much as those on the parameters where
these are small.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

_VALUES = {float, int, bool, torch.device}


class _Current(threading.local):
    known: dict[Any, tuple[Any, Any, Any]] | None = None


_current = _Current()


def once(compute: Callable[..., T], *inputs: Any) -> T:
    """Return `compute(*inputs)`; inside `hoisting` the result of the same call before.

    Args:
        compute: A pure function, always the same object. Nobody may write into what it
            returns.
        inputs: Numbers and devices, which are the same if they are equal; tensors and
            all else, which are if they are the same object.

    Example:
        >>> import torch
        >>> count = torch.tensor(1.0)
        >>> with hoisting():
        ...     once(torch.exp, count) is once(torch.exp, count)
        True
    """
    known = _current.known
    if known is None:
        return compute(*inputs)
    key = id(compute), *map(_told_apart, inputs)
    found = known.get(key)
    if found is None:
        # All are kept: an address is not given to another object meanwhile.
        found = known[key] = compute(*inputs), compute, inputs
    result: T = found[0]
    return result


def _told_apart(value: Any) -> Any:
    """Return what is equal only for inputs that are the same."""
    kind = type(value)
    if kind not in _VALUES:
        return id(value)
    return kind, value or str(value)  # 0.0 is equal to -0.0.


@contextlib.contextmanager
def hoisting() -> Iterator[None]:
    """Remember until the end of the block what `once` computes, in this thread."""
    before, _current.known = _current.known, {}
    try:
        yield
    finally:
        _current.known = before

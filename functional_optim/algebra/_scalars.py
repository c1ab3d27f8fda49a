"""Memoize arithmetic on step counts and hyperparameters, and share its results.

Names with the same number of updates share one 0-dim tensor, so that the arithmetic on
counts is done once for all of them, on the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_VALUES = {float, int, bool, torch.device}


class _Memo(threading.local):
    known: dict[Any, tuple[Any, Any, Any]] | None = None


_memo = _Memo()


def memoized(compute: Callable[..., T], *inputs: Any) -> T:
    """Return `compute(*inputs)`, memoized inside a `memoize_scalars()` block.

    Example:
        >>> import torch
        >>> count = torch.tensor(1.0)
        >>> with memoize_scalars():
        ...     memoized(torch.exp, count) is memoized(torch.exp, count)
        True
    """
    known = _memo.known
    if known is None:
        return compute(*inputs)
    key = id(compute), *map(_identity_key, inputs)
    found = known.get(key)
    if found is None:
        # All are kept: an address is not given to another object meanwhile.
        found = known[key] = compute(*inputs), compute, inputs
    result: T = found[0]
    return result


def _identity_key(value: Any) -> Any:
    """Return a key that is equal only for the same input."""
    kind = type(value)
    if kind not in _VALUES:
        return id(value)
    return kind, value or str(value)  # 0.0 is equal to -0.0.


@contextlib.contextmanager
def memoize_scalars() -> Iterator[None]:
    """Memoize the calls of `memoized` in this thread until the end of the block."""
    before, _memo.known = _memo.known, {}
    try:
        yield
    finally:
        _memo.known = before


def shared_rows(tensors: list[Tensor], most: int = 8) -> tuple[list[int], list[Tensor]]:
    """Return the index of each tensor among the distinct tensors, and these.

    By `is`, not by `id`: torch.compile guards an `id` on the object of this very call.
    More than a few distinct ones are not worth the search: each gets its own row.
    """
    rows: list[int] = []
    distinct: list[Tensor] = []
    row = 0
    for tensor in tensors:
        if not distinct or tensor is not distinct[row]:  # Neighbours mostly share.
            known = [r for r, other in enumerate(distinct) if tensor is other]
            row = known[0] if known else len(distinct)
            if not known:
                distinct.append(tensor)
                if len(distinct) > most:
                    return list(range(len(tensors))), tensors
        rows.append(row)
    return rows, distinct

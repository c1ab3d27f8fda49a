"""Arithmetic on step counts and hyperparameters: 0-dim float64, shared or by name.

Names with the same number of updates share one tensor, so that the arithmetic on counts
is done once for all of them, on the device. `Column` stacks the distinct tensors.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import TensorMap, lookup

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


Factor: TypeAlias = float | Tensor | Mapping[str, float | Tensor]
"""What a map can be multiplied by: one number for all, or one for each name."""


def init_counts(params: TensorMap, dtype: torch.dtype = torch.float64) -> TensorMap:
    """Return a 0-dim zero for every name, one tensor shared by all on a device.

    Example:
        >>> init_counts({"w": torch.ones(2)})
        {'w': tensor(0., dtype=torch.float64)}
    """
    zeros = {
        device: torch.zeros((), dtype=dtype, device=device)
        for device in {param.device for param in params.values()}
    }
    return {name: zeros[param.device] for name, param in params.items()}


def increment(counts: TensorMap, names: Iterable[str]) -> TensorMap:
    """Return the counts of some names plus 1.

    Example:
        >>> increment(init_counts({"w": torch.ones(2)}), ["w"])
        {'w': tensor(1., dtype=torch.float64)}
    """
    column = Column(counts, names)
    return column.by_name(memoized(torch.add, column.values, 1))


def set_flags(flags: TensorMap, names: Iterable[str]) -> TensorMap:
    """Return flags of some names, all True.

    Example:
        >>> set_flags(init_counts({"w": torch.ones(2)}, torch.bool), ["w"])
        {'w': tensor(True)}
    """
    column = Column(flags, names)
    return column.by_name(memoized(torch.ones_like, column.values))


class Column:
    """0-dim numbers of some names, stacked: one row for each distinct tensor."""

    __slots__ = ("_names", "_rows", "values")

    def __init__(
        self, entries: TensorMap, names: Iterable[str], *, apart: bool = False
    ) -> None:
        self._names = list(names)
        found = lookup(entries, self._names)
        self._rows, distinct = list(range(len(found))), found
        if not apart:
            self._rows, distinct = _shared_rows(found)
        self.values: Tensor = memoized(_stack, *distinct)
        """The numbers, to compute with. Shape (rows,)."""

    def computed(self, compute: Callable[..., Tensor], *factors: Factor) -> Tensor:
        """Return compute(values, *factors), all in float64."""
        return memoized(compute, self.values, *map(self.along, factors))

    def along(self, factor: Factor) -> Tensor:
        """Return a factor in float64, in a shape that broadcasts with `values`."""
        if isinstance(factor, Mapping):  # Then the rows are apart.
            numbers = lookup(factor, self._names)
            return torch.stack([self._float64(number) for number in numbers])
        return self._float64(factor)

    def by_name(self, values: Tensor) -> TensorMap:
        """Return the row of each name as a 0-dim tensor, shared like the entries."""
        rows = memoized(Tensor.unbind, values)
        return {
            name: rows[row] for name, row in zip(self._names, self._rows, strict=True)
        }

    def factor(self, values: Tensor) -> Factor:
        """Return the rows as a factor: one for all if all share it."""
        if len(values) == 1:
            return memoized(Tensor.unbind, values)[0]
        return self.by_name(values)

    def _float64(self, number: float | Tensor) -> Tensor:
        return memoized(_float64, number, self.values.device)


def _stack(*tensors: Tensor) -> Tensor:
    return torch.stack(tensors)


def _float64(number: float | Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float64, device=device)


def _shared_rows(
    tensors: list[Tensor], most: int = 8
) -> tuple[list[int], list[Tensor]]:
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


def has_maps(*factors: Factor) -> bool:
    """Whether one of the factors is a map."""
    return any(isinstance(factor, Mapping) for factor in factors)


def one_minus(factor: Factor) -> Factor:
    """Return 1 - factor, for tensors in float64."""
    if isinstance(factor, Mapping):
        return {name: _number_one_minus(value) for name, value in factor.items()}
    return _number_one_minus(factor)


def _number_one_minus(number: float | Tensor) -> float | Tensor:
    return memoized(_one_minus, number) if isinstance(number, Tensor) else 1 - number


def _one_minus(number: Tensor) -> Tensor:
    return 1 - number.double()


def negated(factor: Factor) -> Factor:
    """Return -factor."""
    if isinstance(factor, Mapping):
        return {name: -value for name, value in factor.items()}
    return memoized(torch.neg, factor) if isinstance(factor, Tensor) else -factor

"""Accumulate gradients over micro-batches."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from functional_optim.algebra._lifting import lifted
from functional_optim.algebra._scalars import memoized
from functional_optim.algebra._tensor_map import (
    TensorMap,
    copied,
    device_of,
    is_16_bit,
    lookup,
    subset,
)
from functional_optim.core._apply import added
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import flag, value_class
from functional_optim.core._transform import Role, Scope, Static
from functional_optim.core._validation import check_parameters, check_state


class AccumulateState(NamedTuple):
    """The state of `Accumulate`: the sums of an open window.

    Attributes:
        sum: Weighted sums of the updates, like the parameters. Meaningful only for
            names that were seen in the open window.
        weight: Sum of the weights in the open window. Tensor, shape (), float64.
        position: How many micro-batches the open window has, on the host.
        seen: Names with an update in the open window, on the host.

    Example:
        >>> Accumulate(4).init({"w": torch.ones(2)}).position
        Static(value=0)
    """

    sum: TensorMap
    weight: Tensor
    position: Static[int]
    seen: Static[tuple[str, ...]]


@final
@value_class
class Accumulate:
    """Hold until a window of micro-batches is full, then emit their mean.

        u <- (w_1 u_1 + ... + w_n u_n) / (w_1 + ... + w_n)

    n is the true number of micro-batches: `every`, or less in a last window that
    `Context(last=True)` closes. The weights are `Context(weight=...)`, such as numbers
    of tokens, and 1 by default. Until the window is full the result is an empty map:
    nothing downstream runs. A name that was missing in some micro-batches counts as
    zero there; one that was missing in all is left out. If all weights are 0 the mean
    is 0 / 0, NaN: put the rest of the chain inside `SkipNonfinite`.

    Each micro-batch is a gradient of its own: zero `.grad` before every backward.
    `last=True` must come with the last micro-batch itself: an empty map holds, it does
    not close a window. To know the end in advance, look one batch ahead.

    Under DistributedDataParallel no backward may be inside `no_sync()`: its gradient is
    that of one process, and the sum of these is reduced by nobody. No transform can see
    it. Accumulate in `.grad` there, as `OptimWrapper` does.

    Args:
        every: Number of micro-batches in a window. >= 1.
        mean: Whether to divide by the sum of the weights.
        dtype: Dtype of the sums. None means float32 for 16-bit parameters, else the
            parameter's own.

    State:
        sum: Tensors like the parameters, in `dtype`.
        weight: Sum of the weights so far. Tensor, shape (), float64.
        position, seen: `Static`: micro-batches so far, names seen in them.

    Shapes:
        Every update keeps its shape, device and name, and takes the dtype of the sums.

    Raises:
        ValueError: `every` is below 1.
        TypeError: `every` is not an int, `dtype` no floating-point dtype.

    Example:
        >>> params = {"w": torch.zeros(1)}
        >>> two = Accumulate(2)
        >>> held, state = two.update({"w": torch.ones(1)}, two.init(params), params)
        >>> held, two.update({"w": 3 * torch.ones(1)}, state, params)[0]
        ({}, {'w': tensor([2.])})

    Source:
        The plain PyTorch loop that sums in `.grad` and divides once; optax.MultiSteps.
    """

    every: int
    _: KW_ONLY
    mean: bool = flag(default=True)
    dtype: torch.dtype | None = None

    scope: ClassVar[Scope] = Scope.ELEMENTWISE
    role: ClassVar[Role] = Role.ACCUMULATE
    consumes_state: ClassVar[bool] = True

    def _check(self) -> None:
        """Refuse windows without micro-batches and dtypes that cannot hold sums."""
        if isinstance(self.every, bool) or not isinstance(self.every, int):
            raise TypeError(
                f"every must be an int, a number of micro-batches, got {self.every!r}"
            )
        if self.every < 1:
            raise ValueError(f"every must be >= 1, got {self.every}")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise TypeError(
                f"dtype must be a floating-point dtype or None, got {self.dtype}"
            )

    def init(self, params: TensorMap) -> AccumulateState:
        """Return an empty window."""
        check_parameters(params)
        sums = {
            name: torch.zeros_like(p, dtype=self._sum_dtype(p))
            for name, p in params.items()
        }
        weight = torch.zeros((), dtype=torch.float64, device=device_of(params))
        return AccumulateState(sums, weight, Static(0), Static(()))

    def update(
        self,
        updates: TensorMap,
        state: AccumulateState,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, AccumulateState]:
        """Return an empty map, or the mean of the window that this update closes."""
        check_state(self, state, AccumulateState)
        if not updates:
            return {}, state
        context = context or Context()
        position = self._position(state)
        before = set(state.seen.value) if position else set()
        sums = self._added(updates, state.sum, before, context.weight)
        weight = memoized(_weight_sum, state.weight, context.weight, position)
        seen = [name for name in params if name in before or name in updates]
        if position + 1 < self.every and not context.last:
            open_now = Static(position + 1), Static(tuple(seen))
            return {}, AccumulateState(sums, weight, *open_now)
        whole = subset(sums, seen)
        total = _divided(whole, weight=weight) if self.mean else copied(whole)
        return total, AccumulateState(sums, weight, Static(0), Static(()))

    def _position(self, state: AccumulateState) -> int:
        """Return how many micro-batches the open window has."""
        position = state.position.value
        if not 0 <= position < self.every:
            raise ValueError(
                f"Accumulate.position must be from 0 to {self.every - 1}, got "
                f"{position}; the state is of another window"
            )
        return position

    def _sum_dtype(self, param: Tensor) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        return torch.float32 if is_16_bit(param) else param.dtype

    def _added(
        self,
        updates: TensorMap,
        sums: TensorMap,
        before: set[str],
        weight: Tensor | None,
    ) -> TensorMap:
        """Return the sums with one more micro-batch.

        The first one is taken as it is, not added to zeros: that is what `.grad` does,
        and what was left of the last window does not matter.
        """
        if weight is not None:
            factor = weight.to(device_of(updates), torch.float64)
            updates = _weighted(_counted(updates, sums, factor != 0), weight=factor)
        first = {name: u for name, u in updates.items() if name not in before}
        later = {name: u for name, u in updates.items() if name in before}

        def sums_of(names: TensorMap) -> TensorMap:
            return type(sums)(zip(names, lookup(sums, names), strict=True))

        return sums | _replaced(sums_of(first), first) | added(sums_of(later), later)


def _counted(updates: TensorMap, sums: TensorMap, counts: Tensor) -> TensorMap:
    """Return updates as wide as sums, 0 for what is not finite if they do not count.

    A micro-batch without tokens has the mean 0 / 0, and 0 * NaN is NaN. Its finite
    numbers stay: the derivative with respect to a weight of 0 is made of them.
    """
    return {
        name: torch.where(counts, u, u.nan_to_num(0.0, 0.0, 0.0)).to(
            torch.promote_types(u.dtype, sums[name].dtype)
        )
        for name, u in updates.items()
    }


@lifted
def _weighted(u: Tensor, *, weight: Tensor) -> Tensor:
    return u * weight


@lifted
def _divided(total: Tensor, *, weight: Tensor) -> Tensor:
    return total / weight


@lifted
def _replaced(total: Tensor, u: Tensor) -> Tensor:
    return u


def _weight_sum(total: Tensor, weight: Tensor | None, position: int) -> Tensor:
    """Return the sum of the weights with one more micro-batch."""
    before = total if position else torch.zeros_like(total)
    return before + (1.0 if weight is None else weight)

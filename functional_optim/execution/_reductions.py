"""Compute the totals of `context.reduce` over all units.

A pass runs the update of every unit up to the first call whose total is not known, and
reduces the partials of the units. With all totals known the update runs to its end.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from functional_optim.core._context import ReduceOp, reduce_locally

if TYPE_CHECKING:
    from collections.abc import Sequence

    from functional_optim.execution._state_tree import Leaf
    from functional_optim.execution._units import DeferredWrites, Unit

ReduceCall: TypeAlias = tuple[tuple[int | str, ...], int]
"""A call of `reduce`: the path of the context, and how many came before it there."""

Totals: TypeAlias = dict[ReduceCall, Tensor]


class Partial(NamedTuple):
    """What a unit contributes to a total."""

    call: ReduceCall
    value: Tensor
    op: ReduceOp


class UnitUpdate(Protocol):
    """One update of one unit in one step, run once for each total and once to write."""

    unit: Unit
    key: Hashable
    """Updates with equal keys make the same calls of `reduce`."""

    def calls(self) -> Sequence[ReduceCall]:
        """Return the calls of `reduce`, in order."""

    def partial(self, totals: Totals) -> Partial | None:
        """Run up to the first unknown total; return the unit's part of it."""

    def apply(self, totals: Totals, deferred: DeferredWrites) -> list[Leaf] | None:
        """Write new parameters and state; return the new state of one of the units."""


class TotalNeededError(BaseException):
    """Stops an update at an unknown total, past any `except Exception`.

    Do not keep it: its traceback refers to the gradients of the step.
    """

    def __init__(self, partial: Partial) -> None:
        super().__init__(partial.call)
        self.partial = partial


class CallCounter:
    """Numbers the calls of `reduce` in one update, path by path."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int | str, ...], int] = {}

    def next_call(self, path: tuple[int | str, ...]) -> ReduceCall:
        """Return the next call at a path."""
        return path, self._counts.get(path, 0)

    def count(self, call: ReduceCall) -> None:
        """Count a call as made."""
        self._counts[call[0]] = call[1] + 1

    def counts(self) -> dict[tuple[int | str, ...], int]:
        """Return how many calls were made at each path."""
        return dict(self._counts)

    def go_on_from(self, counts: dict[tuple[int | str, ...], int]) -> None:
        """Count the calls of a result that is memoized as made."""
        self._counts.update(counts)


class KnownTotals(CallCounter):
    """A reducer that returns known totals and stops at the first unknown one."""

    def __init__(self, totals: Totals) -> None:
        super().__init__()
        self._totals = totals

    def known(self, path: tuple[int | str, ...]) -> Tensor | None:
        """Return the total of the next call, which counts as made, if it is known.

        `Context.reduce` asks first, and computes no partial then.
        """
        call = self.next_call(path)
        total = self._totals.get(call)
        if total is not None:
            self.count(call)
        return total

    def __call__(
        self, path: tuple[int | str, ...], partial: Tensor, op: ReduceOp
    ) -> Tensor:
        total = self.known(path)
        if total is None:
            raise TotalNeededError(Partial(self.next_call(path), partial, op))
        return total


class CallRecorder(CallCounter):
    """A reducer that records its calls and returns ones.

    Zeros, or the total of a part, may be an error to divide by.
    """

    def __init__(self, calls: list[ReduceCall]) -> None:
        super().__init__()
        self._calls = calls

    def __call__(
        self, path: tuple[int | str, ...], partial: Tensor, op: ReduceOp
    ) -> Tensor:
        self._calls.append(self.next_call(path))
        self.count(self._calls[-1])
        return torch.ones_like(reduce_locally(partial, op))


def totals_of(updates: Sequence[UnitUpdate]) -> Totals:
    """Return the totals of all calls of `reduce`, with a pass for each."""
    left: dict[Hashable, list[ReduceCall]] = {}
    for update in updates:
        left.setdefault(update.key, list(update.calls()))
    totals: Totals = {}
    while waiting := [calls for calls in left.values() if calls]:
        call = first_call(waiting)
        keys = {key for key, calls in left.items() if calls and calls[0] == call}
        chosen = [update for update in updates if update.key in keys]
        totals[call] = _total_of(chosen, call, totals)
        for key in keys:
            del left[key][0]
    return totals


def first_call(left: Sequence[Sequence[ReduceCall]]) -> ReduceCall:
    """Return a call that is the next one for all updates that make it.

    Example:
        >>> a, b = ((0,), 0), ((1,), 0)
        >>> first_call([[b], [a, b]])
        ((0,), 0)
    """
    for calls in left:
        if all(calls[0] not in other[1:] for other in left):
            return calls[0]
    raise order_error(left[0][0])


def _total_of(
    updates: Sequence[UnitUpdate], call: ReduceCall, totals: Totals
) -> Tensor:
    """Return the total of a call over updates."""
    partials: list[Tensor] = []
    op: ReduceOp = "sum"
    for update in updates:
        partial = update.partial(totals)
        if partial is None or partial.call != call:
            raise order_error(call)
        partials.append(partial.value)
        op = partial.op
    return reduce_locally(torch.cat(partials), op)


def order_error(call: ReduceCall) -> ValueError:
    """Return the error of updates that do not make the same calls in the same order."""
    return ValueError(
        f"parameters call context.reduce in different orders (at {call[0]}); calls "
        "must not depend on names, shapes or values"
    )

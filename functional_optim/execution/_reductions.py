"""Passes: how units learn totals over all of them.

A pass runs the update of every unit up to a call of `context.reduce` whose total is not
known yet, and joins what the units bring there. When all totals are known, the last
pass runs through.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from functional_optim.core._context import ReduceOp, reduce_locally

if TYPE_CHECKING:
    from collections.abc import Sequence

    from functional_optim.core._context import Reducer
    from functional_optim.execution._state_tree import Node
    from functional_optim.execution._units import Later, Unit

Call: TypeAlias = tuple[tuple[int | str, ...], int]
"""A call of `reduce`: the path of the context, and how many came before it there."""

Totals: TypeAlias = dict[Call, Tensor]

R = TypeVar("R")


class Stop(NamedTuple):
    """Where an update stops, and what its unit brings there."""

    call: Call
    partial: Tensor
    op: ReduceOp


class UnitUpdate(Protocol):
    """One update of one unit in one step, run once for each total and once to write."""

    unit: Unit
    key: Hashable
    """Updates with equal keys make the same calls of `reduce`."""

    def calls(self) -> Sequence[Call]:
        """Return the calls of `reduce`."""

    def stop(self, totals: Totals) -> Stop | None:
        """Run up to the first total that is not known; return where that was."""

    def apply(self, totals: Totals, later: Later) -> list[Node] | None:
        """Move parameters and state; return the nodes of the new state."""


class StopError(BaseException):
    """Carries a stop out of an update, past any `except`.

    Nothing may keep it: its traceback keeps the frames that it passed, and with them
    the gradients of a step.
    """

    def __init__(self, at: Stop) -> None:
        super().__init__(at.call)
        self.at = at


class _Numbered:
    """A reducer for one update that tells its calls apart."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int | str, ...], int] = {}

    def next(self, path: tuple[int | str, ...]) -> Call:
        """Return the call that comes next at a path."""
        return path, self._seen.get(path, 0)

    def count(self, call: Call) -> None:
        """Go on to the call after this one."""
        self._seen[call[0]] = call[1] + 1


class Supplied(_Numbered):
    """A reducer that knows some totals and stops at the first it does not."""

    def __init__(self, totals: Totals) -> None:
        super().__init__()
        self.totals = totals

    def known(self, path: tuple[int | str, ...]) -> Tensor | None:
        """Return the total of the next call if there is one; then it is made."""
        call = self.next(path)
        total = self.totals.get(call)
        if total is not None:
            self.count(call)
        return total

    def __call__(
        self, path: tuple[int | str, ...], partial: Tensor, op: ReduceOp
    ) -> Tensor:
        total = self.known(path)
        if total is None:
            raise StopError(Stop(self.next(path), partial, op))
        return total


class Recorded(_Numbered):
    """A reducer that writes down the calls, and answers with a harmless number.

    The total of a part may be what nobody can go on from, such as a norm of 0.
    """

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    def __call__(
        self, path: tuple[int | str, ...], partial: Tensor, op: ReduceOp
    ) -> Tensor:
        call = self.next(path)
        self.count(call)
        self._calls.append(call)
        return torch.ones_like(reduce_locally(partial, op))


def next_call(left: Sequence[Sequence[Call]]) -> Call:
    """Return a call that all who make it make next.

    Example:
        >>> a, b = ((0,), 0), ((1,), 0)
        >>> next_call([[b], [a, b]])
        ((0,), 0)
    """
    for calls in left:
        if all(calls[0] not in other[1:] for other in left):
            return calls[0]
    raise _disordered(left[0][0])


def _disordered(call: Call) -> ValueError:
    return ValueError(
        f"parameters call context.reduce in different orders (at {call[0]}); calls "
        "must not depend on names, shapes or values"
    )


def through(run: Callable[[Reducer], R], totals: Totals) -> R:
    """Run an update to its end."""
    try:
        return run(Supplied(totals))
    except StopError as stop:
        call = stop.at.call
    raise _disordered(call)


def collected(runs: Sequence[UnitUpdate], call: Call, totals: Totals) -> Tensor:
    """Run updates up to a call, and return the total over them."""
    partials: list[Tensor] = []
    op: ReduceOp = "sum"
    for run in runs:
        stop = run.stop(totals)
        if stop is None or stop.call != call:
            raise _disordered(call)
        partials.append(stop.partial)
        op = stop.op
    return reduce_locally(torch.cat(partials), op)


def totals_of(updates: Sequence[UnitUpdate]) -> Totals:
    """Return the totals that updates ask for, with a pass for each."""
    left: dict[Hashable, list[Call]] = {}
    for update in updates:
        left.setdefault(update.key, list(update.calls()))
    totals: Totals = {}
    while waiting := [calls for calls in left.values() if calls]:
        call = next_call(waiting)
        keys = {key for key, calls in left.items() if calls and calls[0] == call}
        chosen = [update for update in updates if update.key in keys]
        totals[call] = collected(chosen, call, totals)
        for key in keys:
            del left[key][0]
    return totals

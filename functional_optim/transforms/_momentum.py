"""Accumulate momentum."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from functional_optim.algebra._arithmetic import over
from functional_optim.algebra._scalars import (
    Column,
    has_maps,
    init_counts,
    one_minus,
    set_flags,
)
from functional_optim.algebra._tensor_map import TensorMap, copied, zeros_like
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import (
    Hyperparameter,
    ScheduleState,
    evaluate,
    flag,
    hyperparameter,
    init_hyperparameters,
    is_zero,
    value_class,
)
from functional_optim.core._transform import Role, Scope
from functional_optim.core._validation import check_made_for, check_state


class TraceState(NamedTuple):
    """The state of `Trace`: momentum buffers.

    Attributes:
        momentum_buffer: Running sums, like the parameters.
        started: Whether a parameter had an update yet, 0-dim bool tensors by name; `()`
            without dampening, where it makes no difference.
        schedule: State of the schedules.

    Example:
        >>> Trace(0.9).init({"w": torch.ones(2)}).momentum_buffer
        {'w': tensor([0., 0.])}
    """

    momentum_buffer: TensorMap
    started: TensorMap | tuple[()]
    schedule: ScheduleState | tuple[()]


@final
@value_class
class Trace:
    """Accumulate updates into a momentum buffer b, as torch.optim.SGD does.

        b <- momentum * b + (1 - dampening) * u      (at first b <- u)
        u <- u + momentum * b  if nesterov, else b

    While momentum is a plain 0, such as when a scheduler has cycled it down, u and b
    stay as they are.

    Args:
        momentum: How much of the buffer stays. Finite, >= 0.
        dampening: How much of the update is left out, but for the first. Finite.
        nesterov: Whether to look ahead. Needs momentum > 0 and dampening 0.

    State:
        momentum_buffer: Tensors like the parameters.
        started: 0-dim bool tensors by name, or `()` without dampening.
        schedule: `()`, or a `ScheduleState` if a hyperparameter is a schedule.

    Shapes:
        Every update keeps its shape, device and name, and takes the wider dtype of
        update and buffer.

    Raises:
        ValueError: a number is out of range, or nesterov with dampening.
        TypeError: an argument is no hyperparameter.

    Example:
        >>> params = {"w": torch.ones(1)}
        >>> trace = Trace(0.9)
        >>> _, state = trace.update(params, trace.init(params), params)
        >>> trace.update(params, state, params)[0]
        {'w': tensor([1.9000])}

    Source:
        torch.optim.SGD; Sutskever et al. 2013, ICML; optax.trace.
    """

    momentum: Hyperparameter = hyperparameter(ge=0.0, zero_differs=True)
    _: KW_ONLY
    dampening: Hyperparameter = hyperparameter(default=0.0, zero_differs=True)
    nesterov: bool = flag(default=False)

    scope: ClassVar[Scope] = Scope.ELEMENTWISE
    role: ClassVar[Role] = Role.MOMENT
    consumes_state: ClassVar[bool] = True

    def _check(self) -> None:
        """Refuse Nesterov momentum without momentum or with dampening."""
        if self.nesterov and (is_zero(self.momentum) or self._dampens):
            raise ValueError(
                "nesterov=True needs momentum > 0 and dampening 0, got momentum "
                f"{self.momentum} and dampening {self.dampening}"
            )

    @property
    def _dampens(self) -> bool:
        return not is_zero(self.dampening)

    def init(self, params: TensorMap) -> TraceState:
        """Return buffers of zeros."""
        schedule = init_hyperparameters(self, params)
        started: TensorMap | tuple[()] = ()
        if self._dampens:
            started = init_counts(params, torch.bool)
        return TraceState(zeros_like(params), started, schedule)

    def update(
        self,
        updates: TensorMap,
        state: TraceState,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, TraceState]:
        """Return the buffer, or the update plus momentum times the buffer."""
        check_state(self, state, TraceState)
        check_made_for(self, "dampening", state.started, wanted=self._dampens)
        if not updates:
            return {}, state
        now, schedule = evaluate(self, state.schedule, updates)
        if is_zero(now.momentum):  # As torch: the buffer waits.
            return copied(updates), state._replace(schedule=schedule)
        started, alpha = state.started, one_minus(now.dampening)
        if isinstance(started, dict):
            # b is zero at first: taking all of u makes it u.
            flags = Column(started, updates, apart=has_maps(alpha))
            alpha = flags.factor(flags.computed(_taken, alpha))
            started = started | set_flags(started, updates)
        buffer = over(state.momentum_buffer, at=updates)
        buffer = buffer.mul(now.momentum).add(updates, alpha=alpha)
        kept = buffer.to_map(like=state.momentum_buffer)
        if self.nesterov:
            moved = over(updates, at=kept).add(kept, alpha=now.momentum).to_map()
        else:
            moved = over(kept, at=updates).to_map()
        new = state.momentum_buffer | kept
        return moved, TraceState(new, started, schedule)


def _taken(started: Tensor, alpha: Tensor) -> Tensor:
    """Return 1 - dampening, or 1 for the first update."""
    return torch.where(started, alpha, 1.0)

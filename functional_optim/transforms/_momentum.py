"""Accumulate momentum."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, zeros_like

from functional_optim.algebra._recording import add
from functional_optim.core._hyperparameters import (
    Scalar,
    flag,
    hyperparameter,
    is_zero,
)
from functional_optim.core._rule import Rule, number
from functional_optim.core._transform import Role, Scope


class TraceState(NamedTuple):
    """The state of `Trace` for one parameter; a map by name for all.

    Attributes:
        momentum_buffer: Running sum, like the parameter.
        started: Whether it had an update yet. Shape (), bool; `()` without dampening,
            where it makes no difference.

    Example:
        >>> Trace(0.9).init({"w": torch.ones(2)}).momentum_buffer
        {'w': tensor([0., 0.])}
    """

    momentum_buffer: Tensor
    started: Tensor | tuple[()] = ()


@final
class Trace(Rule, scope=Scope.ELEMENTWISE, role=Role.MOMENT):
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

    momentum: Scalar = hyperparameter(ge=0.0, zero_differs=True)
    _: KW_ONLY
    dampening: Scalar = hyperparameter(default=0.0, zero_differs=True)
    nesterov: bool = flag(default=False)

    def _check(self) -> None:
        """Refuse Nesterov momentum without momentum or with dampening."""
        dampens = not is_zero(self.dampening)
        if self.nesterov and (is_zero(self.momentum) or dampens):
            raise ValueError(
                "nesterov=True needs momentum > 0 and dampening 0, got momentum "
                f"{self.momentum} and dampening {self.dampening}"
            )

    def init_param(self, p: Tensor) -> TraceState:
        """Return a buffer of zeros."""
        started = () if is_zero(self.dampening) else number(initial=False)
        return TraceState(zeros_like(p), started)

    def update_param(self, u: Tensor, s: Any, p: Tensor) -> tuple[Tensor, Any]:
        """Return the buffer, or the update plus momentum times the buffer."""
        if is_zero(self.momentum):  # As torch: the buffer waits.
            return u, s
        alpha: Any = 1.0
        if not is_zero(self.dampening):
            # The buffer is zero at first: adding all of u makes it u.
            alpha = torch.where(s.started, 1 - self.dampening, 1.0)
        b = add(s.momentum_buffer * self.momentum, u, alpha)
        started: Any = () if is_zero(self.dampening) else True
        direction = add(u, b, self.momentum) if self.nesterov else b
        return direction, TraceState(b, started)


def _taken(started: Tensor, alpha: Tensor) -> Tensor:
    """Return 1 - dampening, or 1 for the first update."""
    return torch.where(started, alpha, 1.0)

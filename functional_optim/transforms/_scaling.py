"""Multiplying all updates by one number."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from functional_optim._hoisting import once
from functional_optim._scheduling import ScheduleState, evaluate, init_hyperparameters
from functional_optim.algebra._arithmetic import over
from functional_optim.algebra._scalars import negated
from functional_optim.algebra._tensor_map import device_of
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import (
    Hyperparameter,
    hyperparameter,
    value_class,
)
from functional_optim.core._transform import Role, Scope

if TYPE_CHECKING:
    from functional_optim.core._transform import TensorMap


@final
@value_class
class Scale:
    """Multiply updates by a factor: u <- factor * u.

    Args:
        factor: Factor, of any sign. Finite.

    State:
        `()`, or a `ScheduleState` if `factor` is a schedule.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `factor` is not finite, or not 0-dim.
        TypeError: `factor` is no hyperparameter.

    Example:
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> Scale(-2.0).update(params, (), params)[0]
        {'w': tensor([-2., -4.])}

    Source:
        optax.scale, optax.scale_by_schedule.
    """

    factor: Hyperparameter = hyperparameter()

    scope: ClassVar[Scope] = Scope.ELEMENTWISE
    consumes_updates: ClassVar[bool] = True

    def init(self, params: TensorMap) -> ScheduleState | tuple[()]:
        """Return the state of the schedules; check maps by name."""
        return init_hyperparameters(self, params)

    def update(
        self,
        updates: TensorMap,
        state: ScheduleState | tuple[()],
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, ScheduleState | tuple[()]]:
        """Return factor * u."""
        now, state = evaluate(self, state, updates)
        return over(updates).mul(now.factor).to_map(), state


@final
@value_class
class ScaleByLearningRate:
    """Turn a direction into a step downhill: u <- -lr * u.

    Args:
        lr: Learning rate, in parameter units per unit of the direction. Finite, >= 0.

    State:
        `()`, or a `ScheduleState` if `lr` is a schedule.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `lr` is negative, not finite, or not 0-dim.
        TypeError: `lr` is no hyperparameter.

    Example:
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> ScaleByLearningRate(0.5).update(params, (), params)[0]
        {'w': tensor([-0.5000, -1.0000])}

    Source:
        optax.scale_by_learning_rate.
    """

    lr: Hyperparameter = hyperparameter(ge=0.0)

    scope: ClassVar[Scope] = Scope.ELEMENTWISE
    role: ClassVar[Role] = Role.LEARNING_RATE
    consumes_updates: ClassVar[bool] = True

    def init(self, params: TensorMap) -> ScheduleState | tuple[()]:
        """Return the state of the schedules; check maps by name."""
        return init_hyperparameters(self, params)

    def update(
        self,
        updates: TensorMap,
        state: ScheduleState | tuple[()],
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, ScheduleState | tuple[()]]:
        """Return -lr * u."""
        now, state = evaluate(self, state, updates)
        return over(updates).mul(negated(now.lr)).to_map(), state

    def readings(self, state: ScheduleState | tuple[()]) -> dict[str, float | Tensor]:
        """Return the rate of the next update; nothing if it differs by name."""
        now, _ = evaluate(self, state, {})
        return {} if isinstance(now.lr, dict) else {"lr": now.lr}


@final
@value_class
class Unscale:
    """Undo loss scaling: u <- u * (1 / scale).

    The reciprocal is taken in float64 and rounded to float32, and multiplied, exactly
    as `GradScaler.unscale_` does it.

    Args:
        scale: What the loss was multiplied by. Finite, > 0.

    State:
        `()`, or a `ScheduleState` if `scale` is a schedule.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `scale` is not positive, not finite, or not 0-dim.
        TypeError: `scale` is no hyperparameter.

    Example:
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> Unscale(4.0).update(params, (), params)[0]
        {'w': tensor([0.2500, 0.5000])}

    Source:
        torch.amp.GradScaler.unscale_; Micikevicius et al. 2018, arXiv:1710.03740,
        section 3.2.
    """

    scale: Hyperparameter = hyperparameter(gt=0.0, per_parameter=False)

    scope: ClassVar[Scope] = Scope.ELEMENTWISE
    role: ClassVar[Role] = Role.UNSCALE
    consumes_updates: ClassVar[bool] = True

    def init(self, params: TensorMap) -> ScheduleState | tuple[()]:
        """Return the state of the schedules; check maps by name."""
        return init_hyperparameters(self, params)

    def update(
        self,
        updates: TensorMap,
        state: ScheduleState | tuple[()],
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, ScheduleState | tuple[()]]:
        """Return u * (1 / scale)."""
        now, state = evaluate(self, state, updates)
        inverse = once(_inverse, now.scale, device_of(updates))
        return over(updates).mul(inverse).to_map(), state


def _inverse(scale: float | Tensor, device: torch.device | None) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float64, device=device)
    return scale.reciprocal().float()

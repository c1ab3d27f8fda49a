"""Schedules in pieces: constant ones, and one schedule after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch

from functional_optim.core._hyperparameters import (
    Schedule,
    checked,
    value_at,
    value_class,
)
from functional_optim.schedules._validation import (
    check_one_more,
    checked_boundaries,
    checked_values,
    count,
    sequence,
)

if TYPE_CHECKING:
    from torch import Tensor


@final
@value_class
class piecewise:
    """Constant pieces: `values[i]` from step `boundaries[i - 1]` on.

    value(t) = values[number of boundaries <= t]

    Args:
        values: The value of each piece. Finite; one more than `boundaries`.
        boundaries: First step of each piece but the first, in updates. Strictly
            increasing, >= 1.

    Raises:
        ValueError: a value is not finite, the boundaries do not increase from 1 on, or
            the lengths do not fit.
        TypeError: a boundary is not an int, a value not a number, or either is no
            sequence.

    Example:
        >>> piecewise((1.0, 0.1, 0.01), boundaries=(30, 60))(30)
        tensor(0.1000, dtype=torch.float64)

    Source:
        torch.optim.lr_scheduler.MultiStepLR, whose gamma gives the values lr, lr *
        gamma, ...; optax.piecewise_constant_schedule, which is given the ratios.
    """

    values: Sequence[float] = checked(check=checked_values)
    boundaries: Sequence[int] = checked(check=checked_boundaries)

    def _check(self) -> None:
        """Refuse lengths that do not fit."""
        check_one_more("values", self.values, self.boundaries)

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        t = count(step)
        value = torch.full_like(t, self.values[0])
        for start, later in zip(self.boundaries, self.values[1:], strict=True):
            value = torch.where(t >= start, later, value)
        return value


def _checked_schedules(name: str, value: Any) -> tuple[Schedule, ...]:
    for index, part in enumerate(sequence(name, value, "schedules")):
        which = f"{name}[{index}] must be a schedule, a function of the step"
        if isinstance(part, type):
            raise TypeError(f"{which}, got a class; write {part.__name__}(...)")
        if not callable(part):
            raise TypeError(
                f"{which}, got {part!r}; write constant({part!r}) for a number"
            )
    return tuple(value)


@final
@value_class
class join:
    """One schedule after another, each from its own step 0.

    value(t) = schedules[i](t - boundaries[i - 1]), i the number of boundaries <= t

    All are evaluated at every step, those to come at their step 0, and one is selected:
    a NaN of one that is over, or to come, goes nowhere.

    Args:
        schedules: Schedules, or functions of a 0-dim tensor. One more than
            `boundaries`.
        boundaries: First step of each schedule but the first, in updates. Strictly
            increasing, >= 1.

    Raises:
        ValueError: the boundaries do not increase from 1 on, or the lengths do not fit.
        TypeError: a boundary is not an int, a schedule not callable, or either is no
            sequence.

    Example:
        >>> from functional_optim.schedules import constant, linear
        >>> join((linear(0.0, 1.0, 4), constant(0.3)), boundaries=(4,))(5)
        tensor(0.3000, dtype=torch.float64)

    Source:
        optax.join_schedules; torch.optim.lr_scheduler.SequentialLR.
    """

    schedules: Sequence[Schedule] = checked(check=_checked_schedules)
    boundaries: Sequence[int] = checked(check=checked_boundaries)

    def _check(self) -> None:
        """Refuse lengths that do not fit."""
        check_one_more("schedules", self.schedules, self.boundaries)

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        t = count(step)
        value: Tensor = value_at(self.schedules[0], t)
        for start, later in zip(self.boundaries, self.schedules[1:], strict=True):
            since = (t - start).clamp(min=0.0)
            value = torch.where(t >= start, value_at(later, since), value)
        return value

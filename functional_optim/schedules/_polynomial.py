"""Straight lines, and their powers."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import TYPE_CHECKING, final

import torch

from functional_optim.core._hyperparameters import value_class
from functional_optim.schedules._validation import (
    between,
    check_numbers,
    check_positive,
    check_steps,
    count,
)

if TYPE_CHECKING:
    from torch import Tensor


@final
@value_class
class constant:
    """The same value at every step.

    Args:
        value: The value. Finite.

    Raises:
        ValueError: `value` is not finite.

    Example:
        >>> constant(0.1)(7)
        tensor(0.1000, dtype=torch.float64)

    Source:
        optax.constant_schedule.
    """

    value: float

    def _check(self) -> None:
        """Refuse values that are not finite."""
        check_numbers(self, "value")

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        return torch.full_like(count(step), self.value)


@final
@value_class
class linear:
    """A straight line from `init_value` to `end_value`, then `end_value`.

    value(t) = init_value + (end_value - init_value) * min(t / num_steps, 1)

    Args:
        init_value: Value at step 0. Finite.
        end_value: Value from step `num_steps` on. Finite.
        num_steps: Length of the line in updates. >= 1.

    Raises:
        ValueError: a value is not finite, or `num_steps` is below 1.
        TypeError: `num_steps` is not an int.

    Example:
        >>> linear(1.0, 0.0, num_steps=4)(1)
        tensor(0.7500, dtype=torch.float64)

    Source:
        optax.linear_schedule.
    """

    init_value: float
    end_value: float
    num_steps: int

    def _check(self) -> None:
        """Refuse values that are not finite and lines without length."""
        check_numbers(self, "init_value", "end_value")
        check_steps("num_steps", self.num_steps, 1)

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        done = (count(step) / self.num_steps).clamp(0.0, 1.0)
        return between(self.init_value, self.end_value, done)


@final
@value_class
class polynomial:
    """A power of what is left, from `init_value` to `end_value`, then `end_value`.

    value(t) = end_value + (init_value - end_value) * (1 - min(t / num_steps, 1)) **
    power

    Args:
        init_value: Value at step 0. Finite.
        end_value: Value from step `num_steps` on. Finite.
        num_steps: Length of the curve in updates. >= 1.
        power: Exponent. Finite, > 0; 1 is a straight line, 2 flattens out at the end.

    Raises:
        ValueError: a value is not finite, `power` is not positive, or `num_steps` is
            below 1.
        TypeError: `num_steps` is not an int.

    Example:
        >>> polynomial(1.0, 0.0, num_steps=4, power=2.0)(2)
        tensor(0.2500, dtype=torch.float64)

    Source:
        optax.polynomial_schedule; with end_value=0 torch.optim.lr_scheduler.
        PolynomialLR.
    """

    init_value: float
    end_value: float
    num_steps: int
    _: KW_ONLY
    power: float = 1.0

    def _check(self) -> None:
        """Refuse values that are not finite and curves without length."""
        check_numbers(self, "init_value", "end_value", "power")
        check_positive(self, "power")
        check_steps("num_steps", self.num_steps, 1)

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        left = 1 - (count(step) / self.num_steps).clamp(0.0, 1.0)
        return between(self.end_value, self.init_value, left**self.power)

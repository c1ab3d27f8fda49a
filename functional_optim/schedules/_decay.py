"""Decay without a last step: exponential, and with the root of the step."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import TYPE_CHECKING, final

import torch

from functional_optim.core._hyperparameters import flag, value_class
from functional_optim.schedules._validation import (
    check_numbers,
    check_positive,
    check_steps,
    count,
)

if TYPE_CHECKING:
    from torch import Tensor


@final
@value_class
class exponential:
    """A constant factor for every `decay_steps` updates.

    value(t) = init_value * decay_rate ** (t / decay_steps), up to `end_value`

    Args:
        init_value: Value at step 0. Finite.
        decay_rate: Factor for `decay_steps` updates. Finite, > 0; above 1 it grows.
        decay_steps: How many updates the factor is for. >= 1.
        staircase: Whether t / decay_steps is rounded down: steps instead of a curve.
        end_value: Bound that the values do not pass; None for none. Finite, on the side
            of `init_value` to which the values go.

    Raises:
        ValueError: a value is not finite, `decay_rate` is not positive, `decay_steps`
            is below 1, or the values move away from `end_value`.
        TypeError: `decay_steps` is not an int, `staircase` not a bool.

    Example:
        >>> exponential(1.0, 0.5, decay_steps=10, staircase=True)(25)
        tensor(0.2500, dtype=torch.float64)

    Source:
        optax.exponential_decay; with decay_steps=1 torch.optim.lr_scheduler.
        ExponentialLR.
    """

    init_value: float
    decay_rate: float
    _: KW_ONLY
    decay_steps: int = 1
    staircase: bool = flag(default=False)
    end_value: float | None = None

    def _check(self) -> None:
        """Refuse values that are not finite, and an end on the wrong side."""
        check_numbers(self, "init_value", "decay_rate")
        check_positive(self, "decay_rate")
        check_steps("decay_steps", self.decay_steps, 1)
        if self.end_value is None:
            return
        check_numbers(self, "end_value")
        way = self.end_value - self.init_value
        if way > 0 if self._falls() else way < 0:
            sign, verb = ("<=", "fall") if self._falls() else (">=", "rise")
            raise ValueError(
                f"end_value must be {sign} init_value = {self.init_value}, from where "
                f"the values {verb} with decay_rate = {self.decay_rate}, got "
                f"{self.end_value}; leave it out for no bound"
            )

    def _falls(self) -> bool:
        """Whether the values never rise."""
        return (self.decay_rate <= 1) == (self.init_value >= 0)

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        exponent = count(step).clamp(min=0.0) / self.decay_steps
        if self.staircase:
            exponent = exponent.floor()
        value = self.init_value * torch.pow(self.decay_rate, exponent)
        if self.end_value is None:
            return value
        # The end lies where the values go: a bound on both sides is one on that side.
        low = min(self.init_value, self.end_value)
        return value.clamp(min=low, max=max(self.init_value, self.end_value))


@final
@value_class
class inverse_sqrt:
    """A straight line from 0 up to `peak_value`, then down with the root of the step.

    value(t) = peak_value * min(t / warmup_steps, sqrt(warmup_steps / t))

    Args:
        peak_value: Value at step `warmup_steps`. Finite.
        warmup_steps: Length of the warm-up in updates, and the unit of the decay: at 4
            times this step the value is half the peak. >= 1.

    Raises:
        ValueError: `peak_value` is not finite, or `warmup_steps` is below 1.
        TypeError: `warmup_steps` is not an int.

    Example:
        >>> inverse_sqrt(1.0, warmup_steps=100)(400)
        tensor(0.5000, dtype=torch.float64)

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, equation 3, whose factor
        d_model ** -0.5 * warmup_steps ** -0.5 is `peak_value` here.
    """

    peak_value: float
    warmup_steps: int

    def _check(self) -> None:
        """Refuse values that are not finite and no warm-up, which has no decay."""
        check_numbers(self, "peak_value")
        check_steps("warmup_steps", self.warmup_steps, 1)

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        t = count(step)
        up = (t / self.warmup_steps).clamp(0.0, 1.0)
        down = torch.sqrt(self.warmup_steps / t.clamp(min=self.warmup_steps))
        return self.peak_value * torch.minimum(up, down)

"""Schedules: pure functions from step count to value.

A schedule stands wherever a hyperparameter does: `adamw(lr=cosine_decay(1e-3, 1000))`.
It is evaluated at the number of updates that the transform holding it has emitted, so
the first update sees `schedule(0)`, and micro-steps and skipped steps do not count.
Arithmetic is 0-dim float64, on the device of the count. Any function of a 0-dim tensor
is a schedule too; these are frozen, equal by value, printable and picklable.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import KW_ONLY
from typing import TYPE_CHECKING, final

import torch

from functional_optim._hyperparameters import value_class

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["constant", "cosine_decay", "linear", "warmup_cosine"]


def _count(step: float | Tensor) -> Tensor:
    """Return the step as a 0-dim float64 tensor."""
    if isinstance(step, torch.Tensor):
        return step.double()  # Stays on its device, whatever torch's default is.
    return torch.tensor(step, dtype=torch.float64)


def _check_numbers(schedule: object, *names: str) -> None:
    for name in names:
        value = getattr(schedule, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            msg = f"{name} must be a number, got {value!r}"
            raise TypeError(msg)
        if not math.isfinite(value):
            msg = f"{name} must be finite, got {value}"
            raise ValueError(msg)


def _check_steps(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        msg = f"{name} must be an int, a number of updates, got {value!r}"
        raise TypeError(msg)
    if value < least:
        msg = f"{name} must be >= {least}, got {value}"
        raise ValueError(msg)


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
        _check_numbers(self, "value")

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        return torch.full_like(_count(step), self.value)


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
        _check_numbers(self, "init_value", "end_value")
        _check_steps("num_steps", self.num_steps, 1)

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        done = (_count(step) / self.num_steps).clamp(0.0, 1.0)
        return self.init_value + (self.end_value - self.init_value) * done


@final
@value_class
class cosine_decay:
    """Half a cosine from `init_value` down to `alpha * init_value`.

    value(t) = init_value * ((1 - alpha) * (1 + cos(pi * min(t / decay_steps, 1))) / 2
    + alpha)

    Args:
        init_value: Value at step 0. Finite.
        decay_steps: Length of the decay in updates. >= 1.
        alpha: Last value as a fraction of the first. Finite.

    Raises:
        ValueError: a value is not finite, or `decay_steps` is below 1.
        TypeError: `decay_steps` is not an int.

    Example:
        >>> cosine_decay(1.0, 10, alpha=0.2)(5)
        tensor(0.6000, dtype=torch.float64)

    Source:
        Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5;
        optax.cosine_decay_schedule.
    """

    init_value: float
    decay_steps: int
    alpha: float = 0.0

    def _check(self) -> None:
        """Refuse values that are not finite and decays without length."""
        _check_numbers(self, "init_value", "alpha")
        _check_steps("decay_steps", self.decay_steps, 1)

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        done = (_count(step) / self.decay_steps).clamp(0.0, 1.0)
        cosine = 0.5 * (1 + torch.cos(math.pi * done))
        return self.init_value * ((1 - self.alpha) * cosine + self.alpha)


@final
@value_class
class warmup_cosine:
    """A straight line up to `peak_value`, then half a cosine down to `end_value`.

    With w = warmup_steps, d = decay_steps: for t < w the line from `init_value` to
    `peak_value`; from w on end_value + (peak_value - end_value) * (1 + cos(pi * min((t
    - w) / (d - w), 1))) / 2.

    Args:
        peak_value: Value at step `warmup_steps`. Finite.
        warmup_steps: Length of the warm-up in updates. >= 0.
        decay_steps: Length of the *whole* schedule in updates, the warm-up included (as
            in optax). > warmup_steps.
        init_value: Value at step 0. Finite.
        end_value: Value from step `decay_steps` on. Finite.

    Raises:
        ValueError: a value is not finite, or the lengths do not fit.
        TypeError: a length is not an int.

    Example:
        >>> warmup_cosine(1.0, warmup_steps=10, decay_steps=110)(5)
        tensor(0.5000, dtype=torch.float64)

    Source:
        optax.warmup_cosine_decay_schedule.
    """

    peak_value: float
    warmup_steps: int
    decay_steps: int
    _: KW_ONLY
    init_value: float = 0.0
    end_value: float = 0.0

    def _check(self) -> None:
        """Refuse values that are not finite and lengths that do not fit."""
        _check_numbers(self, "peak_value", "init_value", "end_value")
        _check_steps("warmup_steps", self.warmup_steps, 0)
        _check_steps("decay_steps", self.decay_steps, 1)
        if self.decay_steps <= self.warmup_steps:
            msg = (
                f"decay_steps must be > warmup_steps = {self.warmup_steps}, which it "
                f"includes, got {self.decay_steps}"
            )
            raise ValueError(msg)

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        t = _count(step)
        up = (t / max(self.warmup_steps, 1)).clamp(0.0, 1.0)
        rising = self.init_value + (self.peak_value - self.init_value) * up
        span = self.decay_steps - self.warmup_steps
        down = ((t - self.warmup_steps) / span).clamp(0.0, 1.0)
        cosine = 0.5 * (1 + torch.cos(math.pi * down))
        falling = self.end_value + (self.peak_value - self.end_value) * cosine
        return torch.where(t < self.warmup_steps, rising, falling)

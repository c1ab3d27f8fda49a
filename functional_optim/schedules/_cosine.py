"""Half cosines, alone and behind a warm-up."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY
from typing import TYPE_CHECKING, final

import torch

from functional_optim._hyperparameters import value_class
from functional_optim.schedules._arguments import check_numbers, check_steps
from functional_optim.schedules._arithmetic import between, count

if TYPE_CHECKING:
    from torch import Tensor


def _half_cosine(done: Tensor) -> Tensor:
    """Return what is left of 1 on the way down to 0, both exact."""
    return 0.5 * (1 + torch.cos(math.pi * done))


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
        check_numbers(self, "init_value", "alpha")
        check_steps("decay_steps", self.decay_steps, 1)

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        done = (count(step) / self.decay_steps).clamp(0.0, 1.0)
        return self.init_value * between(self.alpha, 1.0, _half_cosine(done))


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
        check_numbers(self, "peak_value", "init_value", "end_value")
        check_steps("warmup_steps", self.warmup_steps, 0)
        check_steps("decay_steps", self.decay_steps, 1)
        if self.decay_steps <= self.warmup_steps:
            msg = (
                f"decay_steps must be > warmup_steps = {self.warmup_steps}, which it "
                f"includes, got {self.decay_steps}"
            )
            raise ValueError(msg)

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        t = count(step)
        up = (t / max(self.warmup_steps, 1)).clamp(0.0, 1.0)
        rising = between(self.init_value, self.peak_value, up)
        span = self.decay_steps - self.warmup_steps
        down = ((t - self.warmup_steps) / span).clamp(0.0, 1.0)
        falling = between(self.end_value, self.peak_value, _half_cosine(down))
        return torch.where(t < self.warmup_steps, rising, falling)

"""Half cosines, alone and behind a warm-up."""

from __future__ import annotations

import math
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
            raise ValueError(
                f"decay_steps must be > warmup_steps = {self.warmup_steps}, which it "
                f"includes, got {self.decay_steps}"
            )

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        t = count(step)
        up = (t / max(self.warmup_steps, 1)).clamp(0.0, 1.0)
        rising = between(self.init_value, self.peak_value, up)
        span = self.decay_steps - self.warmup_steps
        down = ((t - self.warmup_steps) / span).clamp(0.0, 1.0)
        falling = between(self.end_value, self.peak_value, _half_cosine(down))
        return torch.where(t < self.warmup_steps, rising, falling)


@final
@value_class
class one_cycle:
    """Half a cosine up to `peak_value`, then half a cosine down to nearly nothing.

    With s = peak_value / div_factor, e = s / final_div_factor, n = num_steps, p =
    pct_start * n - 1, h(x) = (1 + cos(pi * x)) / 2 and t at most n - 1:

    value(t) = peak_value + (s - peak_value) * h(t / p) if t < p, else
    e + (peak_value - e) * h((t - p) / (n - 1 - p))

    Args:
        peak_value: Value at the top, step p. Finite.
        num_steps: Length of the whole schedule in updates; the last value is that of
            step num_steps - 1, as in torch. >= 1.
        pct_start: Part of the steps on the way up. >= 0 and <= 1.
        div_factor: How far below the top it starts. Finite, > 0.
        final_div_factor: How far below the start it ends. Finite, > 0.

    Raises:
        ValueError: a value is not finite or out of range, or `num_steps` is below 1.
        TypeError: `num_steps` is not an int.

    Example:
        >>> one_cycle(1.0, num_steps=10)(2)
        tensor(1., dtype=torch.float64)

    Source:
        Smith & Topin 2018, arXiv:1708.07120; torch.optim.lr_scheduler.OneCycleLR with
        anneal_strategy="cos" and three_phase=False.
    """

    peak_value: float
    num_steps: int
    _: KW_ONLY
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def _check(self) -> None:
        """Refuse values that are not finite or out of range."""
        check_numbers(self, "peak_value", "pct_start", "div_factor", "final_div_factor")
        check_positive(self, "div_factor", "final_div_factor")
        check_steps("num_steps", self.num_steps, 1)
        if not 0 <= self.pct_start <= 1:
            raise ValueError(f"pct_start must be >= 0 and <= 1, got {self.pct_start}")

    def __call__(self, step: float | Tensor) -> Tensor:
        """Return the value at a step, shape (), float64."""
        start = self.peak_value / self.div_factor
        end = start / self.final_div_factor
        last = self.num_steps - 1
        peak = self.pct_start * self.num_steps - 1
        t = count(step).clamp(0.0, last)
        # A phase without length is never on: any number but 0 may divide its steps.
        up = (t / (peak or 1.0)).clamp(0.0, 1.0)
        down = ((t - peak) / ((last - peak) or 1.0)).clamp(0.0, 1.0)
        rising = between(self.peak_value, start, _half_cosine(up))
        falling = between(end, self.peak_value, _half_cosine(down))
        return torch.where(t < peak, rising, falling)

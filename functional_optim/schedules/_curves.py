"""Schedules along one curve: a line, a power, an exponential or a cosine."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY
from typing import final

import torch
from torch import Tensor

from functional_optim.core._hyperparameters import flag
from functional_optim.schedules._arguments import (
    count,
    interpolate,
    num_updates,
    progress,
    real,
    schedule,
)


@final
@schedule
class constant:
    """The same value at every step.

    Args:
        value: The value. Finite.

    Example:
        >>> constant(0.1)(7)
        tensor(0.1000, dtype=torch.float64)

    Source:
        optax.constant_schedule.
    """

    value: float = real()

    def __call__(self, step: float | Tensor) -> Tensor:
        return torch.full_like(count(step), self.value)


@final
@schedule
class linear:
    """A straight line from `init_value` to `end_value`, then `end_value`.

    value(t) = init_value + (end_value - init_value) * min(t / num_steps, 1)

    Args:
        init_value: Value at step 0. Finite.
        end_value: Value from step `num_steps` on. Finite.
        num_steps: Length of the line in updates. >= 1.

    Example:
        >>> linear(1.0, 0.0, num_steps=4)(1)
        tensor(0.7500, dtype=torch.float64)

    Source:
        optax.linear_schedule.
    """

    init_value: float = real()
    end_value: float = real()
    num_steps: int = num_updates(ge=1)

    def __call__(self, step: float | Tensor) -> Tensor:
        done = progress(step, self.num_steps)
        return interpolate(self.init_value, self.end_value, done)


@final
@schedule
class polynomial:
    """A power of what is left, from `init_value` to `end_value`, then `end_value`.

    value(t) = end_value + (init_value - end_value) * (1 - min(t / num_steps, 1)) **
    power

    Args:
        init_value: Value at step 0. Finite.
        end_value: Value from step `num_steps` on. Finite.
        num_steps: Length of the curve in updates. >= 1.
        power: Exponent. Finite, > 0; 1 is a straight line, 2 flattens out at the end.

    Example:
        >>> polynomial(1.0, 0.0, num_steps=4, power=2.0)(2)
        tensor(0.2500, dtype=torch.float64)

    Source:
        optax.polynomial_schedule; with end_value=0 torch.optim.lr_scheduler.
        PolynomialLR.
    """

    init_value: float = real()
    end_value: float = real()
    num_steps: int = num_updates(ge=1)
    _: KW_ONLY
    power: float = real(default=1.0, gt=0)

    def __call__(self, step: float | Tensor) -> Tensor:
        left = 1 - progress(step, self.num_steps)
        return interpolate(self.end_value, self.init_value, left**self.power)


@final
@schedule
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

    Example:
        >>> exponential(1.0, 0.5, decay_steps=10, staircase=True)(25)
        tensor(0.2500, dtype=torch.float64)

    Source:
        optax.exponential_decay; with decay_steps=1 torch.optim.lr_scheduler.
        ExponentialLR.
    """

    init_value: float = real()
    decay_rate: float = real(gt=0)
    _: KW_ONLY
    decay_steps: int = num_updates(default=1, ge=1)
    staircase: bool = flag(default=False)
    end_value: float | None = real(default=None)

    def _check(self) -> None:
        if self.end_value is None:
            return
        falls = (self.decay_rate <= 1) == (self.init_value >= 0)
        sign, verb = ("<=", "fall") if falls else (">=", "rise")
        first, last = self.init_value, self.end_value
        if last > first if falls else last < first:
            raise ValueError(
                f"end_value must be {sign} init_value = {self.init_value}, from where "
                f"the values {verb} with decay_rate = {self.decay_rate}, got "
                f"{self.end_value}; leave it out for no bound"
            )

    def __call__(self, step: float | Tensor) -> Tensor:
        exponent = count(step).clamp(min=0.0) / self.decay_steps
        if self.staircase:
            exponent = exponent.floor()
        value = self.init_value * torch.pow(self.decay_rate, exponent)
        if self.end_value is None:
            return value
        # The values go towards the end: only the bound on that side has an effect.
        low = min(self.init_value, self.end_value)
        return value.clamp(min=low, max=max(self.init_value, self.end_value))


@final
@schedule
class inverse_sqrt:
    """A straight line from 0 up to `peak_value`, then down with the root of the step.

    value(t) = peak_value * min(t / warmup_steps, sqrt(warmup_steps / t))

    Args:
        peak_value: Value at step `warmup_steps`. Finite.
        warmup_steps: Length of the warm-up in updates, and the unit of the decay: at 4
            times this step the value is half the peak. >= 1.

    Example:
        >>> inverse_sqrt(1.0, warmup_steps=100)(400)
        tensor(0.5000, dtype=torch.float64)

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, equation 3, whose factor
        d_model ** -0.5 * warmup_steps ** -0.5 is `peak_value` here.
    """

    peak_value: float = real()
    warmup_steps: int = num_updates(ge=1)

    def __call__(self, step: float | Tensor) -> Tensor:
        t = count(step)
        up = progress(t, self.warmup_steps)
        down = torch.sqrt(self.warmup_steps / t.clamp(min=self.warmup_steps))
        return self.peak_value * torch.minimum(up, down)


@final
@schedule
class cosine_decay:
    """Half a cosine from `init_value` down to `alpha * init_value`.

    value(t) = init_value * ((1 - alpha) * (1 + cos(pi * min(t / decay_steps, 1))) / 2
    + alpha)

    Args:
        init_value: Value at step 0. Finite.
        decay_steps: Length of the decay in updates. >= 1.
        alpha: Last value as a fraction of the first. Finite.

    Example:
        >>> cosine_decay(1.0, 10, alpha=0.2)(5)
        tensor(0.6000, dtype=torch.float64)

    Source:
        Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5;
        optax.cosine_decay_schedule.
    """

    init_value: float = real()
    decay_steps: int = num_updates(ge=1)
    alpha: float = real(default=0.0)

    def __call__(self, step: float | Tensor) -> Tensor:
        left = _half_cosine(progress(step, self.decay_steps))
        return self.init_value * interpolate(self.alpha, 1.0, left)


@final
@schedule
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

    Example:
        >>> warmup_cosine(1.0, warmup_steps=10, decay_steps=110)(5)
        tensor(0.5000, dtype=torch.float64)

    Source:
        optax.warmup_cosine_decay_schedule.
    """

    peak_value: float = real()
    warmup_steps: int = num_updates(ge=0)
    decay_steps: int = num_updates(ge=1)
    _: KW_ONLY
    init_value: float = real(default=0.0)
    end_value: float = real(default=0.0)

    def _check(self) -> None:
        if self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps must be > warmup_steps = {self.warmup_steps}, which it "
                f"includes, got {self.decay_steps}"
            )

    def __call__(self, step: float | Tensor) -> Tensor:
        t = count(step)
        up = progress(t, max(self.warmup_steps, 1))
        rising = interpolate(self.init_value, self.peak_value, up)
        span = self.decay_steps - self.warmup_steps
        left = _half_cosine(progress(t - self.warmup_steps, span))
        falling = interpolate(self.end_value, self.peak_value, left)
        return torch.where(t < self.warmup_steps, rising, falling)


@final
@schedule
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

    Example:
        >>> one_cycle(1.0, num_steps=10)(2)
        tensor(1., dtype=torch.float64)

    Source:
        Smith & Topin 2018, arXiv:1708.07120; torch.optim.lr_scheduler.OneCycleLR with
        anneal_strategy="cos" and three_phase=False.
    """

    peak_value: float = real()
    num_steps: int = num_updates(ge=1)
    _: KW_ONLY
    pct_start: float = real(default=0.3, ge=0, le=1)
    div_factor: float = real(default=25.0, gt=0)
    final_div_factor: float = real(default=1e4, gt=0)

    def __call__(self, step: float | Tensor) -> Tensor:
        start = self.peak_value / self.div_factor
        end = start / self.final_div_factor
        last = self.num_steps - 1
        peak = self.pct_start * self.num_steps - 1
        t = count(step).clamp(0.0, last)
        # A phase without length is never on: any number but 0 may divide its steps.
        up = _half_cosine(progress(t, peak or 1.0))
        down = _half_cosine(progress(t - peak, (last - peak) or 1.0))
        rising = interpolate(self.peak_value, start, up)
        falling = interpolate(end, self.peak_value, down)
        return torch.where(t < peak, rising, falling)


def _half_cosine(done: Tensor) -> Tensor:
    """Return half a cosine: 1 at 0, 0 at 1, both exact."""
    return 0.5 * (1 + torch.cos(math.pi * done))

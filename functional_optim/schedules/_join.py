"""Schedules in pieces: constant ones, and one schedule after another."""

from __future__ import annotations

import functools
from collections.abc import Sequence, Sized
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from functional_optim.core._hyperparameters import Schedule, checked, value_at
from functional_optim.schedules._arguments import (
    check_num_updates,
    check_real,
    count,
    schedule,
)


def _sequence(name: str, value: Any, kind: str, check: Any) -> tuple[Any, ...]:
    """Validate a sequence and each of its entries."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a tuple of {kind}, got {value!r}")
    for index, entry in enumerate(value):
        check(f"{name}[{index}]", entry)
    return tuple(value)


def _check_schedule(name: str, value: Any) -> None:
    if callable(value) and not isinstance(value, type):
        return
    if isinstance(value, type):
        got = f"a class; write {value.__name__}(...)"
    else:
        got = f"{value!r}; write constant({value!r}) for a number"
    raise TypeError(f"{name} must be a schedule, a function of the step, got {got}")


_numbers = functools.partial(_sequence, kind="numbers", check=check_real)
_schedules = functools.partial(_sequence, kind="schedules", check=_check_schedule)
_steps = functools.partial(
    _sequence, kind="ints", check=functools.partial(check_num_updates, ge=1)
)


def _check_boundaries(boundaries: Sequence[int], name: str, parts: Sized) -> None:
    """Validate that boundaries increase, and that one is between any two parts."""
    if any(later <= earlier for earlier, later in pairwise(boundaries)):
        raise ValueError(f"boundaries must be strictly increasing, got {boundaries}")
    if len(parts) != len(boundaries) + 1:
        raise ValueError(
            f"{name} must have one entry more than boundaries, got {len(parts)} "
            f"{name} and {len(boundaries)} boundaries"
        )


@final
@schedule
class piecewise:
    """Constant pieces: `values[i]` from step `boundaries[i - 1]` on.

    value(t) = values[number of boundaries <= t]

    Args:
        values: The value of each piece. Finite; one more than `boundaries`.
        boundaries: First step of each piece but the first, in updates. Strictly
            increasing, >= 1.

    Example:
        >>> piecewise((1.0, 0.1, 0.01), boundaries=(30, 60))(30)
        tensor(0.1000, dtype=torch.float64)

    Source:
        torch.optim.lr_scheduler.MultiStepLR, whose gamma gives the values lr, lr *
        gamma, ...; optax.piecewise_constant_schedule, which is given the ratios.
    """

    values: Sequence[float] = checked(check=_numbers)
    boundaries: Sequence[int] = checked(check=_steps)

    def _check(self) -> None:
        _check_boundaries(self.boundaries, "values", self.values)

    def __call__(self, step: float | Tensor) -> Tensor:
        t = count(step)
        value = torch.full_like(t, self.values[0])
        for start, later in zip(self.boundaries, self.values[1:], strict=True):
            value = torch.where(t >= start, later, value)
        return value


@final
@schedule
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

    Example:
        >>> from functional_optim.schedules import constant, linear
        >>> join((linear(0.0, 1.0, 4), constant(0.3)), boundaries=(4,))(5)
        tensor(0.3000, dtype=torch.float64)

    Source:
        optax.join_schedules; torch.optim.lr_scheduler.SequentialLR.
    """

    schedules: Sequence[Schedule] = checked(check=_schedules)
    boundaries: Sequence[int] = checked(check=_steps)

    def _check(self) -> None:
        _check_boundaries(self.boundaries, "schedules", self.schedules)

    def __call__(self, step: float | Tensor) -> Tensor:
        t = count(step)
        value: Tensor = value_at(self.schedules[0], t)
        for start, later in zip(self.boundaries, self.schedules[1:], strict=True):
            since = (t - start).clamp(min=0.0)
            value = torch.where(t >= start, value_at(later, since), value)
        return value

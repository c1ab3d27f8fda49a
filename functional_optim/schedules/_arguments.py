"""Declare the arguments of schedules, and compute how far a step has come."""

from __future__ import annotations

import functools
import math
import numbers
from dataclasses import MISSING
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from functional_optim.core._hyperparameters import checked, flag, value_class

C = TypeVar("C", bound=type)


def real(
    *,
    default: Any = MISSING,
    gt: float = -math.inf,
    ge: float = -math.inf,
    le: float = math.inf,
) -> Any:
    """Declare a field of a schedule as a finite number; None only as the default."""
    check = functools.partial(check_real, gt=gt, ge=ge, le=le, optional=default is None)
    return checked(check=check, default=default)


def num_updates(*, default: Any = MISSING, ge: int) -> Any:
    """Declare a field of a schedule as a number of updates."""
    check = functools.partial(check_num_updates, ge=ge)
    return checked(check=check, default=default)


@dataclass_transform(
    frozen_default=True,
    eq_default=False,
    field_specifiers=(real, num_updates, checked, flag),
)
def schedule(cls: C) -> C:
    """Make a class a schedule: a value with checked arguments."""
    return value_class(cls)


def check_real(
    name: str,
    value: Any,
    *,
    gt: float = -math.inf,
    ge: float = -math.inf,
    le: float = math.inf,
    optional: bool = False,
) -> Any:
    """Validate a finite number in a range."""
    if value is None and optional:
        return None
    if not _is_a(numbers.Real, value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if not (value > gt and ge <= value <= le):
        bounds = ((">", gt), (">=", ge), ("<=", le))
        legal = [f"{sign} {bound:g}" for sign, bound in bounds if math.isfinite(bound)]
        raise ValueError(f"{name} must be {' and '.join(legal)}, got {value}")
    return value


def check_num_updates(name: str, value: Any, *, ge: int) -> Any:
    """Validate a number of updates."""
    if not _is_a(numbers.Integral, value):
        raise TypeError(f"{name} must be an int, a number of updates, got {value!r}")
    if value < ge:
        raise ValueError(f"{name} must be >= {ge}, got {value}")
    return value


def _is_a(kind: type, value: object) -> bool:
    """Whether a value is a number of a kind; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def count(step: float | Tensor) -> Tensor:
    """Return the step as a 0-dim float64 tensor."""
    if isinstance(step, Tensor):
        return step.double()  # Stays on its device, whatever torch's default is.
    return torch.tensor(step, dtype=torch.float64)


def progress(step: float | Tensor, num_steps: float) -> Tensor:
    """Return the part of some steps that is over, from 0 to 1."""
    return (count(step) / num_steps).clamp(0.0, 1.0)


def interpolate(start: float, end: float, weight: Tensor) -> Tensor:
    """Interpolate linearly: `start` at weight 0, `end` at weight 1, both exact."""
    # start + (end - start) * weight is not: from 1.0 it misses 1e-5 by 5e-12 of it.
    return start * (1 - weight) + end * weight

"""What the arguments of schedules may be."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def check_numbers(schedule: object, *names: str) -> None:
    """Refuse arguments that are not finite numbers."""
    for name in names:
        _check_number(name, getattr(schedule, name))


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_positive(schedule: object, *names: str) -> None:
    """Refuse numbers that are not above 0."""
    for name in names:
        value = getattr(schedule, name)
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


def check_steps(name: str, value: Any, least: int) -> None:
    """Refuse what is no number of updates."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, a number of updates, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def checked_values(name: str, value: Any) -> tuple[float, ...]:
    """Return finite numbers as a tuple."""
    for index, number in enumerate(sequence(name, value, "numbers")):
        _check_number(f"{name}[{index}]", number)
    return tuple(value)


def checked_boundaries(name: str, value: Any) -> tuple[int, ...]:
    """Return strictly increasing steps as a tuple."""
    for index, step in enumerate(sequence(name, value, "ints")):
        check_steps(f"{name}[{index}]", step, 1)
    if any(later <= earlier for earlier, later in pairwise(value)):
        raise ValueError(f"{name} must be strictly increasing, got {tuple(value)}")
    return tuple(value)


def check_one_more(name: str, parts: Sequence[Any], boundaries: Sequence[int]) -> None:
    """Refuse lengths that do not fit: there is a boundary between any two parts."""
    if len(parts) != len(boundaries) + 1:
        raise ValueError(
            f"{name} must have one entry more than boundaries, got {len(parts)} "
            f"{name} and {len(boundaries)} boundaries"
        )


def sequence(name: str, value: Any, of: str) -> Sequence[Any]:
    """Return what is a tuple or a list, or like one."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a tuple of {of}, got {value!r}")
    return value


def count(step: float | Tensor) -> Tensor:
    """Return the step as a 0-dim float64 tensor."""
    if isinstance(step, Tensor):
        return step.double()  # Stays on its device, whatever torch's default is.
    return torch.tensor(step, dtype=torch.float64)


def between(start: float, end: float, done: Tensor) -> Tensor:
    """Return the value a part of the way from start to end.

    Exact at both ends, which start + (end - start) * done is not: 1.0 + (1e-5 - 1.0)
    misses 1e-5 by 5e-12 of it.

    Example:
        >>> between(1.0, 3.0, torch.tensor(0.25))
        tensor(1.5000)
    """
    return start * (1 - done) + end * done

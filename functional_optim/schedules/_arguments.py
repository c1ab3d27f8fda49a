"""What the arguments of schedules may be."""

from __future__ import annotations

import math
import numbers
from typing import Any


def check_numbers(schedule: object, *names: str) -> None:
    """Refuse arguments that are not finite numbers.

    Raises:
        TypeError: one is no number.
        ValueError: one is not finite.
    """
    for name in names:
        value = getattr(schedule, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            msg = f"{name} must be a number, got {value!r}"
            raise TypeError(msg)
        if not math.isfinite(value):
            msg = f"{name} must be finite, got {value}"
            raise ValueError(msg)


def check_steps(name: str, value: Any, least: int) -> None:
    """Refuse what is no number of updates.

    Raises:
        TypeError: it is no int.
        ValueError: it is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        msg = f"{name} must be an int, a number of updates, got {value!r}"
        raise TypeError(msg)
    if value < least:
        msg = f"{name} must be >= {least}, got {value}"
        raise ValueError(msg)

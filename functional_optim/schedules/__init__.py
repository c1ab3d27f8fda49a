"""Schedules: pure functions from step count to value.

A schedule may replace any hyperparameter: `adamw(lr=cosine_decay(1e-3, 1000))`.
It is evaluated at the number of updates that the transform holding it has emitted, so
the first update sees `schedule(0)`, and micro-steps and skipped steps do not count.
Arithmetic and values are 0-dim float64, on the device of the count. Any function of a
0-dim tensor is a schedule too; these are frozen, equal by value, printable and
picklable. Arguments of another type raise TypeError, illegal values ValueError.
"""

from typing import TYPE_CHECKING

from functional_optim._messages import no_attribute
from functional_optim.schedules._curves import (
    constant,
    cosine_decay,
    exponential,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
    warmup_cosine,
)
from functional_optim.schedules._join import join, piecewise

__all__ = [
    "constant",
    "cosine_decay",
    "exponential",
    "inverse_sqrt",
    "join",
    "linear",
    "one_cycle",
    "piecewise",
    "polynomial",
    "warmup_cosine",
]

if not TYPE_CHECKING:  # Or every wrong name would have a type.
    __getattr__ = no_attribute(__name__, __all__)

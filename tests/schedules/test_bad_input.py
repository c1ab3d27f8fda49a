"""What users get wrong about schedules: errors with name, value and legal range."""

from __future__ import annotations

import math
import re

import pytest

from functional_optim import schedules


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("value", lambda x: schedules.constant(x)),
        ("init_value", lambda x: schedules.linear(x, 0.0, 3)),
        ("alpha", lambda x: schedules.cosine_decay(1.0, 3, x)),
        ("peak_value", lambda x: schedules.warmup_cosine(x, 1, 3)),
        ("decay_rate", lambda x: schedules.exponential(1.0, x)),
        ("end_value", lambda x: schedules.exponential(1.0, 0.9, end_value=x)),
        ("power", lambda x: schedules.polynomial(1.0, 0.0, 3, power=x)),
        ("values[1]", lambda x: schedules.piecewise((1.0, x), (3,))),
        ("peak_value", lambda x: schedules.one_cycle(x, 3)),
        ("pct_start", lambda x: schedules.one_cycle(1.0, 3, pct_start=x)),
        ("div_factor", lambda x: schedules.one_cycle(1.0, 3, div_factor=x)),
        ("final_div_factor", lambda x: schedules.one_cycle(1, 3, final_div_factor=x)),
    ],
    ids=map(str, range(12)),
)
def test_values_are_finite_numbers(name: str, make) -> None:
    """A value that is not finite, or no number, is refused by name."""
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=re.escape(f"{name} must be finite, got")):
            make(value)
    for other in ("1", True):
        with pytest.raises(TypeError, match=re.escape(f"{name} must be a number, got")):
            make(other)


@pytest.mark.parametrize(
    ("name", "least", "make"),
    [
        ("num_steps", 1, lambda n: schedules.linear(1.0, 0.0, n)),
        ("decay_steps", 1, lambda n: schedules.cosine_decay(1.0, n)),
        ("warmup_steps", 0, lambda n: schedules.warmup_cosine(1.0, n, 3)),
        ("decay_steps", 1, lambda n: schedules.exponential(1, 0.9, decay_steps=n)),
        ("num_steps", 1, lambda n: schedules.polynomial(1.0, 0.0, n)),
        ("boundaries[0]", 1, lambda n: schedules.piecewise((1.0, 2.0), (n,))),
        ("num_steps", 1, lambda n: schedules.one_cycle(1.0, n)),
        ("warmup_steps", 1, lambda n: schedules.inverse_sqrt(1.0, n)),
    ],
    ids=map(str, range(8)),
)
def test_lengths_are_ints(name: str, least: int, make) -> None:
    """A length that is too short, or no int, is refused by name."""
    legal = re.escape(f"{name} must be >= {least}, got {least - 1}")
    with pytest.raises(ValueError, match=legal):
        make(least - 1)
    for other in (2.0, "2", True, None):
        with pytest.raises(TypeError, match=re.escape(f"{name} must be an int, a num")):
            make(other)


def _nothing(step: object) -> None:
    """Return nothing, as a function of the step must not."""


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: schedules.exponential(1.0, 0.0),
            ValueError,
            "decay_rate must be > 0, got 0.0",
        ),
        (
            lambda: schedules.exponential(1.0, 0.9, end_value=2.0),
            ValueError,
            "end_value must be <= init_value = 1.0, from where the values fall with",
        ),
        (
            lambda: schedules.exponential(1.0, 1.5, end_value=0.5),
            ValueError,
            "rise with decay_rate = 1.5, got 0.5; leave it out for no bound",
        ),
        (
            lambda: schedules.exponential(-1.0, 0.5, end_value=-2.0),
            ValueError,
            "end_value must be >= init_value = -1.0, from where the values rise",
        ),
        (
            lambda: schedules.exponential(1.0, 0.9, staircase=1),
            TypeError,
            "staircase must be True or False, got 1",
        ),
        (
            lambda: schedules.polynomial(1.0, 0.0, 3, power=0),
            ValueError,
            "power must be > 0, got 0",
        ),
        (
            lambda: schedules.piecewise((1.0, 2.0), (3, 4)),
            ValueError,
            "values must have one entry more than boundaries, got 2 values and 2 bound",
        ),
        (
            lambda: schedules.piecewise((1.0, 2.0, 3.0), (4, 4)),
            ValueError,
            "boundaries must be strictly increasing, got (4, 4)",
        ),
        (
            lambda: schedules.piecewise(0.1, ()),
            TypeError,
            "values must be a tuple of numbers, got 0.1",
        ),
        (
            lambda: schedules.piecewise((1.0, 2.0), 3),
            TypeError,
            "boundaries must be a tuple of ints, got 3",
        ),
        (
            lambda: schedules.one_cycle(1.0, 9, pct_start=1.5),
            ValueError,
            "pct_start must be >= 0 and <= 1, got 1.5",
        ),
        (
            lambda: schedules.one_cycle(1.0, 9, div_factor=0),
            ValueError,
            "div_factor must be > 0, got 0",
        ),
        (
            lambda: schedules.one_cycle(1.0, 9, final_div_factor=-1),
            ValueError,
            "final_div_factor must be > 0, got -1",
        ),
        (
            lambda: schedules.join((), ()),
            ValueError,
            "schedules must have one entry more than boundaries, got 0 schedules and 0",
        ),
        (
            lambda: schedules.join([schedules.constant(1.0)] * 3, (5, 3)),
            ValueError,
            "boundaries must be strictly increasing, got (5, 3)",
        ),
        (
            lambda: schedules.join(schedules.constant(1.0), ()),
            TypeError,
            "schedules must be a tuple of schedules, got constant(1.0)",
        ),
        (
            lambda: schedules.join((schedules.constant,), ()),
            TypeError,
            "schedules[0] must be a schedule, a function of the step, got a class; wri",
        ),
        (
            lambda: schedules.join((0.1,), ()),
            TypeError,
            "of the step, got 0.1; write constant(0.1) for a number",
        ),
        (
            lambda: schedules.join((_nothing,), ())(0),
            TypeError,
            "must return a number or a 0-dim tensor, got None",
        ),
    ],
)
def test_illegal_arguments(make, error, message: str) -> None:
    """What is out of range is refused with its value, the legal range and a remedy."""
    with pytest.raises(error, match=re.escape(message)):
        make()

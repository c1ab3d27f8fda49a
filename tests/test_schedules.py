"""Schedules by hand: values at the ends and in between, and when they are evaluated."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import functional_optim as fo
from functional_optim import schedules


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (schedules.constant(0.3), {0: 0.3, 10**6: 0.3}),
        (schedules.linear(1.0, 0.2, 4), {0: 1.0, 1: 0.8, 4: 0.2, 99: 0.2}),
        (schedules.cosine_decay(2.0, 4), {0: 2.0, 2: 1.0, 4: 0.0, 99: 0.0}),
        (schedules.cosine_decay(2.0, 4, alpha=0.5), {0: 2.0, 2: 1.5, 4: 1.0, 9: 1.0}),
        (
            schedules.warmup_cosine(1.0, 2, 6, init_value=0.5, end_value=0.1),
            {0: 0.5, 1: 0.75, 2: 1.0, 4: 0.55, 6: 0.1, 99: 0.1},
        ),
        (schedules.warmup_cosine(1.0, 0, 2), {0: 1.0, 1: 0.5, 2: 0.0}),
        (
            schedules.warmup_cosine(1.0, 1, 4),
            {3: 0.5 * (1 + math.cos(math.pi * 2 / 3))},
        ),
    ],
    ids=repr,
)
def test_values(schedule, values: dict[int, float]) -> None:
    """Values are the formula's, in float64, for numbers and tensors alike."""
    for step, value in values.items():
        # A handful of float64 operations.
        assert schedule(step).item() == pytest.approx(value, rel=1e-14, abs=1e-15)
        as_tensor = schedule(torch.tensor(float(step), dtype=torch.float64))
        assert torch.equal(as_tensor, schedule(step))
        assert as_tensor.dtype is torch.float64
        assert as_tensor.shape == ()


@pytest.mark.parametrize(
    ("schedule", "last", "ends"),
    [
        (schedules.linear(1.0, 1e-5, 7), 7, (1.0, 1e-5)),
        (schedules.cosine_decay(0.7, 3, alpha=1e-5), 3, (0.7, 0.7 * 1e-5)),
        (
            schedules.warmup_cosine(0.9, 3, 7, init_value=1e-5, end_value=1e-7),
            7,
            (1e-5, 1e-7),
        ),
    ],
    ids=repr,
)
def test_ends_are_exact(schedule, last: int, ends: tuple[float, float]) -> None:
    """The first and the last value are the numbers that were given, and stay."""
    assert schedule(0).item() == ends[0]
    assert schedule(last).item() == ends[1]
    assert schedule(10**9).item() == ends[1]


def test_are_values() -> None:
    """Schedules are equal by value, hashable, picklable, and print as written."""
    schedule = schedules.warmup_cosine(1.0, 2, 6, end_value=0.1)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(schedule) == hash(schedules.warmup_cosine(1.0, 2, 6, end_value=0.1))
    assert schedule != schedules.warmup_cosine(1.0, 2, 7, end_value=0.1)
    assert repr(schedule) == "warmup_cosine(1.0, 2, 6, end_value=0.1)"


def test_first_update_sees_step_zero_and_held_steps_do_not_count() -> None:
    """The clock of a schedule is the number of emitted updates."""
    params = {"w": torch.zeros(1, dtype=torch.float64)}
    ones = {"w": torch.ones(1, dtype=torch.float64)}
    seen = schedules.linear(0.0, 100.0, 100)
    pipeline = fo.chain(fo.Accumulate(2), fo.ScaleByLearningRate(seen))
    state = pipeline.init(params)
    emitted = []
    for _ in range(6):
        updates, state = pipeline.update(ones, state, params)
        if updates:
            emitted.append(-updates["w"].item())
    assert emitted == [0.0, 1.0, 2.0]


def test_skipped_steps_do_not_count() -> None:
    """A schedule stands still over a skipped step."""
    params = {"w": torch.zeros(1)}
    good, bad = {"w": torch.ones(1)}, {"w": torch.full((1,), math.nan)}
    guarded = fo.SkipNonfinite(
        fo.chain(fo.ScaleByLearningRate(schedules.linear(0.0, 10.0, 10)))
    )
    state = guarded.init(params)
    emitted = []
    for step in (good, bad, bad, good):
        updates, state = guarded.update(step, state, params)
        emitted.append(-updates["w"].item())
    assert emitted == [0.0, 0.0, 0.0, 1.0]
    assert state.skipped == 2
    assert state.consecutive == 0


def test_a_missing_gradient_does_not_delay_the_schedule() -> None:
    """The count is the transform's: all parameters are at the same learning rate."""
    params = {"a": torch.zeros(1), "b": torch.zeros(1)}
    pipeline = fo.chain(fo.ScaleByLearningRate(schedules.linear(0.0, 10.0, 10)))
    state = pipeline.init(params)
    for _ in range(3):
        _, state = pipeline.update({"a": torch.ones(1)}, state, params)
    updates, _ = pipeline.update({"b": torch.ones(1)}, state, params)
    assert updates["b"].item() == -3.0


def test_a_users_function_may_return_a_number() -> None:
    """Any function of the step is a schedule."""
    params = {"w": torch.ones(1)}
    scale = fo.Scale(lambda step: 3.0)
    out, _ = scale.update(params, scale.init(params), params)
    assert out["w"].item() == 3.0

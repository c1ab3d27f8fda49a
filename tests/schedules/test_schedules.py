"""Schedules by hand: values at the ends and in between, and when they are evaluated."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from transform_cases import halving

import functional_optim as fo
from functional_optim import schedules


def constant(step: torch.Tensor) -> float:
    """Return a number: a user's function that is not of ours."""
    return 7.0


def not_a_number_outside(step: torch.Tensor) -> torch.Tensor:
    """Return 1 at steps 0 to 2, and NaN elsewhere."""
    return torch.where((step >= 0) & (step <= 2), 1.0, math.nan)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (schedules.constant(0.3), {0: 0.3, 10**6: 0.3}),
        (schedules.linear(1.0, 0.2, 4), {0: 1.0, 1: 0.8, 4: 0.2, 99: 0.2}),
        (schedules.cosine_decay(2.0, 4), {0: 2.0, 2: 1.0, 4: 0.0, 99: 0.0}),
        # cos(pi / 3) = 1 / 2: a straight line would be elsewhere.
        (schedules.cosine_decay(2.0, 3), {1: 1.5, 2: 0.5}),
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
        (schedules.exponential(2.0, 0.5), {0: 2.0, 1: 1.0, 3: 0.25}),
        (schedules.exponential(2.0, 0.25, decay_steps=2), {1: 1.0, 2: 0.5}),
        (
            schedules.exponential(2.0, 0.5, decay_steps=10, staircase=True),
            {0: 2.0, 9: 2.0, 10: 1.0, 29: 0.5},
        ),
        (schedules.exponential(2.0, 0.5, end_value=0.4), {2: 0.5, 3: 0.4, 99: 0.4}),
        (schedules.exponential(1.0, 2.0, end_value=3.0), {1: 2.0, 2: 3.0, 9999: 3.0}),
        (schedules.exponential(-1.0, 0.5, end_value=-0.4), {1: -0.5, 2: -0.4}),
        (schedules.polynomial(1.0, 0.2, 4), {0: 1.0, 1: 0.8, 4: 0.2, 99: 0.2}),
        (schedules.polynomial(1.0, 0.2, 4, power=2), {2: 0.4, 4: 0.2, 99: 0.2}),
        (schedules.polynomial(1.0, 0.0, 4, power=0.5), {3: 0.5, 4: 0.0}),
        (schedules.piecewise((0.3,), ()), {0: 0.3, 9: 0.3}),
        (
            schedules.piecewise((1.0, 0.1, 0.5), (2, 3)),
            {0: 1.0, 1: 1.0, 2: 0.1, 3: 0.5, 99: 0.5},
        ),
        (
            schedules.one_cycle(1.0, 10, div_factor=4, final_div_factor=5),
            {0: 0.25, 1: 0.625, 2: 1.0, 9: 0.05, 10: 0.05, 99: 0.05},
        ),
        # No way up, no way down, and nothing but a top.
        (schedules.one_cycle(1.0, 10, pct_start=0.1), {0: 1.0, 9: 4e-6}),
        (schedules.one_cycle(1.0, 10, pct_start=1.0), {0: 0.04, 9: 1.0, 99: 1.0}),
        (schedules.one_cycle(1.0, 1, pct_start=1.0), {0: 1.0, 1: 1.0}),
        (
            schedules.inverse_sqrt(2.0, 4),
            {0: 0.0, 1: 0.5, 4: 2.0, 16: 1.0, 64: 0.5},
        ),
        (schedules.inverse_sqrt(2.0, 1), {0: 0.0, 1: 2.0, 4: 1.0}),
        (schedules.join((halving,), ()), {0: 1.0, 2: 0.25}),
        (
            schedules.join((schedules.linear(0.0, 1.0, 2), halving, constant), (2, 4)),
            {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.5, 4: 7.0, 9: 7.0},
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
        (schedules.polynomial(0.9, 1e-5, 7, power=3), 7, (0.9, 1e-5)),
        (
            schedules.one_cycle(0.7, 9, pct_start=0.4),
            8,
            (0.7 / 25, 0.7 / 25 / 1e4),
        ),
        (schedules.piecewise((0.1, 0.7), (3,)), 3, (0.1, 0.7)),
    ],
    ids=repr,
)
def test_ends_are_exact(schedule, last: int, ends: tuple[float, float]) -> None:
    """The first and the last value are the numbers that were given, and stay."""
    assert schedule(0).item() == ends[0]
    assert schedule(last).item() == ends[1]
    assert schedule(10**9).item() == ends[1]


EVERY = [
    schedules.constant(0.1),
    schedules.linear(0.1, 0.3, 4),
    schedules.cosine_decay(0.1, 4, 0.1),
    schedules.warmup_cosine(0.1, 2, 5),
    schedules.exponential(0.1, 0.9, decay_steps=2, staircase=True, end_value=0.08),
    schedules.polynomial(0.1, 0.3, 4, power=0.5),
    schedules.piecewise((0.1, 0.2, 0.3), (2, 4)),
    schedules.one_cycle(0.1, 6),
    schedules.inverse_sqrt(0.1, 3),
    schedules.join((schedules.linear(0.1, 0.2, 3), halving), (3,)),
]


def test_every_schedule_is_in_the_table() -> None:
    """A public schedule that the tests below do not look at is a failure."""
    assert sorted(type(s).__name__ for s in EVERY) == schedules.__all__


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_run_inside_vmap_and_compile(schedule) -> None:
    """A batch of steps gives the values of each; one graph serves all steps."""
    steps = torch.arange(8, dtype=torch.float64)
    alone = torch.stack([schedule(step) for step in steps])
    # The same operations, but pow and cos of a vector may be off by an ulp.
    batched = torch.func.vmap(schedule)(steps)
    assert torch.allclose(batched, alone, rtol=1e-15, atol=0.0)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda step: schedule(step), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(torch.stack([compiled(step) for step in steps]), alone)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert schedule(steps[0].to("meta")).is_meta


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_are_equal_by_value(schedule) -> None:
    """Every schedule equals its pickled copy, and has its hash and its repr."""
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    names = vars(schedules) | {"halving": halving}
    assert eval(repr(schedule), names) == schedule


def test_lists_become_tuples() -> None:
    """Changing a list that was passed to a constructor changes no schedule."""
    values, boundaries = [0.1, 0.2], [3]
    schedule = schedules.piecewise(values, boundaries)
    values[0], boundaries[0] = 9.0, 9
    assert schedule == schedules.piecewise((0.1, 0.2), (3,))
    assert repr(schedule) == "piecewise((0.1, 0.2), (3,))"


def test_join_selects_and_does_not_mix() -> None:
    """A NaN of a schedule that is over, or that has not begun, goes nowhere."""
    schedule = schedules.join([not_a_number_outside] * 3, (3, 6))
    values = [schedule(step).item() for step in range(9)]
    assert values == [1.0] * 9
    assert math.isnan(schedule(9))


def test_join_asks_no_schedule_before_its_first_step() -> None:
    """A schedule to come is evaluated at its step 0, where it is sure to be defined."""
    seen = []

    def noting(step: torch.Tensor) -> torch.Tensor:
        seen.append(step.item())
        return step

    joined = schedules.join((schedules.constant(1.0), noting), (2,))
    assert [joined(t).item() for t in range(5)] == [1.0, 1.0, 0.0, 1.0, 2.0]
    assert seen == [0.0, 0.0, 0.0, 1.0, 2.0]


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


def test_second_bounded_exponential_compiles() -> None:
    """Another decay rate makes it a symbol of the compiler; nothing branches on it."""
    params = {"w": torch.ones(3)}
    torch.compiler.reset()
    for rate in (0.5, 0.25):
        pipeline = fo.sgd(schedules.exponential(1.0, rate, end_value=0.1))
        state = pipeline.init(params)
        update = torch.compile(pipeline.update, fullgraph=True, backend="eager")
        for _ in range(4):
            _, state = update(params, state, params)

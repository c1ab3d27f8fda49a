"""Schedules against the schedulers of torch.optim, step by step, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from functional_optim import schedules

rates = st.floats(1e-3, 10.0)
steps = st.integers(1, 40)


def agree(
    schedule: Callable[[float], torch.Tensor],
    scheduler: Callable[[torch.optim.Optimizer], Any],
    lr: float,
    count: int,
    rtol: float = 1e-12,
    atol: float = 0.0,
) -> None:
    """Assert that a schedule gives what a scheduler sets, at every step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = scheduler(optimizer)
    for step in range(count):
        ours, expected = schedule(step).item(), theirs.get_last_lr()[0]
        assert abs(ours - expected) <= rtol * abs(expected) + atol, (step, ours)
        optimizer.step()
        if step + 1 < count:
            theirs.step()


@given(lr=rates, gamma=st.floats(0.5, 1.2))
def test_exponential(lr: float, gamma: float) -> None:
    """Exponential is ExponentialLR."""
    # 40 roundings of products there, one power here.
    agree(
        schedules.exponential(lr, gamma),
        lambda o: lr_scheduler.ExponentialLR(o, gamma),
        lr,
        40,
    )


@given(lr=rates, size=steps, gamma=st.floats(0.1, 1.0))
def test_staircase(lr: float, size: int, gamma: float) -> None:
    """Exponential with a staircase is StepLR."""
    agree(
        schedules.exponential(lr, gamma, decay_steps=size, staircase=True),
        lambda o: lr_scheduler.StepLR(o, size, gamma),
        lr,
        60,
    )


@given(lr=rates, total=steps, power=st.sampled_from([1.0, 2.0, 0.5, 3.7]))
def test_polynomial(lr: float, total: int, power: float) -> None:
    """Polynomial down to 0 is PolynomialLR."""
    # 1 - t / n loses n eps, in each of n factors there.
    agree(
        schedules.polynomial(lr, 0.0, total, power=power),
        lambda o: lr_scheduler.PolynomialLR(o, total, power),
        lr,
        total + 5,
    )


@given(
    lr=rates,
    milestones=st.sets(steps, max_size=5).map(sorted),
    gamma=st.floats(0.1, 2.0),
)
def test_piecewise(lr: float, milestones: list[int], gamma: float) -> None:
    """Piecewise with the products is MultiStepLR."""
    values = [lr * gamma**i for i in range(len(milestones) + 1)]
    agree(
        schedules.piecewise(values, milestones),
        lambda o: lr_scheduler.MultiStepLR(o, milestones, gamma),
        lr,
        45,
    )


@given(
    lr=rates,
    total=st.integers(2, 40),
    pct_start=st.floats(0.0, 1.0),
    div_factor=st.floats(1.0, 100.0),
    final_div_factor=st.floats(1.0, 1e6),
)
@example(lr=1.0, total=10, pct_start=0.3, div_factor=25.0, final_div_factor=1e4)
@example(lr=1.0, total=10, pct_start=0.0, div_factor=25.0, final_div_factor=1e4)
@example(lr=1.0, total=10, pct_start=1.0, div_factor=25.0, final_div_factor=1e4)
def test_one_cycle(
    lr: float, total: int, pct_start: float, div_factor: float, final_div_factor: float
) -> None:
    """One cycle is OneCycleLR, at every step that it has."""
    if abs(pct_start * total - 1) < 1e-3:
        return  # torch divides by the length of the way up, 0.
    agree(
        schedules.one_cycle(
            lr,
            total,
            pct_start=pct_start,
            div_factor=div_factor,
            final_div_factor=final_div_factor,
        ),
        lambda o: lr_scheduler.OneCycleLR(
            o,
            lr,
            total,
            pct_start=pct_start,
            cycle_momentum=False,
            div_factor=div_factor,
            final_div_factor=final_div_factor,
        ),
        lr,
        total,
        # 1 + cos is a rounding of 1 there and here, even where the sum is near 0.
        atol=1e-15 * lr,
    )


@given(lr=rates, total=steps)
def test_cosine_decay(lr: float, total: int) -> None:
    """Cosine decay is CosineAnnealingLR up to its last step."""
    agree(
        schedules.cosine_decay(lr, total),
        lambda o: lr_scheduler.CosineAnnealingLR(o, total),
        lr,
        total + 1,
        # torch's recursion divides by 1 + cos, which is down to (pi / n)^2 / 2.
        atol=1e-12 * lr,
    )


@given(lr=rates, first=steps, second=steps, gamma=st.floats(0.5, 1.0))
def test_join(lr: float, first: int, second: int, gamma: float) -> None:
    """Join is SequentialLR."""
    agree(
        schedules.join(
            (
                schedules.linear(lr / 4, lr, first),
                schedules.exponential(lr, gamma),
                schedules.polynomial(lr, 0.0, 9),
            ),
            (first, first + second),
        ),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, 0.25, 1.0, first),
                lr_scheduler.ExponentialLR(o, gamma),
                lr_scheduler.PolynomialLR(o, 9),
            ],
            [first, first + second],
        ),
        lr,
        first + second + 12,
    )

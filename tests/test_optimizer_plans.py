"""Plans made anew: parameters that come together do not take steps of each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

import functional_optim as fo
from functional_optim.execution import _plan

SIZES = [10, 100]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 elements are pooled, 100 are cut into slices."""
    monkeypatch.setitem(_plan.UNIT_BYTES, "cpu", 200)


def _two(size: int) -> tuple[Parameter, Parameter]:
    return Parameter(torch.ones(size)), Parameter(torch.ones(size))


@pytest.mark.parametrize("size", SIZES)
def test_a_written_count_brings_nobody_into_a_step_without_gradient(size: int) -> None:
    a, b = _two(size)
    optimizer = fo.TransformOptimizer([a, b], fo.adam(0.1))
    a.grad = torch.ones(size)
    optimizer.step()
    # A fresh one with this state has forgotten who parted, not what they counted.
    fresh = fo.TransformOptimizer([a, b], fo.adam(0.1))
    fresh.load_state_dict(optimizer.state_dict())
    fresh.step()
    fresh.state[a]["step"].fill_(0.0)  # Now both counts are equal.
    fresh.step()
    assert fresh.state[a]["step"].item() == 1.0
    assert fresh.state[b]["step"].item() == 0.0
    assert torch.equal(b, torch.ones(size))
    b.grad = torch.ones(size)
    fresh.step()
    assert torch.allclose(b, torch.full((size,), 0.9))


@pytest.mark.parametrize("size", SIZES)
def test_calm_steps_bring_nobody_into_a_step_without_gradient(size: int) -> None:
    a, b = _two(size)
    chain = fo.chain(fo.SkipNonfinite(fo.adam(0.1)))
    optimizer = fo.TransformOptimizer([a, b], chain)
    a.grad = torch.full((size,), math.nan)
    for _ in range(103):  # Skipped: the counts of both stay at 0.
        optimizer.step()
    a.grad = torch.ones(size)
    for _ in range(4):
        optimizer.step()
    assert optimizer.state[a]["step"].item() == 4.0
    assert optimizer.state[b]["step"].item() == 0.0
    assert torch.equal(b, torch.ones(size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dampening", [0.0, 0.1])
def test_a_parameter_may_be_unused_for_ever(size: int, dampening: float) -> None:
    a, b = _two(size)
    twin = Parameter(torch.ones(size))
    sgd = fo.sgd(0.1, momentum=0.9, dampening=dampening)
    optimizer = fo.TransformOptimizer([a, b], sgd)
    reference = torch.optim.SGD([twin], 0.1, momentum=0.9, dampening=dampening)
    a.grad = twin.grad = torch.full((size,), 1e-3)
    for _ in range(250):
        optimizer.step()
        reference.step()
    assert torch.equal(b, torch.ones(size))
    assert torch.allclose(a, twin)


def test_an_unused_parameter_costs_no_plan_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = _two(10)
    optimizer = fo.TransformOptimizer([a, b], fo.sgd(0.1, momentum=0.9))
    a.grad = torch.ones(10)
    for _ in range(110):
        optimizer.step()
    plans: list[int] = []
    buckets = _plan.Layout.buckets

    def counted(self: _plan.Layout) -> list[_plan.Bucket]:
        plans.append(1)
        return buckets(self)

    monkeypatch.setattr(_plan.Layout, "buckets", counted)
    for _ in range(210):
        optimizer.step()
    assert not plans


@pytest.mark.parametrize("size", SIZES)
def test_a_state_may_be_loaded_in_inference_mode(size: int) -> None:
    a, b = _two(size)
    optimizer = fo.TransformOptimizer([a, b], fo.adam(0.1))
    a.grad = b.grad = torch.ones(size)
    optimizer.step()
    with torch.inference_mode():
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[a]["step"].item() == 2.0

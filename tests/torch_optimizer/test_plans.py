"""Plans made anew: parameters that come together do not take steps of each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

import functional_optim as fo
from functional_optim.execution import _plan, _units

SIZES = [10, 100]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 elements are pooled, 100 are cut into slices."""
    monkeypatch.setitem(_units.UNIT_BYTES, "cpu", 200)


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
    buckets = _plan.BucketBuilder.buckets

    def counted(self: _plan.BucketBuilder) -> list[_plan.Bucket]:
        plans.append(1)
        return buckets(self)

    monkeypatch.setattr(_plan.BucketBuilder, "buckets", counted)
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


def test_pools_that_share_memory_gather_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the pass for a norm and the update others have gathered there."""
    monkeypatch.setattr(_units, "SCRATCH_BYTES", 0)
    params = [Parameter(torch.full((4,), float(i + 1))) for i in range(30)]
    twins = [Parameter(p.detach().clone()) for p in params]
    for index, (a, b) in enumerate(zip(params, twins, strict=True)):
        a.grad = torch.full((4,), index / 10.0)
        b.grad = a.grad.clone()
    chain = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.1))
    fo.TransformOptimizer(params, chain).step()
    torch.nn.utils.clip_grad_norm_(twins, 1.0)
    torch.optim.SGD(twins, 0.1).step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b)


def test_state_is_cut_as_its_parameter_lies() -> None:
    """A parameter that became channels_last, with moments that are contiguous."""
    a = Parameter(torch.linspace(-1.0, 1.0, 240).view(2, 3, 5, 8))
    b = Parameter(a.detach().clone())
    optimizer = fo.TransformOptimizer([a], fo.adam(0.1))
    reference = torch.optim.Adam([b], 0.1)
    grad = torch.linspace(1.0, 3.0, 240).view(2, 3, 5, 8).sin()
    for step in range(4):
        if step == 2:
            a.data = a.data.to(memory_format=torch.channels_last)
        a.grad, b.grad = grad * (step + 1), grad * (step + 1)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(a, b)


class _Counted:
    """Divides by the largest count of the names in one call: by its own, alone."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params: fo.TensorMap) -> tuple[fo.TensorMap]:
        return ({name: torch.zeros(()) for name in params},)

    def update(
        self,
        updates: fo.TensorMap,
        state: tuple[fo.TensorMap],
        params: fo.TensorMap,
        *,
        context: fo.Context,
    ) -> tuple[fo.TensorMap, tuple[fo.TensorMap]]:
        counts = {**state[0], **{name: state[0][name] + 1 for name in updates}}
        divided = {name: u / counts[name].max() for name, u in updates.items()}
        return divided, (counts,)


def test_a_number_of_a_number_is_not_a_tensor_like_it() -> None:
    """Counts of 0-dim parameters stay numbers of one parameter each."""
    a, b = Parameter(torch.tensor(1.0)), Parameter(torch.tensor(1.0))
    chain = fo.chain(_Counted(), fo.ScaleByLearningRate(1.0))
    optimizer = fo.TransformOptimizer([a, b], chain)
    a.grad = torch.tensor(1.0)
    optimizer.step()
    # A fresh one does not know who took which step; only the counts tell.
    fresh = fo.TransformOptimizer([a, b], chain)
    fresh.load_state_dict(optimizer.state_dict())
    b.grad = torch.tensor(1.0)
    fresh.step()
    assert a.item() == 1.0 - 1.0 - 0.5
    assert b.item() == 0.0


@pytest.mark.parametrize(
    "trace",
    [
        fo.Trace({"a": 0.0, "b": 0.9}),
        fo.Trace(0.9, dampening={"a": 0.0, "b": 0.5}),
    ],
    ids=repr,
)
def test_a_zero_in_a_map_is_no_plain_zero(trace: fo.Trace) -> None:
    """For a plain 0 the buffer waits; a map is none, whatever its numbers are."""
    params = {name: torch.ones(2, dtype=torch.float64) for name in ("a", "b")}
    own = [(name, Parameter(p.clone())) for name, p in params.items()]
    optimizer = fo.TransformOptimizer(own, trace)
    state = fo.chain(trace).init(params)
    for step in range(3):
        grads = {name: torch.full_like(p, 1.0 + step) for name, p in params.items()}
        moved, state = fo.chain(trace).update(grads, state, params)
        params = fo.apply_updates(params, moved)
        for name, p in own:
            p.grad = grads[name]
        optimizer.step()
        for name, p in own:
            assert torch.equal(p, params[name])
            shown = optimizer.state[p]["momentum_buffer"]
            assert torch.equal(shown, state[0].momentum_buffer[name])

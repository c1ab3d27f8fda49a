"""`check_equivalent`: pipelines against plain loops, and where they part."""

from __future__ import annotations

import re

import pytest
import torch

import functional_optim as fo
from functional_optim.testing import (
    Example,
    NotEquivalentError,
    backward,
    check_equivalent,
    strategies,
)

PIPELINE = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(1e-2))


def plain(model, gradients):
    """Clip and step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    for step in gradients:
        optimizer.zero_grad()
        backward(model, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield


def clip_only(model, gradients):
    """Clip, and subtract as `ScaleByLearningRate(0.5)` does: exactly."""
    for step in gradients:
        model.zero_grad()
        backward(model, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for p in model.parameters():
            if p.grad is not None:
                p.data = p.data + -0.5 * p.grad
        yield


def windows(model, gradients):
    """Sum two backwards in .grad, and close a short last window."""
    inside = 0
    for index, step in enumerate(gradients):
        backward(model, step)
        inside += 1
        if inside == 2 or index == len(gradients) - 1:
            for p in model.parameters():
                if p.grad is not None:
                    p.data = p.data + -0.5 * (p.grad / inside)
            model.zero_grad()
            inside = 0
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bit_for_bit(dtype: torch.dtype) -> None:
    """Clipping and accumulation agree in every bit, NaN and infinity included."""
    halved = fo.ScaleByLearningRate(0.5)
    clipped = fo.chain(fo.ClipByGlobalNorm(1.0), halved)
    check_equivalent(clipped, clip_only, dtype=dtype, elements=strategies.hostile)
    window = fo.chain(fo.Accumulate(2), halved)
    check_equivalent(window, windows, dtype=dtype, last=True)


def test_within_ulps() -> None:
    """AdamW agrees to a few ulp over four steps, and not to none."""
    check_equivalent(PIPELINE, plain, dtype=torch.float64, max_ulps=16)
    with pytest.raises(NotEquivalentError) as found:
        check_equivalent(PIPELINE, plain, dtype=torch.float64)
    assert 0 < found.value.ulps < 16


def test_finds_the_first_step() -> None:
    """A forgotten division shows where the first window closes, and not before."""
    sums = fo.chain(fo.Accumulate(2, mean=False), fo.ScaleByLearningRate(0.5))
    with pytest.raises(NotEquivalentError) as found:
        check_equivalent(sums, windows, last=True, params={"w": torch.zeros(3)})
    error = found.value
    assert (error.step, error.name, len(error.index)) == (1, "w", 1)
    assert len(error.example.updates) == 2
    text = str(error)
    assert "they part first after step 1" in text
    assert re.search(
        r"element \(\d,\) of 'w' is .* in the pipeline and .* in the", text
    )
    assert "check_equivalent(transform, windows, example=example)" in text
    with pytest.raises(NotEquivalentError, match="they part first after step 1"):
        check_equivalent(sums, windows, example=error.example)


def test_without_yield_the_end_is_compared() -> None:
    """A loop that does not yield is compared where it ends."""

    def to_the_end(model, gradients) -> None:
        for _ in clip_only(model, gradients):
            pass

    check_equivalent(fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.5)), to_the_end)
    with pytest.raises(NotEquivalentError, match="they part at the end") as found:
        check_equivalent(fo.sgd(0.5), to_the_end)
    assert found.value.step is None


def test_signed_zero_is_a_difference() -> None:
    """Bit for bit tells -0.0 from 0.0."""

    def loses_the_sign(model, gradients):
        for _ in gradients:
            for p in model.parameters():
                p.data = p.data + 0.0
            yield

    example = Example({"w": torch.tensor([-0.0])}, [{"w": torch.tensor([1.0])}])
    check_equivalent(fo.SetToZero(), lambda model, steps: None, example=example)
    with pytest.raises(NotEquivalentError, match=r"is -0.0 in the pipeline and 0.0"):
        check_equivalent(fo.SetToZero(), loses_the_sign, example=example)


def test_bad_input() -> None:
    """Wrong arguments, and loops that yield now and then, are explained."""
    with pytest.raises(ValueError, match="max_ulps must be >= 0, got -1"):
        check_equivalent(PIPELINE, plain, max_ulps=-1)
    with pytest.raises(TypeError, match="transform must be a transform"):
        check_equivalent(plain, plain)
    with pytest.raises(ValueError, match=r"model has no parameters \['x'\], only"):
        backward(torch.nn.Linear(1, 1), {"x": torch.ones(1)})

    def rarely(model, gradients):
        for index, _ in enumerate(gradients):
            if index % 2:
                yield

    with pytest.raises(ValueError, match="yield once after each step"):
        check_equivalent(PIPELINE, rarely)


def test_sees_replaced_parameters_and_the_end() -> None:
    """A loop may put new Parameters into the model, and act after its last yield."""

    def replaces(model, gradients):
        for _ in gradients:
            model.w = torch.nn.Parameter(model.w.data + 7)
            yield

    def adds_at_the_end(model, gradients):
        for _ in gradients:
            yield
        model.w.data += 7

    for loop in (replaces, adds_at_the_end):
        with pytest.raises(NotEquivalentError):
            check_equivalent(fo.SetToZero(), loop, params={"w": torch.zeros(2)})


def test_gaps_at_the_largest_numbers() -> None:
    """Where an ulp would be infinite, and between finite and infinite, a gap counts."""

    def to(value: float):
        def loop(model, gradients) -> None:
            model.w.data.fill_(value)

        return loop

    zero = torch.zeros(1, dtype=torch.float16)
    largest = Example({"w": zero + 65504}, [{"w": zero + 60000}])
    with pytest.raises(NotEquivalentError):
        check_equivalent(fo.Scale(-1.0), to(65504.0), example=largest, max_ulps=1)
    with pytest.raises(NotEquivalentError, match="inf ulp apart"):
        check_equivalent(fo.Scale(-1.0), to(float("inf")), example=largest, max_ulps=9)

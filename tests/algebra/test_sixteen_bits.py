"""float16 parameters: what their gradients ask for, not what float16 can hold between.

The arithmetic runs in 16 bits in part, where eps and small squares vanish and norms
overflow; a change to float32 in between is going to make these right.
"""

from __future__ import annotations

import pytest
import torch

import functional_optim as fo

ROUNDING = 2.0**-11
"""One rounding to float16, relative."""


def _later(*values: object, reason: str):
    """Mark what is computed in 16 bits today, and is wrong."""
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, reason=reason))


def _moved(transform: fo.Transform, grad: torch.Tensor, way: str) -> torch.Tensor:
    """Return how far parameters of 1.0 move in one step."""
    pipeline = fo.chain(transform)
    param = torch.nn.Parameter(torch.ones_like(grad))
    if way == "pure":
        params = {"w": param.detach()}
        updates, _ = pipeline.update({"w": grad}, pipeline.init(params), params)
        return fo.apply_updates(params, updates)["w"].double() - 1
    optimizer = fo.TransformOptimizer([param], pipeline, compile=way == "compiled")
    param.grad = grad
    optimizer.step()
    return param.detach().double() - 1


@pytest.mark.parametrize(
    "way",
    [
        _later("pure", reason="eps and small squares vanish in float16"),
        _later("in place", reason="eps and small squares vanish in float16"),
        "compiled",
    ],
)
@pytest.mark.parametrize("make", [fo.adam, fo.adamw], ids=["adam", "adamw"])
def test_adam_takes_its_first_step_along_the_sign(make, way: str) -> None:
    """A gradient of 0 moves nothing and a small one as far as a large one."""
    grad = torch.tensor([0.0, 1e-4, 1.0] * 400, dtype=torch.float16)
    tx = make(0.1, weight_decay=0.0)
    expected = -0.1 * grad.double().sign()
    # What moves is 1.0: half a step of float16 below it.
    assert torch.allclose(_moved(tx, grad, way), expected, rtol=0, atol=2 * ROUNDING)


@pytest.mark.parametrize(
    ("clip", "way"),
    [
        _later(fo.ClipByGlobalNorm, "pure", reason="the norm overflows in float16"),
        (fo.ClipByGlobalNorm, "in place"),
        (fo.ClipByGlobalNorm, "compiled"),
        _later(fo.ClipByNorm, "pure", reason="the norm overflows in float16"),
        _later(fo.ClipByNorm, "in place", reason="the norm overflows in float16"),
        _later(fo.ClipByNorm, "compiled", reason="the norm overflows in float16"),
    ],
)
def test_a_norm_beyond_float16_clips(clip, way: str) -> None:
    """Finite gradients with a norm of 94868 are scaled to the limit, not to 0."""
    grad = torch.full((1000,), 3000.0, dtype=torch.float16)
    moved = _moved(fo.chain(clip(1.0), fo.sgd(1.0)), grad, way)
    expected = torch.full((1000,), -(1000**-0.5), dtype=torch.float64)
    assert torch.allclose(moved, expected, rtol=0, atol=2 * ROUNDING)


@pytest.mark.parametrize(
    "way",
    [
        _later("pure", reason="the norm overflows in float16"),
        "in place",
        "compiled",
    ],
)
def test_a_norm_beyond_float16_is_told(way: str) -> None:
    """The norm that is read is the true one."""
    grad = torch.full((1000,), 3000.0, dtype=torch.float16)
    pipeline = fo.chain(
        fo.Observe("grad_norm"),
        fo.SkipNonfinite(fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(1.0))),
    )
    param = torch.nn.Parameter(torch.zeros_like(grad))
    if way == "pure":
        params = {"w": param.detach()}
        _, state = pipeline.update({"w": grad}, pipeline.init(params), params)
        told = fo.fetch(fo.readings(pipeline, state))
    else:
        optimizer = fo.TransformOptimizer([param], pipeline, compile=way == "compiled")
        param.grad = grad
        optimizer.step()
        told = fo.fetch(optimizer.readings())
    assert told["skipped"] == 0
    assert told["grad_norm"] == pytest.approx(3000 * 1000**0.5, rel=1e-6)
    assert told["norm"] == pytest.approx(3000 * 1000**0.5, rel=1e-6)

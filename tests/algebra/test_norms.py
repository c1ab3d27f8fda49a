"""Norms as executors measure them: in blocks, so that millions of squares add up."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

import functional_optim as fo
from functional_optim.algebra._norms import _BLOCK, norms

SIZES = [0, 1, 7, _BLOCK, _BLOCK + 1, 3 * _BLOCK + 17]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, math.inf])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_blocks_are_the_whole(size: int, p: float, dtype: torch.dtype) -> None:
    x = torch.linspace(-1.0, 2.0, size, dtype=torch.float64).to(dtype)
    found = norms([x, torch.ones(1, dtype=dtype)], p, wide=True)
    exact = torch.linalg.vector_norm(x.double(), p).item() if size else 0.0
    # 65,536 terms of one sign in float32: relative error of the sum below 65,536 * u
    # even in one row, where torch adds in 8 or more; then a root. u is 6e-8.
    tolerance = 1e-12 if dtype is torch.float64 else 65_536 * 6e-8
    assert found[0].item() == pytest.approx(exact, rel=tolerance)
    assert found[1].item() == 1.0


def test_a_transposed_tensor_is_not_copied() -> None:
    x = torch.ones(_BLOCK, 3).t()
    assert norms([x], 2.0, wide=True).item() == pytest.approx(
        math.sqrt(3 * _BLOCK), rel=1e-6
    )


def test_the_joint_norm_of_millions_is_right_to_six_digits() -> None:
    """Where torch's own, in float32 over the whole, is off in the third or fourth."""
    generator = torch.Generator().manual_seed(0)
    grad = 0.02 * torch.randn(12_000_000, generator=generator)
    param = Parameter(torch.zeros_like(grad))
    param.grad = grad
    chain = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.1))
    optimizer = fo.TransformOptimizer([param], chain)
    optimizer.step()
    exact = grad.double().norm().item()
    found = optimizer.readings()["norm"].item()
    assert abs(found / exact - 1) < 1e-6

"""Presets against torch.optim, on everything that hypothesis can think of."""

from __future__ import annotations

import torch
import torch_parity
from hypothesis import example, given
from hypothesis import strategies as st

import functional_optim as fo
from functional_optim.testing import strategies

SHAPES = {"a.weight": (2, 2), "a.bias": (2,), "norm": ()}
pairs = st.sampled_from(torch_parity.PAIRS)
lrs = st.floats(1e-5, 1.0)


@given(
    pair=pairs,
    params=strategies.tensor_maps(SHAPES),
    grads=strategies.gradient_sequences(SHAPES, min_size=50, max_size=50),
    lr=lrs,
    as_tensor=st.booleans(),
)
def test_float64(
    pair: torch_parity.Pair,
    params: fo.TensorMap,
    grads: list[fo.TensorMap],
    lr: float,
    as_tensor: bool,
) -> None:
    """50 steps agree to 1e-12 of the largest number, with gradients missing."""
    given_lr = torch.tensor(lr, dtype=torch.float64) if as_tensor else lr
    torch_parity.agree_in_float64(pair, params, grads, given_lr)


@example(
    pair=torch_parity.PAIRS[-1],
    params={"norm": torch.tensor(0.0)},
    grads=[{"norm": torch.tensor(-1e-40)}] * 4,
    lr=0.5,
)
@given(
    pair=pairs,
    params=strategies.tensor_maps(SHAPES, torch.float32, strategies.finite),
    grads=strategies.gradient_sequences(
        SHAPES, torch.float32, strategies.finite, min_size=4, max_size=4
    ),
    lr=lrs,
)
def test_float32(
    pair: torch_parity.Pair,
    params: fo.TensorMap,
    grads: list[fo.TensorMap],
    lr: float,
) -> None:
    """From torch's own state one step is within 2 ulp of max(|p|, |p'|, |u|)."""
    torch_parity.agree_in_float32(pair, params, grads, lr)

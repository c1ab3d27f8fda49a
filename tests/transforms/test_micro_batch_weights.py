"""Weights of micro-batches: 0, negative, differentiated."""

from __future__ import annotations

import math

import pytest
import torch

import functional_optim as fo

GRADS = [
    {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)},
    {"w": torch.tensor([5.0, -3.0], dtype=torch.float64)},
]
PARAMS = {"w": torch.zeros(2, dtype=torch.float64)}


def _sum_after(weights: torch.Tensor, *, mean: bool, differentiable: bool = False):
    """Return the sum of the parameters after a window with these weights."""
    pipeline = fo.chain(fo.Accumulate(2, mean=mean), fo.sgd(1.0))
    state = pipeline.init(PARAMS)
    for weight, grads in zip(weights.unbind(), GRADS, strict=True):
        context = fo.Context(weight=weight, differentiable=differentiable)
        updates, state = pipeline.update(grads, state, PARAMS, context=context)
    new = fo.apply_updates(PARAMS, updates, differentiable=differentiable)
    return new["w"].sum()


def _derivative(weights: list[float], *, mean: bool) -> torch.Tensor:
    """Return the derivative of -sum(w g) or -sum(w g) / sum(w), by hand."""
    w = torch.tensor(weights, dtype=torch.float64)
    sums = torch.stack([g["w"].sum() for g in GRADS])
    if not mean:
        return -sums
    total = w.sum()
    return -(sums / total - (w * sums).sum() / total**2)


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize(
    "weights", [[0.0, 0.7], [0.7, 0.0], [1e-6, 0.7], [3.0, -1.0], [2.0, 5.0]], ids=str
)
def test_derivative_with_respect_to_weights(weights: list[float], mean: bool) -> None:
    """The derivative is that of the formula, also at a weight of 0 and below."""
    w = torch.tensor(weights, dtype=torch.float64)
    expected = _derivative(weights, mean=mean)
    slope = torch.func.grad(lambda w: _sum_after(w, mean=mean))(w)
    assert torch.allclose(slope, expected, rtol=1e-9)
    leaf = w.clone().requires_grad_()
    _sum_after(leaf, mean=mean, differentiable=True).backward()
    assert torch.allclose(leaf.grad, expected, rtol=1e-9)
    rows = torch.func.vmap(torch.func.grad(lambda w: _sum_after(w, mean=mean)))
    assert torch.allclose(rows(w.expand(2, 2)), expected.expand(2, 2), rtol=1e-9)


def test_derivative_at_weights_that_are_all_0() -> None:
    """A sum has a derivative where nothing counts yet: how examples are reweighted."""
    zeros = torch.zeros(2, dtype=torch.float64)
    slope = torch.func.grad(lambda w: _sum_after(w, mean=False))(zeros)
    assert slope.tolist() == [-3.0, -2.0]


@pytest.mark.parametrize("way", ["pure", "optimizer", "compiled optimizer"])
@pytest.mark.parametrize(
    ("weights", "grads", "mean", "expected"),
    [
        ((3.0, -1.0), (1.0, 5.0), True, -1.0),
        ((3.0, -1.0), (1.0, 5.0), False, -2.0),
        ((0.0, 2.0), (math.nan, 5.0), True, 5.0),
        ((2.0, 0.0), (5.0, math.inf), True, 5.0),
        ((2.0, -0.0), (5.0, -math.inf), False, 10.0),
        ((0.0, 0.0), (math.nan, 5.0), False, 0.0),
        ((0.0, 0.0), (1.0, 5.0), True, math.nan),
        ((1.0, 1.0), (math.nan, 5.0), True, math.nan),
        ((math.nan, 1.0), (1.0, 5.0), True, math.nan),
        ((-1.0, 3.0), (math.nan, 5.0), True, math.nan),
    ],
)
def test_a_window_is_its_formula(weights, grads, mean, expected, way: str) -> None:
    """Weights in tensors enter as they are; at 0 what is not finite is left out."""
    pipeline = fo.chain(fo.Accumulate(2, mean=mean), fo.sgd(1.0))
    param = torch.nn.Parameter(torch.zeros(4))
    if way == "pure":
        params = {"w": param.detach()}
        state = pipeline.init(params)
        for weight, grad in zip(weights, grads, strict=True):
            context = fo.Context(weight=torch.tensor(weight))
            given = {"w": torch.full((4,), grad)}
            updates, state = pipeline.update(given, state, params, context=context)
        moved = fo.apply_updates(params, updates)["w"]
    else:
        compiled = way == "compiled optimizer"
        optimizer = fo.TransformOptimizer([param], pipeline, compile=compiled)
        for weight, grad in zip(weights, grads, strict=True):
            param.grad = torch.full((4,), grad)
            optimizer.step(weight=torch.tensor(weight))
        moved = param.detach()
    assert torch.equal(-moved, torch.full((4,), expected)) or (
        math.isnan(expected) and moved.isnan().all()
    )

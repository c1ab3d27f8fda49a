"""Presets against torch.optim: every combination of options, on fixed numbers."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch_parity
from law_examples import numbers

import functional_optim as fo

SHAPES = {"a.weight": (5, 3), "a.bias": (5,), "norm": (), "empty": (0,)}

each_pair = pytest.mark.parametrize(
    "pair", torch_parity.PAIRS, ids=lambda pair: f"{pair[0].__name__}-{pair[2]}"
)


def _grads(steps: int) -> list[fo.TensorMap]:
    """Return gradients of which some names are missing in some steps."""
    made = []
    for index in range(steps):
        step = numbers(SHAPES, index)
        missing = {1: ["a.bias"], 3: ["a.weight", "norm"]}.get(index % 7, [])
        made.append({name: g for name, g in step.items() if name not in missing})
    return made


@each_pair
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float lr", "tensor lr"])
def test_float64(pair: torch_parity.Pair, as_tensor: bool) -> None:
    """50 steps agree to 1e-12, with some gradients missing."""
    lr = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
    params = {n: p for n, p in numbers(SHAPES, 99).items() if p.numel()}
    grads = [{n: g for n, g in step.items() if n in params} for step in _grads(50)]
    torch_parity.agree_in_float64(pair, params, grads, lr)


@each_pair
def test_float32(pair: torch_parity.Pair) -> None:
    """From torch's state after up to ten steps one more is within 2 ulp."""
    params = {name: p.float() for name, p in numbers(SHAPES, 99).items()}
    grads = [{n: g.float() for n, g in step.items()} for step in _grads(10)]
    for steps in (1, 2, 10):
        torch_parity.agree_in_float32(pair, params, grads[:steps], 0.1)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_defaults(name: str) -> None:
    """What is left out is what torch takes, and arguments stand in torch's order."""
    ours = inspect.signature(getattr(fo, name.lower())).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    shared = [key for key in ours if key in theirs]
    assert {"lr", "weight_decay", "maximize"} <= set(shared)
    for key in shared:
        assert ours[key].default == theirs[key].default, key
    positional = [
        key for key in ours if ours[key].kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    assert positional == list(theirs)[1 : len(positional) + 1]


@pytest.mark.parametrize("preset", [fo.sgd, fo.adam, fo.adamw])
def test_mask_chooses_what_decays(preset) -> None:
    """What the mask picks moves as with decay, all else as without."""
    params, grads = numbers(SHAPES, 99), numbers(SHAPES, 0)

    def moved(**options) -> fo.TensorMap:
        tx = preset(0.1, **options)
        return tx.update(grads, tx.init(params), params)[0]

    plain, decayed = moved(weight_decay=0.0), moved(weight_decay=0.5)
    masked = moved(weight_decay=0.5, mask="*.weight")
    for name in params:
        expected = decayed if name == "a.weight" else plain
        assert torch.equal(masked[name], expected[name]), name
    assert not torch.equal(plain["a.weight"], decayed["a.weight"])

"""Training goes on after a switch between torch's optimizers and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_parity
from hypothesis import given
from hypothesis import strategies as st

import functional_optim as fo
from functional_optim.testing import strategies

SHAPES = {"a.weight": (2, 2), "a.bias": (2,), "norm": ()}
Make = Callable[[list[Any], float], torch.optim.Optimizer]


def _train(
    makes: list[Make], params: fo.TensorMap, lr: float, grads: list[list[fo.TensorMap]]
) -> list[fo.TensorMap]:
    """Return the parameters after every step, with an optimizer for each part of it."""
    leaves = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    seen = []
    before: torch.optim.Optimizer | None = None
    for make, steps in zip(makes, grads, strict=True):
        groups: list[Any] = [
            {"params": [leaves["a.weight"], leaves["norm"]]},
            {"params": [leaves["a.bias"]], "lr": 0.25},
        ]
        # The first one knows the learning rate; those after it take it over.
        optimizer = make(groups, lr if before is None else 0.5)
        if before is not None:
            optimizer.load_state_dict(_switched(before, optimizer))
        for step in steps:
            for name, leaf in leaves.items():
                leaf.grad = step[name].clone() if name in step else None
            optimizer.step()
            seen.append({name: p.detach().clone() for name, p in leaves.items()})
        before = optimizer
    return seen


def _switched(before: torch.optim.Optimizer, after: torch.optim.Optimizer) -> Any:
    """Return the state of one optimizer in the form of the next."""
    if isinstance(before, fo.TransformOptimizer):
        return fo.to_torch_state_dict(before)
    theirs = before.state_dict()
    if not isinstance(after, fo.TransformOptimizer):
        return theirs
    kept = copy.deepcopy(theirs)
    found = fo.from_torch_state_dict(after, theirs)
    assert str(theirs) == str(kept), "the caller's dict was changed"
    return found


@given(
    pair=st.sampled_from(torch_parity.PAIRS),
    clipped=st.booleans(),
    params=strategies.tensor_maps(SHAPES),
    grads=st.lists(
        strategies.gradient_sequences(SHAPES, min_size=1, max_size=4),
        min_size=2,
        max_size=4,
    ),
    ours_first=st.booleans(),
    lr=st.floats(1e-5, 1.0),
)
def test_training_goes_on(
    pair: torch_parity.Pair,
    clipped: bool,
    params: fo.TensorMap,
    grads: list[list[fo.TensorMap]],
    ours_first: bool,
    lr: float,
) -> None:
    """However often optimizers are switched, all is as if torch's had run on."""
    preset, reference, options = pair

    def ours(groups: list[Any], lr: float) -> torch.optim.Optimizer:
        transform = preset(lr=lr, **options)
        if clipped:  # Limits nothing: a loop without a clip does the same.
            transform = fo.chain(fo.ClipByGlobalNorm(1e300), transform)
        return fo.TransformOptimizer(groups, transform)

    def theirs(groups: list[Any], lr: float) -> torch.optim.Optimizer:
        return reference(groups, lr=lr, foreach=False, **options)

    turns = [ours, theirs] if ours_first else [theirs, ours]
    switching = [turns[part % 2] for part in range(len(grads))]
    found = _train(switching, params, lr, grads)
    expected = _train([theirs] * len(grads), params, lr, grads)
    scale = {name: p.abs().max() for name, p in params.items()}
    for step, wanted in zip(found, expected, strict=True):
        for name, p in wanted.items():
            # As without a switch: relative to the largest number on the way.
            scale[name] = torch.maximum(scale[name], p.abs().max())
            error = (step[name] - p).abs().max()
            assert error <= 1e-12 * scale[name], f"{name}: {error / scale[name]}"

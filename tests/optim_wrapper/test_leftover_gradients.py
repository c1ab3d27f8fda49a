"""Gradients that a wrapper finds outside its windows belong to its state."""

from __future__ import annotations

import copy

import torch
from torch import nn

from functional_optim import OptimWrapper


def test_gradients_of_other_wrappers_are_saved() -> None:
    """What the backward of another wrapper left is there again, after a step, too."""
    torch.manual_seed(0)
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    wrappers = [
        OptimWrapper(torch.optim.SGD(part.parameters(), 0.1))
        for part in (first, second)
    ]
    x = torch.ones(1, 2)
    for wrapper in wrappers:
        wrapper.update_params(second(first(x)).sum())
    assert second.weight.grad is None
    assert first.weight.grad.any()
    saved = copy.deepcopy(wrappers[0].state_dict())
    fresh = copy.deepcopy(first)
    fresh.zero_grad()
    OptimWrapper(torch.optim.SGD(fresh.parameters(), 0.1)).load_state_dict(saved)
    assert torch.equal(fresh.weight.grad, first.weight.grad)
    assert torch.equal(fresh.bias.grad, first.bias.grad)


def test_zeros_stay_zeros() -> None:
    """Gradients that were set to zero cost no memory in a checkpoint."""
    layer = nn.Linear(2, 1)
    wrapper = OptimWrapper(torch.optim.SGD(layer.parameters(), 0.1))
    wrapper.update_params(
        layer(torch.ones(1, 2)).sum(), zero_kwargs={"set_to_none": False}
    )
    saved = wrapper.state_dict()["accumulation"]
    assert saved["zeros"] == [0, 1]
    assert "gradients" not in saved

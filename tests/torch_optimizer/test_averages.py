"""Averages of weights: torch's AveragedModel beside the optimizer, and in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_same
from torch.optim import swa_utils

import functional_optim as fo

STEPS = 12


def _batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(8, 3, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]


def _train(make: Any, average: Any) -> Any:
    """Train with SWALR and an average, and return both models' states."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    ).double()
    optimizer = make(model)
    averaged = swa_utils.AveragedModel(model, **average)
    scheduler = swa_utils.SWALR(optimizer, 0.01, anneal_epochs=4)
    for step, x in enumerate(_batches(STEPS)):
        optimizer.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        optimizer.step()
        if step >= 4:
            averaged.update_parameters(model)
            scheduler.step()
    swa_utils.update_bn(_batches(5), averaged)
    return model.state_dict(), averaged.state_dict()


@pytest.mark.parametrize(
    "average",
    [
        {},
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
        {"use_buffers": True},
    ],
    ids=["mean", "ema", "buffers"],
)
@pytest.mark.parametrize("preset", ["AdamW", "SGD"])
def test_averages_are_those_with_torch(average: dict[str, Any], preset: str) -> None:
    """Weights, their average and its batch statistics are as with torch's optimizer."""
    options = {"momentum": 0.9} if preset == "SGD" else {}
    kind, transform = getattr(torch.optim, preset), getattr(fo, preset.lower())
    theirs = _train(lambda m: kind(m.parameters(), lr=0.05, **options), average)
    ours = _train(
        lambda m: fo.TransformOptimizer(
            m.named_parameters(), transform(0.05, **options)
        ),
        average,
    )
    # The bias before a batch norm has gradients of rounding alone, and Adam scales
    # them up to lr: it may end anywhere, but no output depends on it.
    for a, b in zip(theirs, ours, strict=True):
        kept = [key for key in a if not key.endswith("0.bias")]
        kept = [key for key in kept if not key.endswith("1.running_mean")]
        # Roundings of 2e-16 in 12 steps, which the training itself makes larger.
        assert_same(
            {key: a[key].double() for key in kept},
            {key: b[key].double() for key in kept},
            "weights",
            rtol=1e-10,
        )


def test_averages_are_put_in_place_and_taken_out() -> None:
    """Training goes on bit for bit after the average stood in the model for a while."""
    ends = []
    for visit in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1).double()
        optimizer = fo.TransformOptimizer(model.named_parameters(), fo.adamw(0.05))
        averaged = swa_utils.AveragedModel(model)
        for step, x in enumerate(_batches(STEPS)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
            if visit and step == 5:
                saved = {n: p.detach().clone() for n, p in model.state_dict().items()}
                model.load_state_dict(averaged.module.state_dict())
                model.load_state_dict(saved)
        ends.append(model.state_dict())
    assert_same(ends[0], ends[1], "weights")


def test_an_average_is_not_moved_by_the_optimizer() -> None:
    """The average shares no memory with what the optimizer keeps."""
    model = torch.nn.Linear(3, 1).double()
    optimizer = fo.TransformOptimizer(model.named_parameters(), fo.adamw(0.05))
    averaged = swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    before = {name: p.clone() for name, p in averaged.state_dict().items()}
    for x in _batches(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert_same(before, dict(averaged.state_dict()), "average")

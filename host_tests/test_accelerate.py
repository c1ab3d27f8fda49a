"""Hugging Face Accelerate trains with a `TransformOptimizer` as with torch's AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import twins
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState

import functional_optim as fo

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

BATCHES = 15  # The last window of two is short.


def train(
    make: Callable[..., torch.optim.Optimizer],
    *,
    max_norm: float | None = twins.MAX_NORM,
    every: int = 2,
    gamma: float = 0.8,
    precision: str = "no",
    dtype: torch.dtype = torch.float64,
    save: pathlib.Path | None = None,
    load: pathlib.Path | None = None,
) -> twins.Trained:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=every, mixed_precision=precision
    )
    model = twins.network(dtype)
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    loader = torch.utils.data.DataLoader(twins.examples(4 * BATCHES, dtype), 4)
    model, prepared, loader, scheduler = accelerator.prepare(
        model, optimizer, loader, scheduler
    )
    assert isinstance(prepared, AcceleratedOptimizer)
    assert prepared.optimizer is optimizer
    rates: list[float] = []
    optimizer.register_step_pre_hook(
        lambda own, *_: rates.append(float(own.param_groups[0]["lr"]))
    )
    start, loaded = 0, []
    if load is not None:
        accelerator.load_state(str(load))
        start, loaded = BATCHES // 2 + 1, twins.snapshot(optimizer)
        loader = accelerator.skip_first_batches(loader, start)
    for index, (x, y) in enumerate(loader, start):
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients and max_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            prepared.step()
            scheduler.step()
            prepared.zero_grad()
        if save is not None and index == BATCHES // 2:
            accelerator.save_state(str(save))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return twins.Trained(weights, optimizer, loaded, rates)


def test_equals_torch() -> None:
    """Clipping, accumulation and a scheduler of the host give AdamW's weights."""
    reference, got = train(twins.theirs), train(twins.ours)
    assert type(got.optimizer) is fo.TransformOptimizer
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64
    assert got.rates == reference.rates
    assert len(got.rates) == twins.UPDATES
    assert [int(entry["step"]) for entry in twins.snapshot(got.optimizer)] == [
        twins.UPDATES
    ] * 4


def test_clips_itself() -> None:
    """A clip inside the optimizer does what `accelerator.clip_grad_norm_` does."""
    reference, got = train(twins.theirs), train(twins.ours_that_clips, max_norm=None)
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64


@pytest.mark.parametrize(
    "without", [{"max_norm": None}, {"every": 1}, {"gamma": 1.0}], ids=str
)
def test_settings_have_an_effect(without: dict[str, Any]) -> None:
    """What the other tests compare would differ if the host left a setting out."""
    start = {n: p.detach() for n, p in twins.network().named_parameters()}
    reference = train(twins.theirs).weights
    assert twins.distance(reference, start) > twins.EFFECT
    assert twins.distance(train(twins.theirs, **without).weights, reference) > (
        twins.EFFECT
    )


@pytest.mark.parametrize("make", [twins.theirs, twins.ours, twins.ours_that_clips])
def test_resumes(
    make: Callable[..., torch.optim.Optimizer], tmp_path: pathlib.Path
) -> None:
    """From a state loaded in the middle training ends with the same bits."""
    straight = train(make, save=tmp_path / "middle")
    twins.assert_resumed(train(make, load=tmp_path / "middle"), straight)


def test_bfloat16() -> None:
    """With autocast to bfloat16, float32 weights and moments are those of AdamW."""
    mixed: dict[str, Any] = {"precision": "bf16", "dtype": torch.float32}
    reference, got = train(twins.theirs, **mixed), train(twins.ours, **mixed)
    assert twins.distance(got.weights, reference.weights) <= twins.BFLOAT16
    full = train(twins.theirs, dtype=torch.float32)
    assert twins.distance(full.weights, reference.weights) > 2 * twins.BFLOAT16
    for entry in twins.snapshot(got.optimizer):
        assert entry["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("make", [twins.theirs, twins.ours])
def test_overflow_is_told(make: Callable[..., torch.optim.Optimizer]) -> None:
    """A step that a gradient scaler skips is one that was skipped, for schedulers too.

    `Accelerator` refuses float16 on a CPU; this is the wrapper that it would make.
    """
    Accelerator(cpu=True)
    model = twins.network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = AcceleratedOptimizer(make(model.parameters()), scaler=scaler)
    start = model[0].weight.detach().clone()
    for factor in (float("inf"), 1.0):
        scaler.scale(model(torch.ones(2, 4).double()).sum() * factor).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == (factor != 1.0)
        assert torch.equal(model[0].weight, start) == (factor != 1.0)
        optimizer.zero_grad()

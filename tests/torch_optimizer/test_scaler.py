"""A GradScaler that overflows now and then, against torch's own optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_same
from training import everything, parameters, set_gradients, values

import functional_optim as fo

OVERFLOWS = {0: "a.bias", 3: "scale", 4: "b.weight", 9: "a.weight"}
STEPS = 14

CLIPPED = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(0.05, weight_decay=0.1))
KINDS: dict[str, Any] = {
    "adamw": fo.adamw(0.05, weight_decay=0.1),
    "amsgrad": fo.adamw(0.05, amsgrad=True),
    "sgd": fo.sgd(0.05),
    "momentum": fo.sgd(0.05, momentum=0.9, dampening=0.5),
    "clipped": CLIPPED,
    "schedule": fo.adamw(fo.schedules.cosine_decay(0.05, 10)),
    "partition": fo.Partition(
        {"slow": fo.sgd(0.1, momentum=0.9), "fast": fo.adamw(0.1)},
        {"*.bias": "slow", "*": "fast"},
    ),
    "skipping": fo.SkipNonfinite(fo.adamw(0.05)),
    "readings": fo.chain(fo.Observe("update"), fo.sgd(0.1)),
}


def _scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)


def _scaled_gradients(params: Any, step: int, scaler: torch.amp.GradScaler) -> None:
    """Set gradients as backward of a scaled loss does; some overflow."""
    set_gradients(params, step, scale=scaler.get_scale())
    if step in OVERFLOWS:
        params[OVERFLOWS[step]].grad.view(-1)[-1] = float("inf")


def _train(params: Any, optimizer: Any, *, unscale: bool) -> list[float]:
    """Train under a scaler, and return its scale at every step."""
    scaler = _scaler()
    # A scaler hands out its scale from the first time that it scales something.
    scaler.scale(torch.zeros(()))
    scales = []
    for step in range(STEPS):
        _scaled_gradients(params, step, scaler)
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


handing = pytest.mark.parametrize("handed", [False, True], ids=["", "flag handed over"])


@handing
@pytest.mark.parametrize("unscale", [False, True], ids=["whole", "unscaled before"])
@pytest.mark.parametrize("kind", ["plain", "fused", "tensor lr"])
def test_overflows_are_skipped_as_torch_does(
    unscale: bool, kind: str, handed: bool
) -> None:
    """Weights, scale and step counts are those of torch.optim.AdamW."""

    def rate() -> Any:
        return torch.tensor(0.05) if kind == "tensor lr" else 0.05

    fused = kind == "fused"
    a, b = parameters(torch.float32), parameters(torch.float32)
    theirs = torch.optim.AdamW(a.values(), rate(), weight_decay=0.1, fused=fused)
    adamw = fo.adamw(rate(), weight_decay=0.1)
    ours = fo.TransformOptimizer(b.items(), adamw, amp_scaling=handed)
    expected = _train(a, theirs, unscale=unscale)
    assert _train(b, ours, unscale=unscale) == expected
    assert min(expected) < 1024.0, "nothing was skipped"
    for name, param in a.items():
        steps = theirs.state[param]["step"], ours.state[b[name]]["step"]
        assert [s.item() for s in steps] == [STEPS - len(OVERFLOWS)] * 2
    # Ten steps, a few roundings of 6e-8 each, of numbers near 1.
    assert_same(values(a), values(b), "weights", rtol=3e-6)


def test_a_clip_sees_unscaled_gradients() -> None:
    """A clip in the transform is the clip by hand between unscale_ and step."""
    a, b = parameters(torch.float32), parameters(torch.float32)
    plain = fo.TransformOptimizer(a.items(), KINDS["adamw"])
    clipped = fo.TransformOptimizer(b.items(), CLIPPED, amp_scaling=True)
    scales = _train(a, plain, unscale=True)
    assert _train(b, clipped, unscale=False) == scales
    # The norm in float32 there and in float64 here: roundings of 6e-8 in 10 steps.
    assert_same(values(a), values(b), "weights", rtol=3e-6)


@handing
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unscale", [False, True], ids=["whole", "unscaled before"])
def test_a_skipped_step_changes_nothing(kind: str, unscale: bool, handed: bool) -> None:
    """Parameters, state and groups are the same bits after an overflow."""
    params = parameters(torch.float32)
    optimizer = fo.TransformOptimizer(params.items(), KINDS[kind], amp_scaling=handed)
    scaler = _scaler()
    scaler.scale(torch.zeros(()))
    moved = 0
    for step in range(STEPS):
        _scaled_gradients(params, step, scaler)
        before = everything(optimizer, params)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        state = fo.state_dict(optimizer.transform_state())
        rest = fo.load_state_dict(optimizer.transform_state(), state)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step in OVERFLOWS:
            assert_same(before, everything(optimizer, params), f"step {step}")
            assert_same(rest, optimizer.transform_state(), f"step {step}")
            now = [float(group["lr"]) for group in optimizer.param_groups]
            assert now == rates
        else:
            moved += not torch.equal(before["params"]["scale"], params["scale"])
    assert moved == STEPS - len(OVERFLOWS)


@handing
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaler_without_overflow_is_no_scaler(kind: str, handed: bool) -> None:
    """A scale that is a power of two changes no bit."""
    ends = []
    for enabled in (False, True):
        params = parameters(torch.float32)
        optimizer = fo.TransformOptimizer(
            params.items(), KINDS[kind], amp_scaling=handed
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
        scaler.scale(torch.zeros(()))
        for step in range(5):
            set_gradients(params, step, scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
        ends.append(everything(optimizer, params))
    assert_same(ends[0], ends[1], "scaled")


def test_gradients_are_left_as_they_are() -> None:
    """A step under a scaler does not write into .grad, and leaves no attribute."""
    params = parameters(torch.float32)
    optimizer = fo.TransformOptimizer(params.items(), CLIPPED, amp_scaling=True)
    scaler = _scaler()
    scaler.scale(torch.zeros(()))
    _scaled_gradients(params, 1, scaler)
    grads = {name: param.grad.clone() for name, param in params.items()}
    scaler.step(optimizer)
    assert_same(grads, {name: p.grad for name, p in params.items()}, "gradients")
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")


def test_accumulation_is_refused_under_a_scaler() -> None:
    """Accumulate under a scaler says how to accumulate instead, and changes nothing."""
    params = parameters(torch.float32)
    transform = fo.chain(fo.Accumulate(2), fo.adamw(0.1))
    optimizer = fo.TransformOptimizer(params.items(), transform, amp_scaling=True)
    scaler = _scaler()
    scaler.scale(torch.zeros(()))
    _scaled_gradients(params, 1, scaler)
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match=r"Accumulate; .*accumulate in \.grad"):
        scaler.step(optimizer)
    assert_same(before, everything(optimizer, params), "after the error")


def test_a_window_leaves_out_a_micro_batch_that_overflowed() -> None:
    """Without the flag handed over, a scaler skips the micro-batch, not the window."""
    ends = []
    for overflows in (False, True):
        params = parameters(torch.float32)
        transform = fo.chain(fo.Accumulate(2), fo.adamw(0.1))
        optimizer = fo.TransformOptimizer(params.items(), transform)
        scaler = _scaler()
        scaler.scale(torch.zeros(()))
        for step in (1, 3, 2) if overflows else (1, 2):
            _scaled_gradients(params, step, scaler)
            scaler.step(optimizer)
            scaler.update()
        ends.append(values(params))
    assert_same(ends[0], ends[1], "weights")


def test_autocast_trains_as_with_torch() -> None:
    """A real model under autocast with a scaler ends where torch's AdamW ends."""
    ends = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        if ours:
            named = model.named_parameters()
            optimizer: Any = fo.TransformOptimizer(named, fo.adamw(0.01))
        else:
            optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        scaler = _scaler()
        x = torch.randn(16, 4)
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(values(dict(model.named_parameters())))
    # Five steps of 2^-24, which bfloat16 gradients can make into 2^-8 of lr = 0.01.
    assert_same(ends[0], ends[1], "weights", rtol=1e-4)

"""Mixed precision: scales that are shared, skips that are told, devices of any kind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_optim as fo


def _one(**options: Any) -> tuple[nn.Parameter, fo.AmpOptimWrapper]:
    param = nn.Parameter(torch.ones(2))
    options.setdefault("loss_scale", {"init_scale": 64.0})
    return param, fo.AmpOptimWrapper(optimizer=torch.optim.SGD([param], 0.1), **options)


def _push(
    param: Tensor, wrapper: fo.AmpOptimWrapper, *, overflow: bool = False
) -> None:
    loss = param.sum() * (math.inf if overflow else 1.0)
    wrapper.update_params(loss)


def test_skipped_tells_of_the_last_step() -> None:
    param, wrapper = _one()
    assert not wrapper.skipped
    _push(param, wrapper, overflow=True)
    assert wrapper.skipped
    assert torch.equal(param, torch.ones(2))
    _push(param, wrapper)
    assert not wrapper.skipped
    assert not torch.equal(param, torch.ones(2))


def test_two_overflows_halve_a_shared_scale_once() -> None:
    """As `scaler.update()` once an iteration does; MMEngine's would quarter it."""
    (a, first), (b, second) = _one(), _one()
    second.loss_scaler = first.loss_scaler
    first.backward(a.sum() * math.inf)
    second.backward(b.sum() * math.inf)
    first.step()
    assert first.loss_scaler.get_scale() == 64.0
    second.step()
    assert first.loss_scaler.get_scale() == 32.0
    assert (first.skipped, second.skipped) == (True, True)


def test_one_overflow_does_not_skip_the_other() -> None:
    (a, first), (b, second) = _one(), _one()
    second.loss_scaler = first.loss_scaler
    first.backward(a.sum())
    second.backward(b.sum() * math.inf)
    first.step()
    second.step()
    assert (first.skipped, second.skipped) == (False, True)
    assert first.loss_scaler.get_scale() == 32.0
    assert not torch.equal(a, torch.ones(2))


@pytest.mark.parametrize("clip", [None, {"max_norm": 1.0}])
def test_a_shared_scale_stays_inside_a_window(clip: Any) -> None:
    """One accumulates over two micro-batches; the other overflows meanwhile."""
    a, slow = _one(accumulative_counts=2, clip_grad=clip)
    b, fast = _one(clip_grad=clip)
    fast.loss_scaler = slow.loss_scaler
    _push(a, slow)
    for _ in range(3):  # A GradScaler alone refuses a second step before its update.
        _push(b, fast, overflow=True)
        assert fast.skipped
        assert slow.loss_scaler.get_scale() == 64.0
    _push(b, fast)
    assert not fast.skipped
    assert torch.equal(a.grad, torch.full((2,), 32.0))
    _push(a, slow)
    assert not slow.skipped
    assert slow.loss_scaler.get_scale() == 32.0  # One of its users overflowed.


def test_a_shared_scale_is_that_of_the_plain_loop() -> None:
    """Two optimizers, one scaler, one update an iteration."""
    (a, first), (b, second) = _one(), _one()
    second.loss_scaler = first.loss_scaler
    pa, pb = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    oa, ob = torch.optim.SGD([pa], 0.1), torch.optim.SGD([pb], 0.1)
    scaler = torch.amp.GradScaler("cpu", 64.0)
    for step in range(6):
        factors = (math.inf if step % 3 == 1 else 1.0), (math.nan if step == 4 else 2.0)
        for param, factor in zip((pa, pb), factors, strict=True):
            scaler.scale(param.sum() * factor).backward()
        for optimizer in (oa, ob):
            scaler.step(optimizer)
        scaler.update()
        for optimizer in (oa, ob):
            optimizer.zero_grad()
        for (param, w), factor in zip(((a, first), (b, second)), factors, strict=True):
            w.backward(param.sum() * factor)
        for w in (first, second):
            w.step()
            w.zero_grad()
        assert torch.equal(a, pa)
        assert torch.equal(b, pb)
        assert first.loss_scaler.state_dict() == scaler.state_dict()


def test_no_gradient_at_all_is_no_error() -> None:
    param, wrapper = _one(clip_grad={"max_norm": 1.0})
    wrapper.step()
    assert not wrapper.skipped
    _push(param, wrapper)
    wrapper.step()
    assert wrapper.loss_scaler.get_scale() == 64.0


@pytest.mark.parametrize("scale", [4, 4.0])
def test_a_static_scale_stays(scale: float) -> None:
    param, wrapper = _one(loss_scale=scale)
    for overflow in (True, False, True):
        _push(param, wrapper, overflow=overflow)
        assert wrapper.skipped == overflow
        assert wrapper.loss_scaler.get_scale() == 4.0
    assert wrapper._scale_update_param == 4.0


def test_an_explicit_bfloat16_scales_no_loss() -> None:
    param, wrapper = _one(dtype="bfloat16", loss_scale="dynamic")
    wrapper.backward(param.sum())
    assert torch.equal(param.grad, torch.ones(2))
    wrapper.step()
    assert "loss_scaler" not in wrapper.state_dict()
    assert not wrapper.skipped
    # Asked for, it is scaled.
    param, wrapper = _one(dtype="bfloat16", loss_scale=8.0)
    wrapper.backward(param.sum())
    assert torch.equal(param.grad, torch.full((2,), 8.0))


@pytest.mark.parametrize(
    ("dtype", "made"),
    [
        (None, torch.bfloat16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
        ("float32", torch.float32),
        ("float64", torch.float32),
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_context_casts(dtype: Any, made: torch.dtype) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapper = fo.AmpOptimWrapper(dtype=dtype, optimizer=optimizer)
    with wrapper.optim_context(model):
        assert model(torch.ones(1, 2)).dtype is made
    assert model(torch.ones(1, 2)).dtype is torch.float32


def test_scaling_without_autocast() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapper = fo.AmpOptimWrapper(dtype="float16", autocast=False, optimizer=optimizer)
    with wrapper.optim_context(model):
        assert model(torch.ones(1, 2)).dtype is torch.float32


def test_states_go_between_wrappers_with_and_without_scale() -> None:
    param, wrapper = _one()
    _push(param, wrapper, overflow=True)
    state = wrapper.state_dict()
    assert state["loss_scaler"]["scale"] == 32.0
    assert state["loss_scaler"].keys() == {
        "scale",
        "growth_factor",
        "backoff_factor",
        "growth_interval",
        "_growth_tracker",
    }
    _, other = _one()
    other.load_state_dict(state)
    assert other.loss_scaler.get_scale() == 32.0
    _, plain = _one()
    plain.load_state_dict({k: v for k, v in state.items() if k != "loss_scaler"})
    assert plain.loss_scaler.get_scale() == 64.0
    _, off = _one(loss_scale={"enabled": False})
    off.load_state_dict(state)
    fo.OptimWrapper(torch.optim.SGD([param], 0.1)).load_state_dict(state)


def test_unscaled_by_hand_it_is_not_unscaled_again() -> None:
    param, wrapper = _one(clip_grad={"max_norm": 100.0})
    wrapper.backward(param.sum())
    wrapper.loss_scaler.unscale_(wrapper.optimizer)
    wrapper.step()
    assert torch.equal(param, torch.full((2,), 0.9))


def test_our_optimizer_takes_the_scale_without_a_look_at_it() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = fo.TransformOptimizer([param], fo.sgd(0.1), amp_scaling=True)
    wrapper = fo.AmpOptimWrapper({"init_scale": 64.0}, optimizer=optimizer)
    _push(param, wrapper)
    assert torch.equal(param, torch.full((2,), 0.9))
    _push(param, wrapper, overflow=True)
    assert wrapper.skipped
    assert torch.equal(param, torch.full((2,), 0.9))
    assert wrapper.loss_scaler.get_scale() == 32.0

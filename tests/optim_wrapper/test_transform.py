"""Any transform stands where a clip stands: in place on gradients, saved, named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_optim as fo

CHAINS: list[fo.Transform] = [
    fo.ClipByGlobalNorm(0.1),
    fo.chain(fo.Centralize(), fo.ClipByGlobalNorm(0.1)),
    fo.chain(fo.ZeroNans(), fo.Scale(2.0), fo.ClipByValue(0.1)),
    fo.chain(fo.Observe("size"), fo.AddDecayedWeights(0.1), fo.ClipByNorm(0.1)),
    fo.Trace(0.9, nesterov=True),
    fo.Masked(fo.ClipByGlobalNorm(0.1), lambda name, p: p.ndim == 2),
    fo.chain(),
]


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def _loss(model: nn.Module, step: int) -> Tensor:
    x = torch.linspace(-1.0, 1.0, 6).view(2, 3) + step
    return model(x).square().mean()


@pytest.mark.parametrize("transform", CHAINS, ids=str)
def test_it_is_the_chain_in_front_of_the_step(transform: fo.Transform) -> None:
    ours, plain = _model(), _model()
    wrapper = fo.OptimWrapper(
        torch.optim.SGD(ours.parameters(), 0.1), transform=transform
    )
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    names = [str(i) for i, _ in enumerate(plain.parameters())]
    params = dict(zip(names, plain.parameters(), strict=True))
    state = transform.init({name: p.detach() for name, p in params.items()})
    for step in range(4):
        wrapper.update_params(_loss(ours, step))
        _loss(plain, step).backward()
        grads = {name: p.grad for name, p in params.items()}
        held = {name: p.detach() for name, p in params.items()}
        with torch.no_grad():
            updates, state = transform.update(grads, state, held)
        for name, param in params.items():
            param.grad = updates[name].clone()
        optimizer.step()
        optimizer.zero_grad()
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("transform", CHAINS, ids=str)
def test_gradients_stay_where_they_are(transform: fo.Transform) -> None:
    """Views of gradients, such as DDP's buckets, see what the transform made."""
    model = _model()
    wrapper = fo.OptimWrapper(
        torch.optim.SGD(model.parameters(), 0.1), transform=transform
    )
    bucket = torch.zeros(sum(p.numel() for p in model.parameters()))
    start = 0
    for param in model.parameters():
        param.grad = bucket[start : start + param.numel()].view_as(param)
        start += param.numel()
    grads = [param.grad for param in model.parameters()]
    wrapper.backward(_loss(model, 1))
    before = bucket.clone()
    wrapper.step()
    for param, grad in zip(model.parameters(), grads, strict=True):
        assert param.grad is grad
    seen = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.equal(seen, bucket)
    assert torch.equal(bucket, before) == (len(getattr(transform, "members", "x")) == 0)


def test_its_state_does_not_live_in_gradients() -> None:
    class Last:
        """Keeps the last gradients, as they came."""

        scope = fo.Scope.ELEMENTWISE

        def init(self, params: fo.TensorMap) -> Any:
            return ({name: torch.zeros_like(p) for name, p in params.items()},)

        def update(
            self, updates: fo.TensorMap, state: Any, params: fo.TensorMap, **_: Any
        ) -> Any:
            return {n: u * 1.0 for n, u in updates.items()}, ({**state[0], **updates},)

    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapper = fo.OptimWrapper(optimizer, transform=Last())
    wrapper.backward(_loss(model, 1))
    grads = [p.grad.clone() for p in model.parameters()]
    wrapper.step()
    wrapper.zero_grad(set_to_none=False)
    kept = wrapper.state_dict()["transform"]["state"][0]
    for name, grad in enumerate(grads):
        assert torch.equal(kept[str(name)], grad)


def test_its_state_is_saved_and_loaded() -> None:
    def new() -> tuple[nn.Module, fo.OptimWrapper]:
        model = _model()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return model, fo.OptimWrapper(optimizer, transform=fo.Trace(0.9))

    model, wrapper = new()
    for step in range(3):
        wrapper.update_params(_loss(model, step))
    other, resumed = new()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(wrapper.state_dict())
    for step in range(3, 6):
        wrapper.update_params(_loss(model, step))
        resumed.update_params(_loss(other, step))
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_names_are_those_of_the_model() -> None:
    model = _model()
    config = {
        "optimizer": {"type": "SGD", "lr": 0.1},
        "transform": fo.chain(
            fo.MultiplyParamwise({"*.bias": 0.0}), fo.Observe("norm")
        ),
    }
    wrapper = fo.build_optim_wrapper(model, config)
    before = model[0].bias.clone()
    wrapper.update_params(_loss(model, 1))
    assert torch.equal(model[0].bias, before)
    assert wrapper.readings()["norm"] > 0


def test_new_parameters_join_without_loss_of_state() -> None:
    model, extra = _model(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapper = fo.OptimWrapper(optimizer, transform=fo.Trace(0.5))
    wrapper.update_params(_loss(model, 0))
    before = wrapper.state_dict()["transform"]["state"]["fields"]["momentum_buffer"]
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    wrapper.update_params(extra.sum())
    after = wrapper.state_dict()["transform"]["state"]["fields"]["momentum_buffer"]
    assert torch.equal(extra, torch.zeros(2))
    assert after.keys() == before.keys() | {"4"}
    for name, buffer in before.items():
        assert torch.equal(after[name], buffer)


@pytest.mark.parametrize("ours", [False, True])
def test_a_skipped_step_leaves_its_state(ours: bool) -> None:
    model = _model()
    params = list(model.parameters())
    optimizer: Any = torch.optim.SGD(params, 0.1)
    if ours:
        optimizer = fo.TransformOptimizer(params, fo.sgd(0.1), amp_scaling=True)
    wrapper = fo.AmpOptimWrapper(
        {"init_scale": 8.0}, "float16", optimizer=optimizer, transform=fo.Trace(0.9)
    )
    wrapper.update_params(_loss(model, 0))
    assert not wrapper.skipped
    state = repr(wrapper.state_dict()["transform"])
    before = [p.detach().clone() for p in params]
    wrapper.update_params(_loss(model, 0) * math.inf)
    assert wrapper.skipped
    assert repr(wrapper.state_dict()["transform"]) == state
    for param, kept in zip(params, before, strict=True):
        assert torch.equal(param, kept)
    assert wrapper.loss_scaler.get_scale() == 4.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_clip_grad_is_torchs_for_every_dtype(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(5, dtype=dtype)) for _ in range(3)]
    twins = [nn.Parameter(torch.ones(5, dtype=dtype)) for _ in range(3)]
    for index, (a, b) in enumerate(zip(params, twins, strict=True)):
        a.grad = torch.full((5,), 0.3 + index).to(dtype)
        b.grad = a.grad.clone()
    optimizer = torch.optim.SGD(params, 0.1)
    fo.OptimWrapper(optimizer, clip_grad={"max_norm": 1.0}).step()
    norm = nn.utils.clip_grad_norm_(twins, 1.0)
    torch.optim.SGD(twins, 0.1).step()
    for a, b in zip(params, twins, strict=True):
        assert torch.equal(a.grad, b.grad)
        assert torch.equal(a, b)
    assert norm > 1.0


def test_frozen_parameters_are_left_out_of_the_norm() -> None:
    frozen, free = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    wrapper = fo.OptimWrapper(
        torch.optim.SGD([frozen, free], 0.1), clip_grad={"max_norm": 10.0}
    )
    frozen.grad = torch.full((1,), 100.0)
    free.grad = torch.full((1,), 3.0)
    frozen.requires_grad_(False)
    wrapper.step()
    assert wrapper.message_hub.get_scalar("train/grad_norm").current() == 3.0


def test_a_model_that_moved_is_followed() -> None:
    """Its parameters are other tensors now, under the same objects."""
    model = _model()
    wrapper = fo.OptimWrapper(
        torch.optim.SGD(model.parameters(), 0.1), transform=fo.AddDecayedWeights(0.5)
    )
    wrapper.update_params(_loss(model, 0))
    model.double()
    before = model[0].weight.clone()
    loss = model(torch.zeros(1, 3, dtype=torch.float64)).sum() * 0.0
    wrapper.update_params(loss)
    torch.testing.assert_close(model[0].weight, before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("kind", [fo.OptimWrapper, fo.AmpOptimWrapper])
def test_our_optimizer_inside_a_wrapper(kind: Any) -> None:
    """The same as alone, also after a resume in the middle of a window."""
    transform = fo.chain(fo.ClipByGlobalNorm(0.5), fo.adamw(0.1))
    plain = _model()
    optimizer = fo.TransformOptimizer(plain.parameters(), transform)

    def new() -> tuple[nn.Module, Any]:
        model = _model()
        groups = [{"params": [p]} for p in model.parameters()]
        inner = fo.TransformOptimizer(groups, transform)
        return model, kind(optimizer=inner, accumulative_counts=2)

    model, wrapper = new()
    for step in range(7):
        if step == 3:
            state, params = wrapper.state_dict(), model.state_dict()
            model, wrapper = new()
            model.load_state_dict(params)
            wrapper.load_state_dict(state)
        wrapper.update_params(_loss(model, step))
        (_loss(plain, step) / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert wrapper.get_lr()["lr"] == [0.1] * 4

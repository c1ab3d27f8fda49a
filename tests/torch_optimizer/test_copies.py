"""Copies, hooks, and the rest of what a torch optimizer is asked for."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_same
from training import everything, parameters, set_gradients, train, values

import functional_optim as fo

TRANSFORMS: dict[str, fo.Transform] = {
    "adamw": fo.adamw(0.1),
    "tensor rate": fo.adamw(torch.tensor(0.1)),
    "sgd": fo.sgd(0.1),
    "window": fo.chain(fo.Accumulate(3), fo.ClipByGlobalNorm(1.0), fo.adamw(0.1)),
    "schedule": fo.adamw(fo.schedules.cosine_decay(0.1, 20)),
    "partition": fo.Partition(
        {"slow": fo.sgd(0.01, momentum=0.9), "fast": fo.adamw(0.1)},
        {"*.bias": "slow", "*": "fast"},
    ),
}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)


class Model(torch.nn.Module):
    """Parameters by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(4, 3, dtype=torch.float64)
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))


def _model() -> Any:
    """Return a model that took four steps, and its optimizer."""
    torch.manual_seed(0)
    return Model()


def _stepped(transform: fo.Transform) -> Any:
    model = _model()
    optimizer = fo.TransformOptimizer(model.named_parameters(), transform)
    train(optimizer, dict(model.named_parameters()), range(4))
    return model, optimizer


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def _saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


each_way = pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])


@each_transform
@each_way
def test_model_and_optimizer_copied_together_train_on(
    name: str, copied: Callable[[Any], Any]
) -> None:
    """The copy moves its own model as the original moves its own, and only that."""
    model, optimizer = _stepped(TRANSFORMS[name])
    params = dict(model.named_parameters())
    other, twin = copied((model, optimizer))
    theirs = dict(other.named_parameters())
    assert_same(everything(optimizer, params), everything(twin, theirs), "copied")
    before = everything(optimizer, params)
    train(twin, theirs, range(4, 9))
    assert_same(before, everything(optimizer, params), "the original")
    train(optimizer, params, range(4, 9))
    assert_same(everything(optimizer, params), everything(twin, theirs), "trained on")
    assert not torch.equal(before["params"]["scale"], params["scale"])


@each_transform
@each_way
def test_an_optimizer_copied_alone_has_parameters_of_its_own(
    name: str, copied: Callable[[Any], Any]
) -> None:
    """The parameters in its groups are copies, and train as the originals do."""
    model, optimizer = _stepped(TRANSFORMS[name])
    params = dict(model.named_parameters())
    twin = copied(optimizer)
    theirs = {
        own: param
        for group in twin.param_groups
        for own, param in zip(group["param_names"], group["params"], strict=True)
    }
    before = everything(optimizer, params)
    train(twin, theirs, range(4, 9))
    assert_same(before, everything(optimizer, params), "the original")
    train(optimizer, params, range(4, 9))
    assert_same(
        everything(optimizer, params),
        everything(twin, {own: theirs[own] for own in params}),
        "trained on",
    )


def test_copies_keep_what_was_written_into_groups() -> None:
    """A rate of a group, and what a scheduler left there, goes along."""
    model, optimizer = _stepped(fo.adamw(0.1))
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.param_groups[0]["mine"] = "note"
    other, twin = copy.deepcopy((model, optimizer))
    assert twin.param_groups[0]["mine"] == "note"
    for each, own in ((model, optimizer), (other, twin)):
        train(own, dict(each.named_parameters()), range(4, 6))
    assert_same(
        values(dict(model.named_parameters())),
        values(dict(other.named_parameters())),
        "weights",
    )


# -- hooks ---------------------------------------------------------------------------


def _optimizer(transform: fo.Transform | None = None) -> Any:
    params = parameters()
    return params, fo.TransformOptimizer(params.items(), transform or fo.adamw(0.1))


def test_step_hooks_run_around_the_step() -> None:
    """The hook before sees the old weights and may write gradients, that after new."""
    params, optimizer = _optimizer()
    seen: list[Any] = []

    def before(own: Any, args: Any, kwargs: Any) -> None:
        seen.append((own, params["scale"].item(), args, kwargs))
        params["scale"].grad.zero_()

    def after(own: Any, _args: Any, _kwargs: Any) -> None:
        seen.append((own, params["scale"].item()))

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
    start = params["scale"].item()
    set_gradients(params, 0)
    optimizer.step()
    # A gradient of zero leaves the decay: p * (1 - lr * 0.01).
    assert seen[0] == (optimizer, start, (optimizer,), {})
    assert seen[1] == (optimizer, pytest.approx(start * (1 - 0.1 * 0.01)))
    for handle in handles:
        handle.remove()
    train(optimizer, params, [1])
    assert len(seen) == 2


def test_state_dict_hooks_run() -> None:
    """Hooks around state_dict and load_state_dict run, and may replace the dict."""
    params, optimizer = _optimizer()
    train(optimizer, params, range(2))
    calls: list[str] = []

    def pre(own: Any) -> None:
        assert own is optimizer
        calls.append("state_dict pre")

    def post(_own: Any, saved: Any) -> Any:
        calls.append("state_dict post")
        return {**saved, "extra": 1}

    def load_pre(_own: Any, saved: Any) -> Any:
        calls.append("load pre")
        assert saved["extra"] == 1
        groups = [{**group, "lr": 0.7} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def load_post(own: Any) -> None:
        calls.append("load post")
        assert own.param_groups[0]["lr"] == 0.7

    optimizer.register_state_dict_pre_hook(pre)
    optimizer.register_state_dict_post_hook(post)
    optimizer.register_load_state_dict_pre_hook(load_pre)
    optimizer.register_load_state_dict_post_hook(load_post)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["state_dict pre", "state_dict post", "load pre", "load post"]


def test_global_hooks_run() -> None:
    """Hooks for every optimizer run for this one."""
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("post")),
    ]
    try:
        params, optimizer = _optimizer()
        train(optimizer, params, range(1))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["pre", "post"]


# -- the rest of the interface -------------------------------------------------------


def test_repr_shows_the_groups() -> None:
    """It looks like that of torch's optimizers, with the keys of the groups."""
    _, optimizer = _optimizer(TRANSFORMS["partition"])
    text = repr(optimizer)
    assert text.startswith("TransformOptimizer (\nParameter Group 0\n")
    assert "Parameter Group 1" in text
    assert "    lr: 0.01\n" in text
    assert "params" not in text.replace("param_names", "")


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool) -> None:
    """Gradients become None, or zeros in the same memory."""
    params, optimizer = _optimizer()
    set_gradients(params, 0)
    grads = [param.grad for param in params.values()]
    optimizer.zero_grad(set_to_none=to_none)
    for param, grad in zip(params.values(), grads, strict=True):
        if to_none:
            assert param.grad is None
        else:
            assert param.grad is grad
            assert not grad.any()


def test_a_closure_has_grad_mode() -> None:
    """It may call backward under no_grad, its loss comes back, grad mode is kept."""
    params, optimizer = _optimizer()
    before = values(params)
    modes = []

    def closure() -> torch.Tensor:
        modes.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in params.values())
        loss.backward()
        return loss

    for outside in (True, False):
        with torch.set_grad_enabled(outside):
            loss = optimizer.step(closure)
            assert torch.is_grad_enabled() is outside
    assert modes == [True, True]
    assert loss.requires_grad
    assert not torch.equal(before["scale"], params["scale"])


def test_a_closure_may_return_a_number() -> None:
    """What the closure returns is returned, a tensor or not."""
    params, optimizer = _optimizer()
    assert optimizer.step(lambda: set_gradients(params, 0) or 1.5) == 1.5


def test_the_profiler_sees_the_step() -> None:
    """It is recorded under torch's name for a step."""
    params, optimizer = _optimizer()
    set_gradients(params, 0)
    with torch.profiler.profile() as profile:
        optimizer.step()
    found = {event.key for event in profile.key_averages()}
    assert "Optimizer.step#TransformOptimizer.step" in found


def test_parameters_that_need_no_gradient_stay() -> None:
    """A frozen parameter may be in a group: it does not move, and thaws later."""
    params, optimizer = _optimizer()
    params["scale"].requires_grad_(requires_grad=False)
    before = everything(optimizer, params)
    for name, param in params.items():
        if name != "scale":
            param.grad = torch.ones_like(param)
    optimizer.step()
    after = everything(optimizer, params)
    assert torch.equal(before["params"]["scale"], after["params"]["scale"])
    assert_same(before["state"]["scale"], after["state"]["scale"], "frozen")
    params["scale"].requires_grad_()
    train(optimizer, params, [1])
    assert optimizer.state[params["scale"]]["step"].item() == 1

"""Checkpoints: state_dict, torch.save and torch.distributed.checkpoint."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from comparison import assert_same
from torch.distributed.checkpoint import state_dict as dsd

import functional_optim as fo

TRANSFORMS: dict[str, Callable[[], fo.Transform]] = {
    "adamw": lambda: fo.adamw(0.05, weight_decay=0.1),
    "amsgrad": lambda: fo.adamw(0.05, amsgrad=True),
    "tensor rate": lambda: fo.adamw(torch.tensor(0.05, dtype=torch.float64)),
    "sgd": lambda: fo.sgd(0.05),
    "momentum": lambda: fo.sgd(0.05, momentum=0.9, dampening=0.5),
    "clipped": lambda: fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(0.05)),
    "partition": lambda: fo.Partition(
        {"slow": fo.sgd(0.01, momentum=0.9), "fast": fo.adamw(0.1)},
        {"*.bias": "slow", "*": "fast"},
    ),
    "window": lambda: fo.chain(
        fo.Accumulate(4), fo.ClipByGlobalNorm(1.0), fo.adamw(0.05)
    ),
    "schedule": lambda: fo.adamw(fo.schedules.cosine_decay(0.05, 20)),
    "skipping": lambda: fo.SkipNonfinite(fo.adamw(0.05)),
    "two moments": lambda: fo.chain(fo.Trace(0.9), fo.adam(0.05)),
}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)

STOP = 6  # Inside a window of four.
END = 11


def make(name: str, seed: int = 0, lr: float | None = None) -> Any:
    """Return a model and its optimizer."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    ).double()
    optimizer = fo.TransformOptimizer(model.named_parameters(), TRANSFORMS[name]())
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
    return model, optimizer


def run(model: Any, optimizer: Any, steps: range) -> None:
    """Train on numbers that depend on the step only."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def whole(model: Any, optimizer: Any) -> Any:
    """Return weights, the whole state, and groups; pairs may have become lists."""
    saved = optimizer.state_dict()
    groups = [
        {key: _plain(group[key]) for key in sorted(group)}
        for group in saved["param_groups"]
    ]
    return {
        "weights": model.state_dict(),
        "state": saved["state"],
        "groups": groups,
        "transform": fo.state_dict(optimizer.transform_state()),
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def stopped(name: str) -> Any:
    """Return a run that stopped, and what it would have become."""
    model, optimizer = make(name)
    run(model, optimizer, range(STOP))
    return model, optimizer


def uninterrupted(name: str) -> Any:
    """Return what a run ends with that never stops."""
    model, optimizer = make(name)
    run(model, optimizer, range(END))
    return whole(model, optimizer)


@each_transform
def test_a_state_dict_resumes_training(name: str) -> None:
    """torch.save, torch.load(weights_only=True) and load go on as if never stopped."""
    model, optimizer = stopped(name)
    file = io.BytesIO()
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, again = make(name, seed=1)
    other.load_state_dict(saved["m"])
    again.load_state_dict(saved["o"])
    run(other, again, range(STOP, END))
    assert_same(uninterrupted(name), whole(other, again), "resumed")


def test_moments_that_are_wider_than_parameters_resume() -> None:
    """Moments of what was moved to bfloat16 stay float32, also in a fresh optimizer."""
    model = torch.nn.Linear(3, 2)

    def step(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        for param in model.parameters():
            grad = torch.linspace(0.1, 0.7, param.numel()).view_as(param)
            param.grad = grad.to(param.dtype)
        optimizer.step()

    optimizer = fo.TransformOptimizer(model.named_parameters(), fo.adamw(0.1))
    step(optimizer, model)
    model.to(torch.bfloat16)
    step(optimizer, model)
    other = torch.nn.Linear(3, 2).to(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    fresh = fo.TransformOptimizer(other.named_parameters(), fo.adamw(0.1))
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state[other.weight]["exp_avg"].dtype == torch.float32
    for _ in range(3):
        step(optimizer, model)
        step(fresh, other)
    assert_same(dict(other.state_dict()), dict(model.state_dict()), "weights")
    for key, entry in optimizer.state[model.weight].items():
        assert torch.equal(fresh.state[other.weight][key], entry)


@each_transform
def test_a_run_that_is_saved_goes_on(name: str) -> None:
    """To save, and to load what was saved into the same optimizer, changes nothing."""
    model, optimizer = stopped(name)
    before = {p: dict(state) for p, state in optimizer.state.items()}
    optimizer.load_state_dict(optimizer.state_dict())
    for param, state in before.items():
        for key, entry in state.items():
            assert optimizer.state[param][key].shape == entry.shape
    run(model, optimizer, range(STOP, END))
    assert_same(uninterrupted(name), whole(model, optimizer), "went on")


KINDS: dict[str, dict[str, bool]] = {
    "nested": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "offloaded": {"full_state_dict": True, "cpu_offload": True},
}


def _cases() -> list[Any]:
    """Return every kind of state dict with every transform that torch can do."""
    return [
        (kind, name)
        for kind, options in KINDS.items()
        for name in TRANSFORMS
        # torch: "Expected device to be set", with its own SGD too.
        if not ("full_state_dict" in options and name == "sgd")
    ]


@pytest.mark.parametrize(("kind", "name"), _cases())
def test_distributed_state_dicts_resume_training(kind: str, name: str) -> None:
    """What get_optimizer_state_dict returns, set_optimizer_state_dict takes."""
    options = dsd.StateDictOptions(**KINDS[kind])
    model, optimizer = stopped(name)
    saved = dsd.get_optimizer_state_dict(model, optimizer, options=options)
    other, again = make(name, seed=1)
    other.load_state_dict(model.state_dict())
    dsd.set_optimizer_state_dict(other, again, saved, options=options)
    run(other, again, range(STOP, END))
    assert_same(uninterrupted(name), whole(other, again), "resumed")


alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@alone
@pytest.mark.parametrize(("kind", "name"), _cases())
@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_distributed_checkpoints_resume_training(
    kind: str, name: str, stepped: bool, tmp_path: pathlib.Path
) -> None:
    """dcp.save and dcp.load go on as if never stopped, into a fresh or used one."""
    options = dsd.StateDictOptions(**KINDS[kind])
    model, optimizer = stopped(name)
    saved = {
        "m": dsd.get_model_state_dict(model),
        "o": dsd.get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(saved, checkpoint_id=tmp_path)
    other, again = make(name, seed=1)
    if stepped:
        run(other, again, range(3))
    target = {
        "m": dsd.get_model_state_dict(other),
        "o": dsd.get_optimizer_state_dict(other, again, options=options),
    }
    dcp.load(target, checkpoint_id=tmp_path)
    dsd.set_model_state_dict(other, target["m"])
    dsd.set_optimizer_state_dict(other, again, target["o"], options=options)
    run(other, again, range(STOP, END))
    assert_same(uninterrupted(name), whole(other, again), "resumed")


@each_transform
def test_asking_for_a_distributed_state_dict_changes_nothing(name: str) -> None:
    """get_optimizer_state_dict leaves weights and state, at the start and later."""
    for steps in (0, STOP):
        model, optimizer = make(name)
        run(model, optimizer, range(steps))
        optimizer.zero_grad()
        before = whole(model, optimizer)
        dsd.get_optimizer_state_dict(model, optimizer)
        assert_same(before, whole(model, optimizer), f"after {steps} steps")

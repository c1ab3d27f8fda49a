"""Schedulers of torch.optim drive the optimizer as they drive torch's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_same
from torch.optim import lr_scheduler, swa_utils
from training import parameters, set_gradients, values

import functional_optim as fo

STEPS = 14

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 3, 2
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="triangular2"),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, STEPS + 1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.25, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.9)],
        [4],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=5),
}

PAIRS: dict[str, tuple[Any, Callable[..., fo.Transform], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, fo.adamw, {"weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, fo.sgd, {"momentum": 0.9, "weight_decay": 0.01}),
}

each_pair = pytest.mark.parametrize("pair", PAIRS)
each_scheduler = pytest.mark.parametrize("name", SCHEDULERS)
each_lr = pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])


def _pair(pair: str, *, tensor: bool) -> list[Any]:
    """Return parameters and optimizer of torch, and the same of ours."""
    theirs, preset, options = PAIRS[pair]

    def rate() -> Any:
        return torch.tensor(0.05, dtype=torch.float64) if tensor else 0.05

    a, b = parameters(), parameters()
    return [
        (a, theirs(list(a.values()), lr=rate(), **options)),
        (b, fo.TransformOptimizer(b.items(), preset(rate(), **options))),
    ]


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """Return copies of what schedulers write, as plain numbers."""
    found = {}
    for key in ("lr", "momentum", "betas"):
        if key in group:
            value = group[key]
            parts = value if isinstance(value, tuple) else (value,)
            found[key] = [float(part) for part in parts]
    return found


def _advance(scheduler: Any, step: int) -> None:
    """Step a scheduler; the loss of the one that wants a loss never falls."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0 + step)
    else:
        scheduler.step()


def _run(params: Any, optimizer: Any, scheduler: Any, steps: range) -> list[Any]:
    """Train, and return what the groups showed at every step."""
    seen = []
    for step in steps:
        seen.append(_numbers(optimizer.param_groups[0]))
        set_gradients(params, step)
        optimizer.step()
        _advance(scheduler, step)
    return seen


def test_every_scheduler_of_torch_is_here() -> None:
    """A scheduler that a new torch brings must be added to this file."""
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert found - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


@each_pair
@each_scheduler
@each_lr
def test_schedulers_do_what_they_do_with_torch(
    pair: str, name: str, tensor: bool
) -> None:
    """The same numbers in the groups at every step, and the same weights at the end."""
    ends, shown = [], []
    for params, optimizer in _pair(pair, tensor=tensor):
        scheduler = SCHEDULERS[name](optimizer)
        shown.append(_run(params, optimizer, scheduler, range(STEPS)))
        ends.append(values(params))
    assert shown[0] == shown[1]
    assert any(row != shown[0][0] for row in shown[0]), "this scheduler did nothing"
    # A few roundings of 2e-16 in each of 14 steps: torch sums in another order.
    assert_same(ends[0], ends[1], "weights", rtol=1e-13)


@each_pair
@each_scheduler
def test_schedulers_resume(pair: str, name: str) -> None:
    """Both state dicts, loaded into new ones, go on bit for bit as if never stopped."""
    options = PAIRS[pair]
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), options[1](0.05, **options[2]))
    scheduler = SCHEDULERS[name](optimizer)
    _run(params, optimizer, scheduler, range(5))
    other = parameters()
    for own, param in other.items():
        param.data.copy_(params[own])
    resumed = fo.TransformOptimizer(other.items(), options[1](0.05, **options[2]))
    again = SCHEDULERS[name](resumed)
    again.load_state_dict(scheduler.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    rest = range(5, STEPS)
    expected = _run(params, optimizer, scheduler, rest)
    assert _run(other, resumed, again, rest) == expected
    assert_same(values(params), values(other), "weights")


def test_a_tensor_rate_stays_the_tensor_of_the_user() -> None:
    """A scheduler fills the tensor that was given, which the group shows, as torch."""
    rate = torch.tensor(0.05, dtype=torch.float64)
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), fo.adamw(rate))
    shown = optimizer.param_groups[0]["lr"]
    _run(params, optimizer, SCHEDULERS["ExponentialLR"](optimizer), range(3))
    assert optimizer.param_groups[0]["lr"] is shown is rate
    assert rate.item() == pytest.approx(0.05 * 0.9**3)


def test_groups_have_rates_of_their_own() -> None:
    """A scheduler starts from the rate of each group, also of those of a Partition."""
    params = parameters()
    labels = fo.Partition(
        {"slow": fo.sgd(0.1), "fast": fo.sgd(1.0)}, {"*.bias": "slow", "*": "fast"}
    )
    named = list(params.items())
    optimizer = fo.TransformOptimizer(
        [{"params": named[:2], "lr": 0.3}, {"params": named[2:]}], labels
    )
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    before = values(params)
    _run(params, optimizer, scheduler, range(1))
    set_gradients(params, 1)
    start = values(params)
    optimizer.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.15, 0.15, 0.5]
    rates = {"a.weight": 0.15, "a.bias": 0.15, "b.weight": 0.5, "scale": 0.5}
    for name, rate in rates.items():
        expected = start[name] - rate * params[name].grad
        # Two roundings, torch's way to write the same formula.
        torch.testing.assert_close(params[name].detach(), expected, rtol=1e-15, atol=0)
        assert not torch.equal(before[name], start[name])


@each_scheduler
def test_a_schedule_and_a_scheduler_are_two_owners(name: str) -> None:
    """Step refuses a scheduler on what a schedule decides, and changes nothing."""
    params = parameters()
    transform = fo.adamw(fo.schedules.cosine_decay(0.1, 10))
    optimizer = fo.TransformOptimizer(params.items(), transform)
    SCHEDULERS[name](optimizer)
    if name == "ReduceLROnPlateau":
        optimizer.param_groups[0]["lr"].fill_(0.01)  # It writes late.
    before = values(params)
    set_gradients(params, 0)
    with pytest.raises(ValueError, match="^lr has two owners: .* leave the scheduler"):
        optimizer.step()
    assert_same(before, values(params), "weights")


@each_pair
def test_zero_momentum_is_left_out_as_documented(pair: str) -> None:
    """A scheduler that cycles momentum says so if the transform has none."""
    transform = fo.sgd(0.1) if pair == "SGD" else fo.Scale(-0.1)
    optimizer = fo.TransformOptimizer(parameters().items(), transform)
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        lr_scheduler.OneCycleLR(optimizer, 0.1, 5)


def test_momentum_beside_betas_that_follow_it() -> None:
    """As MMEngine's momentum schedulers write it; without betas it means nothing."""
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), fo.adamw(0.1))
    twin = copy.deepcopy(params)
    reference = fo.TransformOptimizer(twin.items(), fo.adamw(0.1))
    for seed, momentum in enumerate((0.5, 0.6, 0.7)):
        optimizer.param_groups[0]["momentum"] = momentum
        for each in (optimizer, reference):
            each.param_groups[0]["betas"] = (momentum, 0.999)
        for each, given in ((optimizer, params), (reference, twin)):
            set_gradients(given, seed)
            each.step()
    assert_same(values(params), values(twin), "weights")
    optimizer.param_groups[0]["momentum"] = 0.1
    with pytest.raises(ValueError, match="'momentum', which no transform here has"):
        optimizer.step()

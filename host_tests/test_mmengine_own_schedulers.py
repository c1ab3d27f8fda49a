"""MMEngine's own tests of its schedulers, written anew from memory, on wrappers.

Its schedulers are MMEngine's; what they schedule is its wrapper, ours, and ours around
an optimizer of this library.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import mmengine
import mmengine_runs
import pytest
import torch
from mmengine.optim import scheduler as schedulers
from torch import nn

import functional_optim as fo

assert mmengine_runs.OURS == "functional_optim."
EPOCHS = 10
Make: TypeAlias = Callable[..., Any]


def theirs(groups: Any, **settings: Any) -> Any:
    """Return MMEngine's wrapper."""
    return mmengine.optim.OptimWrapper(torch.optim.SGD(groups, **settings))


def ours(groups: Any, **settings: Any) -> Any:
    """Return ours around torch's optimizer."""
    return fo.OptimWrapper(torch.optim.SGD(groups, **settings))


def both(groups: Any, **settings: Any) -> Any:
    """Return ours around our optimizer."""
    return fo.OptimWrapper(fo.TransformOptimizer(groups, fo.sgd(**settings)))


MAKERS = {"theirs": theirs, "ours": ours, "both": both}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Make:
    """Return what makes a wrapper from groups and settings."""
    return MAKERS[request.param]


def wrapper_of(make: Make, *, groups: int = 2) -> Any:
    """Return a wrapper with rates 0.05 and 0.5, momenta 0.8 and 0.9."""
    params = [nn.Parameter(torch.ones(1)) for _ in range(groups)]
    given: list[dict[str, Any]] = [{"params": [p]} for p in params]
    if groups > 1:
        given[1].update(lr=0.5, momentum=0.9)
    return make(given, lr=0.05, momentum=0.8)


def rates(wrapper: Any) -> list[float]:
    """Return the rates of the groups, and of the base settings."""
    return [group["lr"] for group in wrapper.param_groups]


def stepped(wrapper: Any) -> None:
    """Take a step; without gradients ours would warn."""
    for group in wrapper.optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones(1)
    wrapper.step()


def follow(wrapper: Any, several: Any, factors: list[float]) -> None:
    """Check that rates are the first ones times factors, epoch by epoch."""
    first = [0.05, 0.5, 0.05][: len(wrapper.param_groups)]
    for factor in factors:
        assert rates(wrapper) == pytest.approx([lr * factor for lr in first])
        stepped(wrapper)
        for scheduler in several:
            scheduler.step()


FACTORS: dict[str, tuple[type[Any], dict[str, Any], Callable[[int], float]]] = {
    "StepLR": (
        schedulers.StepLR,
        {"gamma": 0.1, "step_size": 3},
        lambda epoch: 0.1 ** (epoch // 3),
    ),
    "MultiStepLR": (
        schedulers.MultiStepLR,
        {"gamma": 0.1, "milestones": [2, 5, 9]},
        lambda epoch: 0.1 ** sum(epoch >= m for m in (2, 5, 9)),
    ),
    "ConstantLR": (
        schedulers.ConstantLR,
        {"factor": 0.5, "end": 5},
        lambda epoch: 0.5 if epoch < 4 else 1.0,
    ),
    "LinearLR": (
        schedulers.LinearLR,
        {"start_factor": 0.5, "end": 5},
        lambda epoch: min(0.5 + 0.125 * epoch, 1.0),
    ),
    "ExponentialLR": (
        schedulers.ExponentialLR,
        {"gamma": 0.9},
        lambda epoch: 0.9**epoch,
    ),
    "PolyLR": (
        schedulers.PolyLR,
        {"power": 0.9, "eta_min": 0.0, "end": 5},
        lambda epoch: (1 - min(epoch, 4) / 4) ** 0.9,
    ),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", FACTORS)
def test_rates_are_scheduled(make: Make, case: str, groups: int) -> None:
    """By the closed form, in one group and in several with the base rate behind."""
    kind, options, factor = FACTORS[case]
    wrapper = wrapper_of(make, groups=groups)
    scheduler = kind(wrapper, **options)
    follow(wrapper, [scheduler], [factor(epoch) for epoch in range(EPOCHS)])


def test_cosine(make: Make) -> None:
    """Down to the least rate, and along the cosine on the way."""
    wrapper = wrapper_of(make)
    scheduler = schedulers.CosineAnnealingLR(wrapper, T_max=EPOCHS, eta_min=1e-10)
    for epoch in range(EPOCHS):
        half = (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        expected = [1e-10 + (lr - 1e-10) * half for lr in (0.05, 0.5, 0.05)]
        assert rates(wrapper) == pytest.approx(expected)
        stepped(wrapper)
        scheduler.step()


def test_one_cycle(make: Make) -> None:
    """Up and down once; the base settings go along."""
    wrapper = wrapper_of(make)
    scheduler = schedulers.OneCycleLR(
        wrapper, eta_max=1.0, total_steps=EPOCHS, by_epoch=False
    )
    seen = []
    for _ in range(EPOCHS):
        seen.append(rates(wrapper))
        stepped(wrapper)
        scheduler.step()
    assert all(len(set(row)) == 1 for row in seen)
    assert max(row[0] for row in seen) == pytest.approx(1.0)
    assert seen[0] == pytest.approx([1 / 25] * 3)


def test_plateau(make: Make) -> None:
    """Rates fall where a metric stands still."""
    wrapper = wrapper_of(make)
    scheduler = schedulers.ReduceOnPlateauLR(
        wrapper, monitor="loss", factor=0.1, patience=1, by_epoch=True
    )
    seen = []
    for loss in (1.0, 0.5, 0.5, 0.5, 0.5):
        seen.append(rates(wrapper)[0])
        stepped(wrapper)
        scheduler.step({"loss": loss})
    assert seen[:4] == pytest.approx([0.05] * 4)
    assert rates(wrapper) == pytest.approx([0.005, 0.05, 0.005])


@pytest.mark.parametrize("adam", [False, True])
def test_momenta_are_scheduled(make: Make, adam: bool) -> None:
    """`momentum`, and the first of `betas`."""
    wrapper = wrapper_of(make)
    if adam:
        params = [nn.Parameter(torch.ones(1))]
        optimizer: Any = torch.optim.Adam(params, betas=(0.8, 0.99))
        if make is both:
            optimizer = fo.TransformOptimizer(params, fo.adam(betas=(0.8, 0.99)))
        kind = mmengine.optim.OptimWrapper if make is theirs else fo.OptimWrapper
        wrapper = kind(optimizer)
    scheduler = schedulers.StepMomentum(wrapper, gamma=0.5, step_size=2)
    seen = []
    for _ in range(4):
        seen.append(wrapper.get_momentum()["momentum"][0])
        stepped(wrapper)
        scheduler.step()
    assert seen == pytest.approx([0.8, 0.8, 0.4, 0.4])


def test_several_schedulers(make: Make) -> None:
    """Their factors multiply."""
    wrapper = wrapper_of(make)
    several = [
        schedulers.LinearLR(wrapper, start_factor=0.5, begin=0, end=5),
        schedulers.ExponentialLR(wrapper, gamma=0.9),
    ]
    factors = [min(0.5 + 0.125 * e, 1.0) * 0.9**e for e in range(EPOCHS)]
    follow(wrapper, several, factors)


def test_schedulers_in_a_row(make: Make) -> None:
    """One begins where the other ends."""
    wrapper = wrapper_of(make)
    several = [
        schedulers.LinearLR(wrapper, start_factor=0.5, begin=0, end=3),
        schedulers.MultiStepLR(wrapper, milestones=[6], gamma=0.1, begin=3),
    ]
    factors = [0.5, 0.75, *[1.0] * 7, 0.1]
    follow(wrapper, several, factors)


def test_schedulers_resume(make: Make) -> None:
    """A scheduler and its wrapper go on from their states."""
    wrapper = wrapper_of(make)
    scheduler = schedulers.ExponentialLR(wrapper, gamma=0.9)
    for _ in range(3):
        stepped(wrapper)
        scheduler.step()
    other = wrapper_of(make)
    resumed = schedulers.ExponentialLR(other, gamma=0.9)
    other.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.state_dict() == scheduler.state_dict()
    for _ in range(3):
        assert rates(other) == rates(wrapper)
        for each in (wrapper, other):
            stepped(each)
        for each in (scheduler, resumed):
            each.step()
    assert rates(other) == rates(wrapper)
    assert rates(other) == pytest.approx([lr * 0.9**6 for lr in (0.05, 0.5, 0.05)])


def test_last_step_needs_the_first_rates(make: Make) -> None:
    """As torch's schedulers do, where they begin in the midst."""
    wrapper = wrapper_of(make)
    with pytest.raises(KeyError, match="initial_lr"):
        schedulers.StepLR(wrapper, gamma=0.1, step_size=3, last_step=10)


def test_what_is_no_wrapper_is_refused(make: Make) -> None:
    """Groups alone cannot be scheduled; wrappers and optimizers can."""
    wrapper = wrapper_of(make)
    with pytest.raises(TypeError, match="should be an Optimizer"):
        schedulers.StepLR(wrapper.param_groups, step_size=1)
    schedulers.StepLR(wrapper.optimizer, step_size=1)


def test_an_interval_converts_epochs(make: Make) -> None:
    """Built for iterations, from a config that counts epochs."""
    wrapper = wrapper_of(make)
    scheduler = schedulers.StepLR.build_iter_from_epoch(
        wrapper, gamma=0.1, step_size=2, begin=0, end=5, epoch_length=2
    )
    follow(wrapper, [scheduler], [0.1 ** (i // 4) for i in range(8)])


def test_several_optimizers_are_scheduled_by_name(make: Make) -> None:
    """As the Runner does with an `OptimWrapperDict`."""
    module = mmengine.optim if make is theirs else fo
    wrappers = module.OptimWrapperDict(gen=wrapper_of(make), disc=wrapper_of(make))
    scheduler = schedulers.ExponentialLR(wrappers["gen"], gamma=0.5)
    stepped(wrappers["gen"])
    scheduler.step()
    assert wrappers.get_lr()["gen.lr"] == pytest.approx([0.025, 0.25])
    assert wrappers.get_lr()["disc.lr"] == [0.05, 0.5]

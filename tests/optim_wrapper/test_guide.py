"""MMEngine's guide to optimizer wrappers, block by block, with the imports changed.

What trains runs on the CPU, beside the plain loop that the guide sets beside it or
means, and must end in the same weights, bit for bit. What it prints is printed here.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import l1_loss
from torch.optim import SGD

import functional_optim as fo
from functional_optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict

STEPS = 10


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["the guide's", "random"])
def pairs(request: pytest.FixtureRequest) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return inputs and targets: those of the guide, and such that move the weight."""
    if request.param == "random":
        shape = (STEPS, 10, 1, 1)
        return list(zip(torch.randn(shape), torch.randn(shape), strict=True))
    inputs = [torch.zeros(10, 1, 1)] * STEPS
    targets = [torch.ones(10, 1, 1)] * STEPS
    return list(zip(inputs, targets, strict=True))


def twins() -> tuple[nn.Module, SGD, nn.Module, SGD]:
    """Return a model with its optimizer twice: for the plain loop, for the wrapper."""
    plain = nn.Linear(1, 1)
    model = copy.deepcopy(plain)
    found = [SGD(m.parameters(), lr=0.01) for m in (plain, model)]
    return plain, found[0], model, found[1]


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


# ----------------------------------------------------------------------------- training


def test_single_precision(pairs) -> None:
    """1.1 and 1.2: `update_params` is backward, step and zero_grad."""
    plain, plain_optimizer, model, optimizer = twins()
    plain_optimizer.zero_grad()
    for x, y in pairs:
        output = plain(x)
        loss = l1_loss(output, y)
        loss.backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    optim_wrapper = OptimWrapper(optimizer=optimizer)
    for x, y in pairs:
        output = model(x)
        loss = l1_loss(output, y)
        optim_wrapper.update_params(loss)

    assert_same(plain, model)
    assert model.bias.grad is None


def test_mixed_precision(pairs) -> None:
    """2.1 and 2.2: `optim_context` is autocast; scaling the loss changes no bit."""
    plain, plain_optimizer, model, optimizer = twins()
    for x, y in pairs:
        with torch.autocast("cpu"):
            output = plain(x)
        loss = l1_loss(output, y)
        loss.backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    optim_wrapper = AmpOptimWrapper(optimizer=optimizer)
    for x, y in pairs:
        with optim_wrapper.optim_context(model):
            output = model(x)
        assert output.dtype is torch.bfloat16
        loss = l1_loss(output, y)
        optim_wrapper.update_params(loss)

    assert_same(plain, model)


def test_mixed_precision_and_accumulation(pairs) -> None:
    """3.1 and 3.2: `accumulative_counts=2` steps on the mean of every two losses."""
    plain, plain_optimizer, model, optimizer = twins()
    for idx, (x, y) in enumerate(pairs):
        with torch.autocast("cpu"):
            output = plain(x)
        loss = l1_loss(output, y) / 2
        loss.backward()
        if idx % 2 == 1:  # The guide has 0 here, and forgets to divide by 2.
            plain_optimizer.step()
            plain_optimizer.zero_grad()

    optim_wrapper = AmpOptimWrapper(optimizer=optimizer, accumulative_counts=2)
    for x, y in pairs:
        with optim_wrapper.optim_context(model):
            output = model(x)
        loss = l1_loss(output, y)
        optim_wrapper.update_params(loss)

    assert_same(plain, model)


def test_fine_grained_calls(pairs) -> None:
    """`backward`, `step` and `zero_grad` are the calls of the plain loop."""
    plain, plain_optimizer, model, optimizer = twins()
    for idx, (x, y) in enumerate(pairs):
        plain_optimizer.zero_grad()
        with torch.autocast("cpu"):
            output = plain(x)
        loss = l1_loss(output, y)
        loss.backward()
        if idx % 2 == 0:
            plain_optimizer.step()
            plain_optimizer.zero_grad()

    optim_wrapper = AmpOptimWrapper(optimizer=optimizer, accumulative_counts=2)
    for idx, (x, y) in enumerate(pairs):
        optimizer.zero_grad()
        with optim_wrapper.optim_context(model):
            output = model(x)
        loss = l1_loss(output, y)
        optim_wrapper.backward(loss)
        if idx % 2 == 0:
            optim_wrapper.step()
            optim_wrapper.zero_grad()

    assert_same(plain, model)


# --------------------------------------------------------------------- rates and states


def test_rates_and_momenta(capsys: pytest.CaptureFixture[str]) -> None:
    """`get_lr` and `get_momentum` return one number for each group."""
    model = nn.Linear(1, 1)
    optimizer = SGD(model.parameters(), lr=0.01)
    optim_wrapper = OptimWrapper(optimizer)

    print(optimizer.param_groups[0]["lr"])
    print(optimizer.param_groups[0]["momentum"])
    print(optim_wrapper.get_lr())
    print(optim_wrapper.get_momentum())

    printed = capsys.readouterr().out
    assert printed == "0.01\n0\n{'lr': [0.01]}\n{'momentum': [0]}\n"


GROUP = {
    "lr": 0.01,
    "momentum": 0,
    "dampening": 0,
    "weight_decay": 0,
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "params": [0, 1],
}
"""What the guide prints. torch has added keys since."""
SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}


def as_in_the_guide(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without the keys that torch has added to groups."""
    groups = [
        {key: value for key, value in group.items() if key in GROUP}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def test_state_dicts() -> None:
    """A state dict is the optimizer's; that of `AmpOptimWrapper` has the scaler's."""
    model = nn.Linear(1, 1)
    optimizer = SGD(model.parameters(), lr=0.01)
    optim_wapper = OptimWrapper(optimizer=optimizer)
    amp_optim_wapper = AmpOptimWrapper(optimizer=optimizer)

    optim_state_dict = optim_wapper.state_dict()
    amp_optim_state_dict = amp_optim_wapper.state_dict()

    expected = {"state": {}, "param_groups": [GROUP]}
    assert as_in_the_guide(optim_state_dict) == expected
    assert as_in_the_guide(amp_optim_state_dict) == {**expected, "loss_scaler": SCALER}

    optim_wapper_new = OptimWrapper(optimizer=optimizer)
    amp_optim_wapper_new = AmpOptimWrapper(optimizer=optimizer)
    amp_optim_wapper_new.load_state_dict(amp_optim_state_dict)
    optim_wapper_new.load_state_dict(optim_state_dict)
    assert optim_wapper_new.state_dict() == optim_state_dict
    assert amp_optim_wapper_new.state_dict() == amp_optim_state_dict


# ------------------------------------------------------------------- several optimizers


def test_several_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    """An `OptimWrapperDict` shows, saves and loads all of its wrappers."""
    gen = nn.Linear(1, 1)
    disc = nn.Linear(1, 1)
    optimizer_gen = SGD(gen.parameters(), lr=0.01)
    optimizer_disc = SGD(disc.parameters(), lr=0.01)

    optim_wapper_gen = OptimWrapper(optimizer=optimizer_gen)
    optim_wapper_disc = OptimWrapper(optimizer=optimizer_disc)
    optim_dict = OptimWrapperDict(gen=optim_wapper_gen, disc=optim_wapper_disc)

    print(optim_dict.get_lr())
    print(optim_dict.get_momentum())
    assert capsys.readouterr().out == (
        "{'gen.lr': [0.01], 'disc.lr': [0.01]}\n"
        "{'gen.momentum': [0], 'disc.momentum': [0]}\n"
    )

    # "May be accessed like a dict."
    assert optim_dict["gen"] is optim_wapper_gen
    assert dict(optim_dict.items()) == {
        "gen": optim_wapper_gen,
        "disc": optim_wapper_disc,
    }
    saved = optim_dict.state_dict()
    assert list(saved) == ["gen", "disc"]
    optim_dict.load_state_dict(saved)
    # "Does not implement `update_params`, `optim_context`, `backward` and `step`."
    loss = gen(torch.ones(1, 1)).sum()
    for call in (
        lambda: optim_dict.update_params(loss),
        lambda: optim_dict.backward(loss),
        lambda: optim_dict.step(),
        lambda: optim_dict.optim_context(gen).__enter__(),
    ):
        with pytest.raises(NotImplementedError, match="each optimizer separately"):
            call()


def test_several_optimizers_train(pairs) -> None:
    """Each wrapper of an `OptimWrapperDict` updates its own model."""
    plain_gen, plain_gen_optimizer, gen, gen_optimizer = twins()
    plain_disc, plain_disc_optimizer, disc, disc_optimizer = twins()
    wrappers = OptimWrapperDict(
        gen=OptimWrapper(gen_optimizer), disc=OptimWrapper(disc_optimizer)
    )
    for x, y in pairs:
        loss = l1_loss(plain_disc(plain_gen(x).detach()), y)
        loss.backward()
        plain_disc_optimizer.step()
        plain_disc_optimizer.zero_grad()
        loss = plain_disc(plain_gen(x)).square().mean()
        loss.backward()
        plain_gen_optimizer.step()
        plain_gen_optimizer.zero_grad()
        plain_disc_optimizer.zero_grad()

        wrappers["disc"].update_params(l1_loss(disc(gen(x).detach()), y))
        wrappers["gen"].update_params(disc(gen(x)).square().mean())
        wrappers["disc"].zero_grad()
    assert_same(plain_gen, gen)
    assert_same(plain_disc, disc)


# --------------------------------------------------------------------------- schedulers


SCHEDULES = {
    "ExponentialLR": {"gamma": 0.5},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": STEPS},
}


@pytest.mark.parametrize("make", [SGD, "fo.sgd"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hyperparameters_change_in_training(pairs, make, schedule) -> None:
    """A scheduler on `wrapper.optimizer` changes rate and momentum between steps."""
    plain = nn.Linear(1, 1)
    model = copy.deepcopy(plain)
    plain_optimizer = SGD(plain.parameters(), lr=0.01, momentum=0.9)
    kind = fo.OPTIMIZERS.get(make) if isinstance(make, str) else make
    optimizer = kind(model.parameters(), lr=0.01, momentum=0.9)
    wrapper = OptimWrapper(optimizer)
    scheduler_class = getattr(torch.optim.lr_scheduler, schedule)
    plain_scheduler = scheduler_class(plain_optimizer, **SCHEDULES[schedule])
    scheduler = scheduler_class(wrapper.optimizer, **SCHEDULES[schedule])
    rates = set()
    for x, y in pairs:
        l1_loss(plain(x), y).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        plain_scheduler.step()

        wrapper.update_params(l1_loss(model(x), y))
        scheduler.step()
        group = plain_optimizer.param_groups[0]
        assert wrapper.get_lr() == {"lr": [group["lr"]]}
        assert wrapper.get_momentum() == {"momentum": [group["momentum"]]}
        rates.add(group["lr"])
    assert len(rates) > 3
    if isinstance(make, str):  # Ours rounds in another order than torch.
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    else:
        assert_same(plain, model)

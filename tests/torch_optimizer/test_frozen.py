"""Frozen parameters: no state before their first gradient, and what follows from it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from comparison import assert_same
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from training import everything, parameters, set_gradients, train, values

import functional_optim as fo

WAYS: dict[str, dict[str, Any]] = {"eager": {}, "compile": {"compile": True}}
each_way = pytest.mark.parametrize("way", WAYS)
LABELS = {"b.*": "body", "*": "head"}
HEAD = ("a.bias", "scale")
TRANSFORMS: dict[str, fo.Transform] = {
    "adamw": fo.adamw(0.1),
    "clipped": fo.chain(fo.ClipByGlobalNorm(0.5), fo.adamw(0.1)),
    "guarded": fo.chain(fo.SkipNonfinite(fo.adamw(0.1))),
    "a mask of frozen ones": fo.adamw(0.1, mask=fo.exclude("b.*")),
    "a label of frozen ones": fo.Partition(
        {"body": fo.adamw(0.01), "head": fo.sgd(0.1, 0.9)}, LABELS
    ),
    "rates by name": fo.adamw({n: 0.1 * (i + 1) for i, n in enumerate(parameters())}),
    "a schedule": fo.adamw(fo.schedules.linear(0.1, 0.0, 9)),
}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)


def frozen(names: Any = ("a.weight", "b.weight")) -> dict[str, Parameter]:
    """Return parameters of which some need no gradient."""
    params = parameters()
    for name in names:
        params[name].requires_grad_(requires_grad=False)
    return params


def trained(params: dict[str, Parameter]) -> dict[str, Parameter]:
    """Return those that get gradients."""
    return {name: p for name, p in params.items() if p.requires_grad}


def made(name: str, way: str = "eager") -> Any:
    """Return parameters, some frozen, and an optimizer over all."""
    params = frozen()
    return params, fo.TransformOptimizer(params.items(), TRANSFORMS[name], **WAYS[way])


def test_a_frozen_model_has_no_state() -> None:
    """Beside a small adapter a large frozen tensor costs nothing."""
    large = Parameter(torch.zeros(1000, 1000), requires_grad=False)
    adapter = Parameter(torch.zeros(10))
    transform = fo.chain(fo.Accumulate(2), fo.adamw(0.1))
    optimizer = fo.TransformOptimizer([large, adapter], transform)
    for _ in range(2):
        adapter.grad = torch.ones(10)
        optimizer.step()
    assert large not in optimizer.state
    held = [e for own in optimizer.state.values() for e in own.values()]
    assert sum(entry.nbytes for entry in held) < 200
    assert adapter[0].item() == pytest.approx(-0.1)


@each_way
@each_transform
def test_thawing_is_as_with_all_from_the_start(way: str, name: str) -> None:
    """A parameter that gets gradients later steps as if it had been there, unmoved."""
    params, optimizer = made(name, way)
    theirs = parameters()
    reference = fo.TransformOptimizer(theirs.items(), TRANSFORMS[name])
    for step in range(6):
        if step == 3:
            for param in params.values():
                param.requires_grad_()
        for each, own in ((optimizer, params), (reference, theirs)):
            set_gradients(own, step)
            for n in ("a.weight", "b.weight") if step < 3 else ():
                own[n].grad = None
            each.step()
        if step < 3:
            assert {p for p, own in optimizer.state.items() if own} <= {
                params[n] for n in HEAD
            }
    # Compiled numbers are rounded otherwise, by an ulp or two in each of 6 steps.
    tolerance = None if way == "eager" else 1e-12
    assert_same(
        everything(reference, theirs), everything(optimizer, params), name, tolerance
    )


def test_a_gradient_that_is_given_to_a_frozen_parameter_counts() -> None:
    """torch updates what has a gradient, whether it needs one or not."""
    ends = []
    for kind in ("ours", "theirs"):
        params = frozen()
        if kind == "ours":
            optimizer: Any = fo.TransformOptimizer(params.values(), fo.adamw(0.1))
        else:
            optimizer = torch.optim.AdamW(params.values(), 0.1)
        train(optimizer, params, range(3))
        ends.append(values(params))
    # A few roundings in each of 3 steps.
    assert_same(ends[1], ends[0], "weights", rtol=1e-13)


@each_way
def test_a_model_that_is_frozen_altogether(way: str) -> None:
    """Everything can be asked; the first gradient begins."""
    params = frozen(parameters())
    transform = TRANSFORMS["clipped"]
    optimizer = fo.TransformOptimizer(params.items(), transform, **WAYS[way])
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a grad"):
        optimizer.step()
    assert not optimizer.state
    assert optimizer.readings()["norm"].item() == 0
    assert optimizer.transform == fo.chain(transform)
    told = fo.explain(optimizer)
    line = "frozen      4 tensors, 22 numbers: no state before their first gradient"
    assert f"{line}; the state has 8 B now" in told
    for each in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        each.load_state_dict(optimizer.state_dict())
        assert not each.state
    params["scale"].requires_grad_().grad = torch.ones((), dtype=torch.float64)
    optimizer.step()
    assert set(optimizer.state) == {params["scale"]}
    assert optimizer.readings()["norm"].item() == 1


@each_transform
def test_what_is_asked_of_an_optimizer_has_all_names(name: str) -> None:
    """explain, transform and readings know the frozen parameters, too."""
    params, optimizer = made(name)
    full = fo.TransformOptimizer(parameters().items(), TRANSFORMS[name])
    assert optimizer.transform == full.transform
    assert sorted(optimizer.readings()) == sorted(full.readings())
    assert "frozen      2 tensors, 18 numbers" in fo.explain(optimizer)
    train(optimizer, params, [0])
    assert "frozen" not in fo.explain(optimizer)


# -- checkpoints -----------------------------------------------------------------------


@each_transform
@pytest.mark.parametrize("how", ["state dict", "deepcopy", "pickle", "pure"])
def test_training_resumes(name: str, how: str) -> None:
    """What was saved with frozen parameters goes on, in a new optimizer or a copy."""
    params, optimizer = made(name)
    train(optimizer, trained(params), range(3))
    if how == "deepcopy":
        again: Any = copy.deepcopy(optimizer)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(optimizer))
    else:
        other, again = made(name)
        for n, param in other.items():
            param.data.copy_(params[n])
        if how == "pure":
            again.load_transform_state(copy.deepcopy(optimizer.transform_state()))
        else:
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    everyone = [p for group in again.param_groups for p in group["params"]]
    names = [n for group in again.param_groups for n in group["param_names"]]
    other = {n: dict(zip(names, everyone, strict=True))[n] for n in params}
    train(optimizer, trained(params), range(3, 5))
    train(again, trained(other), range(3, 5))
    assert_same(everything(optimizer, params), everything(again, other), how)


def test_a_state_dict_from_before_a_thaw_loads_after_it() -> None:
    """What was frozen then begins afresh, the rest goes on."""
    params, optimizer = made("clipped")
    train(optimizer, trained(params), range(3))
    saved = optimizer.state_dict()
    other = parameters()
    again = fo.TransformOptimizer(other.items(), TRANSFORMS["clipped"])
    train(again, other, range(2))
    again.load_state_dict(saved)
    steps = {n: again.state[p]["step"].item() for n, p in other.items()}
    assert steps == {"a.weight": 0, "a.bias": 3, "b.weight": 0, "scale": 3}
    assert not again.state[other["a.weight"]]["exp_avg"].any()
    assert_same(optimizer.readings(), again.readings(), "the last norm")
    train(again, other, [3])
    assert again.state[other["a.weight"]]["step"].item() == 1


def test_a_state_dict_from_before_a_freeze_loads_after_it() -> None:
    """The state of what is frozen now is kept: it goes on when it thaws."""
    other = parameters()
    full = fo.TransformOptimizer(other.items(), TRANSFORMS["clipped"])
    train(full, other, range(3))
    params, optimizer = made("clipped")
    optimizer.load_state_dict(full.state_dict())
    assert_same(
        everything(full, other)["state"], everything(optimizer, params)["state"], ""
    )
    for name, param in params.items():
        param.data.copy_(other[name])
    train(full, other, [3])
    train(optimizer, params, [3])
    assert_same(everything(full, other), everything(optimizer, params), "thawed")


def test_a_state_that_was_lost_is_named() -> None:
    """Without a word that there was none, a missing state is a damaged checkpoint."""
    params, optimizer = made("clipped")
    train(optimizer, trained(params), range(3))
    saved = optimizer.state_dict()
    del saved["state"][1]
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match=r"'a\.bias'.*in the checkpoint"):
        optimizer.load_state_dict(saved)
    assert_same(before, everything(optimizer, params), "after the error")


def test_a_window_that_cannot_be_is_named_also_after_a_thaw() -> None:
    """All of a state dict is checked before anything changes."""
    transform = fo.chain(fo.Accumulate(3), fo.adamw(0.1))
    params = frozen()
    optimizer = fo.TransformOptimizer(params.items(), transform)
    train(optimizer, trained(params), range(2))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["transform_state"]["Accumulate.position"] = -7
    other = parameters()
    again = fo.TransformOptimizer(other.items(), transform)
    train(again, other, range(2))
    before = everything(again, other)
    with pytest.raises(ValueError, match=r"position.*-7"):
        again.load_state_dict(saved)
    assert_same(before, everything(again, other), "after the error")


def test_torch_and_ours_exchange_state_with_frozen_parameters() -> None:
    """torch has no state for what had no gradient, and ours has none."""
    params, optimizer = made("adamw")
    train(optimizer, trained(params), range(3))
    theirs = frozen()
    reference = torch.optim.AdamW(theirs.values(), 0.3)
    reference.load_state_dict(fo.to_torch_state_dict(optimizer))
    assert set(reference.state) == {theirs[n] for n in HEAD}
    other = frozen()
    again = fo.TransformOptimizer(other.items(), fo.adamw(0.3))
    again.load_state_dict(fo.from_torch_state_dict(again, reference.state_dict()))
    assert_same(
        everything(optimizer, params)["state"], everything(again, other)["state"], ""
    )
    train(reference, theirs, [3])
    again.load_state_dict(fo.from_torch_state_dict(again, reference.state_dict()))
    assert again.state[other["a.weight"]]["step"].item() == 1


@pytest.fixture
def one_process() -> Any:
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).double()
    model[0].requires_grad_(requires_grad=False)
    return model


def _push(model: torch.nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 2).double()).pow(2).sum().backward()
        optimizer.step()


OPTIONS = {
    "plain": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "no frozen ones": StateDictOptions(ignore_frozen_params=True),
    "not strict": StateDictOptions(strict=False),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("several", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("fresh", [False, True], ids=["stepped", "fresh"])
def test_torch_distributed_resumes(options: str, several: bool, fresh: bool) -> None:
    """State dicts of torch.distributed, which drop what is frozen, are loaded."""
    models = [_model(), _model()]
    optimizers = []
    for model in models:
        named: Any = list(model.named_parameters())
        groups = [{"params": named[::2]}, {"params": named[1::2]}]
        transform = fo.chain(fo.ClipByGlobalNorm(0.1), fo.adamw(0.1))
        optimizers.append(
            fo.TransformOptimizer(groups if several else named, transform)
        )
    _push(models[0], optimizers[0], 3)
    if not fresh:
        _push(models[1], optimizers[1], 1)
    saved = get_optimizer_state_dict(models[0], optimizers[0], options=OPTIONS[options])
    set_optimizer_state_dict(models[1], optimizers[1], saved, options=OPTIONS[options])
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        model.requires_grad_()
        _push(model, optimizer, 2)
    ends = [dict(model.named_parameters()) for model in models]
    assert_same(values(ends[0]), values(ends[1]), "weights")  # type: ignore[arg-type]


# -- transforms of users ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FromValues:
    """Starts from the parameters, and looks at their values on the host."""

    scope: ClassVar[fo.Scope] = fo.Scope.ELEMENTWISE

    def init(self, params: fo.TensorMap) -> tuple[fo.TensorMap]:
        """Return copies."""
        assert all(float(p.sum()) == float(p.sum()) for p in params.values())
        return ({name: p.clone() for name, p in params.items()},)

    def update(
        self, updates: Any, state: Any, params: Any, *, context: Any = None
    ) -> Any:
        """Return updates beside the copies."""
        added = {name: u + state[0][name] for name, u in updates.items()}
        return added, ({**state[0], **{n: a.clone() for n, a in added.items()}},)


def test_a_transform_that_reads_values_begins_as_it_is() -> None:
    """One that cannot run without memory is run on the parameters themselves."""
    params = frozen()
    optimizer = fo.TransformOptimizer(params.items(), FromValues())
    assert set(optimizer.state) == {params[n] for n in HEAD}
    assert_same(
        values(params)["scale"], optimizer.state[params["scale"]]["FromValues"], ""
    )


@dataclasses.dataclass(frozen=True)
class Mixes:
    """Starts from the sum over all parameters, written in place."""

    scope: ClassVar[fo.Scope] = fo.Scope.GLOBAL

    def init(self, params: fo.TensorMap) -> tuple[fo.TensorMap]:
        """Return the sum for each."""
        total = sum(p.abs().sum() for p in params.values())
        return ({name: torch.zeros_like(p).add_(total) for name, p in params.items()},)

    def update(
        self, updates: Any, state: Any, params: Any, *, context: Any = None
    ) -> Any:
        """Return updates times the sum."""
        return {name: -u * state[0][name] for name, u in updates.items()}, state


def test_a_transform_that_looks_at_all_begins_with_all() -> None:
    """What one of GLOBAL scope has of a parameter depends on the frozen ones, too."""
    frozen_one = Parameter(torch.ones(3), requires_grad=False)
    param = Parameter(torch.ones(2))
    optimizer = fo.TransformOptimizer([("f", frozen_one), ("a", param)], Mixes())
    param.grad = torch.ones(2)
    optimizer.step()
    assert param.tolist() == [-4.0, -4.0]

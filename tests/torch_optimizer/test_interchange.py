"""State dicts of torch's optimizers, and for them: what goes along, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from training import parameters, train, values

import functional_optim as fo
from functional_optim import schedules


def _ours(transform: fo.Transform, *, groups: bool = False) -> fo.TransformOptimizer:
    params = list(parameters().items())
    if groups:
        return fo.TransformOptimizer(
            [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], transform
        )
    return fo.TransformOptimizer(params, transform)


def _theirs(kind: Callable[..., Any], **options: Any) -> Any:
    params = parameters()
    optimizer = kind(params.values(), **options)
    train(optimizer, params, range(2))
    return optimizer


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        (fo.sgd, torch.optim.SGD),
        (fo.adam, torch.optim.Adam),
        (fo.adamw, torch.optim.AdamW),
    ],
)
def test_groups_have_the_keys_of_torch(preset: Any, kind: Any) -> None:
    """A group for torch has the keys of the installed version, and the values here."""
    ours = _ours(preset(0.1, weight_decay=0.2), groups=True)
    saved = fo.to_torch_state_dict(ours)
    expected = kind([torch.zeros(1)]).state_dict()["param_groups"][0]
    assert [set(group) - {"param_names"} for group in saved["param_groups"]] == [
        set(expected)
    ] * 2
    assert [group["lr"] for group in saved["param_groups"]] == [0.1, 0.5]
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.2, 0.2]
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2, 3]]


def test_nothing_is_shared() -> None:
    """What is handed to torch and what is taken from it lies in memory of its own."""
    params = parameters()
    ours = fo.TransformOptimizer(params.items(), fo.adamw(0.1))
    theirs = torch.optim.AdamW(params.values())
    train(ours, params, range(2))
    theirs.load_state_dict(fo.to_torch_state_dict(ours))
    before = copy.deepcopy(ours.state_dict())
    train(theirs, params, range(2))
    assert str(ours.state_dict()) == str(before)
    ours.load_state_dict(fo.from_torch_state_dict(ours, theirs.state_dict()))
    before = copy.deepcopy(theirs.state_dict())
    train(ours, params, range(2))
    assert str(theirs.state_dict()) == str(before)


def test_schedulers_go_along() -> None:
    """What a scheduler keeps in a group is there after a switch, in both directions."""
    theirs = _theirs(torch.optim.AdamW, lr=0.1)
    torch.optim.lr_scheduler.StepLR(theirs, 1)
    theirs.param_groups[0]["note"] = "mine"
    ours = _ours(fo.adamw(0.2))
    ours.load_state_dict(fo.from_torch_state_dict(ours, theirs.state_dict()))
    group = ours.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["note"]) == (0.1, 0.1, "mine")
    assert "capturable" not in group
    back = fo.to_torch_state_dict(ours)["param_groups"][0]
    assert (back["lr"], back["initial_lr"], back["note"]) == (0.1, 0.1, "mine")


def test_a_preset_for_each_label() -> None:
    """A Partition into presets of one kind is torch's optimizer with groups."""
    transform = fo.chain(
        fo.ClipByGlobalNorm(1.0),
        fo.SkipNonfinite(
            fo.Partition(
                {"m": fo.adamw(0.1, weight_decay=0.3), "o": fo.adamw(0.1, eps=1e-6)},
                {"*.weight": "m", "*": "o"},
            )
        ),
    )
    groups = fo.to_torch_state_dict(_ours(transform))["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.01]
    assert [group["eps"] for group in groups] == [1e-8, 1e-6]


def test_no_decay_is_no_decay() -> None:
    """What is left out of a chain is off in torch, whatever torch's default is."""
    group = fo.to_torch_state_dict(_ours(fo.adamw(0.1, weight_decay=0.0)))
    assert group["param_groups"][0]["weight_decay"] == 0.0
    climbing = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.1, maximize=True))
    group = fo.to_torch_state_dict(_ours(climbing))["param_groups"][0]
    assert (group["momentum"], group["maximize"]) == (0.0, True)


def test_no_decay_beside_a_decay() -> None:
    """A group without decay says 0 where its class decays by default."""
    rules = {"m": fo.adamw(0.1, weight_decay=0.3), "o": fo.adamw(0.1, weight_decay=0.0)}
    ours = _ours(fo.Partition(rules, {"*.weight": "m", "*": "o"}))
    groups = fo.to_torch_state_dict(ours)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_nothing_is_told_of_what_never_moved() -> None:
    """Before its first step a parameter has no state in torch, as torch has it."""
    for transform in (fo.sgd(0.1, 0.9, 0.5), fo.adamw(0.1)):
        assert fo.to_torch_state_dict(_ours(transform))["state"] == {}


def test_without_decay_adam_is_adamw() -> None:
    """Both kinds of state dict fit a rule that does not decay."""
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        ours = _ours(fo.adam(0.1))
        theirs = _theirs(kind, weight_decay=0.0)
        ours.load_state_dict(fo.from_torch_state_dict(ours, theirs.state_dict()))
    mixed = fo.Partition(
        {"m": fo.adam(0.1, weight_decay=0.3), "o": fo.adam(0.1)},
        {"*.weight": "m", "*": "o"},
    )
    groups = fo.to_torch_state_dict(_ours(mixed))["param_groups"]
    assert [group.get("decoupled_weight_decay", False) for group in groups] == [
        False,
        False,
    ]


def test_moments_are_widened_and_never_narrowed() -> None:
    """A moment keeps its bits, in the wider dtype of both sides."""
    single = parameters(torch.float32)
    theirs = torch.optim.AdamW(single.values())
    train(theirs, single, range(2))
    ours = _ours(fo.adamw(0.1))
    found = fo.from_torch_state_dict(ours, theirs.state_dict())
    ours.load_state_dict(found)
    entry = ours.state[ours.param_groups[0]["params"][0]]["exp_avg"]
    assert entry.dtype == torch.float64
    assert torch.equal(entry, theirs.state_dict()["state"][0]["exp_avg"].double())
    small = fo.TransformOptimizer(parameters(torch.bfloat16).items(), fo.adamw(0.1))
    small.load_state_dict(fo.from_torch_state_dict(small, theirs.state_dict()))
    entry = small.state[small.param_groups[0]["params"][0]]["exp_avg"]
    assert torch.equal(entry, theirs.state_dict()["state"][0]["exp_avg"])


REFUSED: dict[str, tuple[fo.Transform, str]] = {
    "another rule": (fo.chain(fo.Scale(0.1)), "none of sgd, adam and adamw, but Scale"),
    "a clip after the moments": (
        fo.chain(fo.ScaleByAdam(), fo.ClipByValue(1.0), fo.ScaleByLearningRate(0.1)),
        "but ScaleByAdam -> ClipByValue -> ScaleByLearningRate",
    ),
    "nothing": (fo.chain(), "no counterpart in torch.optim: it is none of"),
    "a mask": (fo.adamw(0.1, mask="*.weight"), "use two groups, or a Partition"),
    "a schedule": (fo.adamw(schedules.linear(0.1, 0.0, 5)), "lr is a schedule"),
    "a map by name": (
        fo.adamw(0.1, weight_decay=dict.fromkeys(parameters(), 0.1)),
        "weight_decay differs by parameter",
    ),
    "eps_root": (
        fo.chain(fo.ScaleByAdam(eps_root=1e-8), fo.ScaleByLearningRate(0.1)),
        "eps_root=1e-08, and torch has none",
    ),
    "a factor": (fo.chain(fo.Scale(2.0), fo.sgd(0.1)), "no Scale.2.0. before its"),
    "frozen": (fo.chain(fo.SetToZero(), fo.sgd(0.1)), "no SetToZero.. before its"),
    "a window": (fo.chain(fo.Accumulate(2), fo.sgd(0.1)), "the open window of an"),
    "some parameters only": (fo.Masked(fo.sgd(0.1), "*.weight"), "acts on some of"),
    "two kinds": (
        fo.Partition({"a": fo.sgd(0.1), "b": fo.adam(0.1)}, {"a.*": "a", "*": "b"}),
        "they are those of Adam and SGD",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rules_without_a_counterpart(case: str) -> None:
    """A transform that no optimizer of torch is like is refused, with the reason."""
    transform, message = REFUSED[case]
    ours = _ours(transform)
    with pytest.raises(ValueError, match=message):
        fo.to_torch_state_dict(ours)
    with pytest.raises(ValueError, match=message):
        fo.from_torch_state_dict(ours, torch.optim.AdamW([torch.ones(1)]).state_dict())


UNLIKE: dict[str, tuple[fo.Transform, Callable[[], Any], str]] = {
    "another class": (
        fo.adamw(0.1),
        lambda: _theirs(torch.optim.SGD, lr=0.1),
        r"lacks \['amsgrad', 'betas', 'eps'\], which torch.optim.AdamW has",
    ),
    "amsgrad": (
        fo.adamw(0.1),
        lambda: _theirs(torch.optim.AdamW, amsgrad=True),
        "amsgrad=True in the state dict, False here",
    ),
    "maximize": (
        fo.sgd(0.1, maximize=True),
        lambda: _theirs(torch.optim.SGD, lr=0.1),
        "maximize=False in the state dict, True here",
    ),
    "nesterov": (
        fo.sgd(0.1, 0.9),
        lambda: _theirs(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        "nesterov=True in the state dict, False here",
    ),
    "dampening": (
        fo.sgd(0.1, 0.9),
        lambda: _theirs(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
        "dampening=0.5 in the state dict, 0.0 here",
    ),
    "no momentum here": (
        fo.sgd(0.1),
        lambda: _theirs(torch.optim.SGD, lr=0.1, momentum=0.9),
        "momentum=0.9 in the state dict, and the transform here has none",
    ),
    "no decay here": (
        fo.adamw(0.1, weight_decay=0.0),
        lambda: _theirs(torch.optim.AdamW),
        "weight_decay=0.01 in the state dict, and the transform here has none",
    ),
    "decay elsewhere": (
        fo.adam(0.1, weight_decay=0.1),
        lambda: _theirs(torch.optim.AdamW),
        "decoupled_weight_decay=True in the state dict, False here",
    ),
    "other groups": (
        fo.adamw(0.1),
        lambda: torch.optim.AdamW([{"params": [p]} for p in parameters().values()]),
        "the state dict has 4 groups, the optimizer 1",
    ),
    "a cousin": (
        fo.adamw(0.1),
        lambda: _theirs(torch.optim.RAdam),
        r"lacks \['amsgrad'\], which torch.optim.AdamW has",
    ),
    "another model": (
        fo.adamw(0.1),
        lambda: torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]),
        "has 1 parameters in the state dict, 4 here",
    ),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_state_dicts_that_do_not_fit(case: str) -> None:
    """A state dict that means something else is refused, and nothing is changed."""
    transform, make, message = UNLIKE[case]
    ours = _ours(transform)
    before = str(ours.state_dict())
    with pytest.raises(ValueError, match=message):
        fo.from_torch_state_dict(ours, make().state_dict())
    assert str(ours.state_dict()) == before


LATER = ("maximize", "foreach", "capturable", "differentiable", "fused")
"""What groups of torch 1.10 had not yet."""


@pytest.mark.parametrize(
    ("make", "transform"),
    [
        (torch.optim.AdamW, fo.adamw(0.1)),
        (torch.optim.Adam, fo.adam(0.1)),
        (
            lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9),
            fo.chain(fo.ClipByGlobalNorm(1e9), fo.sgd(0.1, momentum=0.9)),
        ),
    ],
    ids=["AdamW", "Adam", "SGD"],
)
def test_a_checkpoint_of_an_old_torch(make: Any, transform: fo.Transform) -> None:
    """A flag that torch did not have then is off, and the count is a Python number."""
    params = parameters()
    theirs = make(list(params.values()))
    train(theirs, params, range(3))
    saved = copy.deepcopy(theirs.state_dict())
    for group in saved["param_groups"]:
        for key in (*LATER, "decoupled_weight_decay"):
            group.pop(key, None)
    for entry in saved["state"].values():
        if "step" in entry:
            entry["step"] = int(entry["step"])
    mine = {name: torch.nn.Parameter(p.detach()) for name, p in values(params).items()}
    ours = fo.TransformOptimizer(mine.items(), transform)
    ours.load_state_dict(fo.from_torch_state_dict(ours, saved))
    for optimizer, some in ((theirs, params), (ours, mine)):
        train(optimizer, some, range(3, 6))
    for name, p in params.items():
        torch.testing.assert_close(mine[name].detach(), p.detach())


def test_an_old_checkpoint_is_not_of_one_that_climbs() -> None:
    """What has no `maximize` descended."""
    saved = _theirs(torch.optim.AdamW).state_dict()
    del saved["param_groups"][0]["maximize"]
    with pytest.raises(ValueError, match="maximize=False in the state dict, True here"):
        fo.from_torch_state_dict(_ours(fo.adamw(0.1, maximize=True)), saved)


def test_other_shapes_are_refused_when_loaded() -> None:
    """A moment of another shape is refused by name when the result is loaded."""
    theirs = _theirs(torch.optim.AdamW)
    saved = theirs.state_dict()
    saved["state"][0] = {**saved["state"][0], "exp_avg": torch.ones(7).double()}
    ours = _ours(fo.adamw(0.1))
    with pytest.raises(ValueError, match="exp_avg of 'a.weight' has shape"):
        ours.load_state_dict(fo.from_torch_state_dict(ours, saved))


def test_what_a_group_says_counts() -> None:
    """An option that was written into a group is looked at, not the transform's."""
    ours = _ours(fo.adamw(0.1))
    ours.param_groups[0]["eps_root"] = 1.0
    with pytest.raises(ValueError, match="eps_root=1.0, and torch has none"):
        fo.to_torch_state_dict(ours)


def test_schedulers_on_both_sides() -> None:
    """What a scheduler had kept there counts, not what one keeps here."""
    theirs, ours = _theirs(torch.optim.AdamW, lr=0.1), _ours(fo.adamw(0.2))
    for optimizer in (theirs, ours):
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    ours.load_state_dict(fo.from_torch_state_dict(ours, theirs.state_dict()))
    assert ours.param_groups[0]["initial_lr"] == 0.1


def test_twice_against_the_gradient() -> None:
    """Two changes of sign are none."""
    ours = _ours(fo.chain(fo.Scale(-1.0), fo.Scale(-1.0), fo.sgd(0.1)))
    assert not fo.to_torch_state_dict(ours)["param_groups"][0]["maximize"]


def test_wrong_arguments() -> None:
    """An optimizer of torch's and a dict of something else are refused."""
    theirs = _theirs(torch.optim.AdamW)
    with pytest.raises(TypeError, match="optimizer must be a TransformOptimizer"):
        fo.to_torch_state_dict(theirs)
    with pytest.raises(ValueError, match="a state dict has 'state' and"):
        fo.from_torch_state_dict(_ours(fo.adamw(0.1)), {})

"""State dicts that do not fit: refused with both sides named, and nothing loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_same
from training import SHAPES, everything, parameters, train

import functional_optim as fo

WINDOW = fo.chain(fo.Accumulate(3), fo.ClipByGlobalNorm(1.0), fo.adamw(0.1))


def _make(
    transform: fo.Transform | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
    cut: int | None = None,
    *,
    named: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """Return an optimizer that took four steps; two groups if cut."""
    params = parameters(dtype, shapes)
    members: list[Any] = list(params.items()) if named else list(params.values())
    given: Any = members
    if cut is not None:
        given = [{"params": members[:cut]}, {"params": members[cut:]}]
    optimizer = fo.TransformOptimizer(given, transform or fo.adamw(0.1))
    train(optimizer, params, range(4))
    return params, optimizer


def _whole(params: Any, optimizer: Any) -> Any:
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in copy.deepcopy(optimizer.param_groups)
    ]
    return {
        **everything(optimizer, params),
        "groups": groups,
        "transform": fo.state_dict(optimizer.transform_state()),
    }


def _refused(params: Any, optimizer: Any, saved: Any, message: str) -> None:
    """Assert that loading fails, that nothing is changed, and training goes on."""
    optimizer.param_groups[0]["lr"] = 0.7
    before = copy.deepcopy(_whole(params, optimizer))
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.load_state_dict(saved)
    assert_same(before, _whole(params, optimizer), "after the error")
    train(optimizer, params, [4])


RENAMED = {name.replace("a.", "c."): shape for name, shape in SHAPES.items()}
WIDER = {**SHAPES, "a.bias": (4,)}
FEWER = {name: shape for name, shape in SHAPES.items() if name != "scale"}

OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "another model": (
        lambda: _make(shapes=RENAMED),
        "'c.weight' in the state dict where 'a.weight' stands here",
    ),
    "another shape": (
        lambda: _make(shapes=WIDER),
        r"exp_avg of 'a.bias' has shape \(4,\).* \(3,\).*another model",
    ),
    "another shape without names": (
        lambda: _make(shapes=WIDER, named=False),
        r"exp_avg of 'a.bias' has shape \(4,\).* \(3,\).*another model",
    ),
    "fewer parameters": (
        lambda: _make(shapes=FEWER),
        "3 parameters in the state dict, 4 here",
    ),
    "more groups": (lambda: _make(cut=2), "has 2 groups, the optimizer 1"),
    "another preset": (lambda: _make(fo.sgd(0.1, 0.9)), "lacks .*'betas'"),
    "amsgrad": (
        lambda: _make(fo.adamw(0.1, amsgrad=True, betas=(0.5, 0.9))),
        "amsgrad=True in the state dict, False here",
    ),
    "maximize": (lambda: _make(fo.adamw(0.1, maximize=True)), "maximize=True in the"),
    "a longer chain": (
        lambda: _make(WINDOW),
        "Accumulate.* in the checkpoint.*another transform",
    ),
    "a clip": (
        lambda: _make(fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(0.1))),
        r"transform_state has \['ClipByGlobalNorm\.norm'\] in the checkpoint and \[\]",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_state_dicts_of_others(case: str) -> None:
    """One of another model, transform or layout says what differs; nothing changes."""
    make, message = OTHERS[case]
    if case == "amsgrad":
        saved = fo.TransformOptimizer(
            parameters().items(), fo.adamw(0.1, amsgrad=True)
        ).state_dict()
    else:
        saved = make()[1].state_dict()
    params, optimizer = _make()
    _refused(params, optimizer, saved, message)


@pytest.mark.parametrize(
    ("theirs", "here"),
    [
        (fo.adamw(0.1), fo.adam(0.1)),
        (fo.adam(0.1, weight_decay=0.1), fo.adamw(0.1, weight_decay=0.0)),
        (fo.sgd(0.1, weight_decay=0.1), fo.sgd(0.1)),
        (fo.sgd(0.1, weight_decay=0.1, momentum=0.9), fo.sgd(0.1, momentum=0.9)),
    ],
    ids=str,
)
def test_a_state_dict_with_a_decay_that_nothing_here_has(
    theirs: fo.Transform, here: fo.Transform
) -> None:
    """It is refused when it is loaded, not at the next step; a decay of 0 is none."""
    _, other = _make(theirs)
    params, optimizer = _make(here)
    saved = other.state_dict()
    message = (
        r"param_groups\[0\] has 'weight_decay', .* the keys are .*'lr', .*: build the "
        "optimizer with the transform that it was saved with"
    )
    _refused(params, optimizer, saved, message)
    saved["param_groups"][0]["weight_decay"] = 0.0
    optimizer.load_state_dict(saved)
    train(optimizer, params, range(1))


def _without(path: list[Any]) -> Callable[[Any], None]:
    def damage(saved: Any) -> None:
        for part in path[:-1]:
            saved = saved[part]
        del saved[path[-1]]

    return damage


def _with(path: list[Any], value: Any) -> Callable[[Any], None]:
    def damage(saved: Any) -> None:
        for part in path[:-1]:
            saved = saved[part]
        saved[path[-1]] = value

    return damage


DAMAGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "no state": (_without(["state"]), "a state dict has 'state' and 'param_groups'"),
    "no groups": (_without(["param_groups"]), "a state dict has 'state' and"),
    "no lr": (_without(["param_groups", 0, "lr"]), r"param_groups\[0\] lacks \['lr'\]"),
    "no params": (
        _without(["param_groups", 0, "params"]),
        r"param_groups\[0\].*params",
    ),
    "no parameter": (_without(["state", 1]), "'a.bias'.*in the checkpoint"),
    "no moment": (_without(["state", 1, "exp_avg"]), "'a.bias'.* in the checkpoint"),
    "no whole": (
        _without(["param_groups", 0, "transform_state"]),
        "transform_state has",
    ),
    "negative": (_with(["param_groups", 0, "lr"], -1.0), r"param_groups\[0\].*lr must"),
    "nan": (_with(["param_groups", 0, "lr"], float("nan")), "lr must be finite"),
    "text": (_with(["param_groups", 0, "lr"], "fast"), "lr must be a number"),
    "a moment of text": (
        _with(["state", 1, "exp_avg"], "x"),
        "'a.bias' must be a tens",
    ),
    "a list of moments": (_with(["state", 1], [1, 2]), "'a.bias' must be a dict"),
    "a bad position": (
        _with(["param_groups", 0, "transform_state", "Accumulate.position"], "x"),
        r"'Accumulate\.position'\] must be a int",
    ),
    "an impossible position": (
        _with(["param_groups", 0, "transform_state", "Accumulate.position"], -7),
        r"Accumulate\.position.*-7",
    ),
    "an unknown name": (
        _with(["param_groups", 0, "transform_state", "Accumulate.seen"], '["q"]'),
        r"Accumulate\.seen.*'q'",
    ),
    "a moment too many": (
        _with(["state", 1, "other"], torch.ones(3)),
        "'a.bias' has .*other",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_state_dicts(case: str) -> None:
    """What is missing or not legal is named, and nothing is loaded before it."""
    damage, message = DAMAGES[case]
    saved = copy.deepcopy(_make(WINDOW)[1].state_dict())
    damage(saved)
    params, optimizer = _make(WINDOW)
    train(optimizer, params, range(4, 6))
    _refused(params, optimizer, saved, message)


@pytest.mark.parametrize("value", [[], "x", None, 3])
def test_what_is_no_state_dict(value: Any) -> None:
    """Something else altogether is refused without harm."""
    params, optimizer = _make()
    _refused(params, optimizer, value, r"state dict|dict")


def test_a_state_dict_of_torch_is_told_apart() -> None:
    """One of torch.optim.AdamW names what it lacks and what to use."""
    theirs = parameters()
    reference = torch.optim.AdamW(theirs.values(), 0.1)
    train(reference, theirs, range(2))
    params, optimizer = _make()
    _refused(params, optimizer, reference.state_dict(), "torch.optim use from_torch_st")


def test_the_state_dict_is_not_changed() -> None:
    """Loading and training on leave what was loaded as it was."""
    _, first = _make(WINDOW)
    saved = copy.deepcopy(first.state_dict())
    kept = copy.deepcopy(saved)
    params, optimizer = _make(WINDOW)
    optimizer.load_state_dict(saved)
    train(optimizer, params, range(4, 9))
    assert_same(kept, saved, "state dict")


def test_names_of_wrappers_do_not_matter() -> None:
    """A checkpoint of a wrapped or compiled model fits the bare one."""
    wrapped = {f"module._orig_mod.{name}": shape for name, shape in SHAPES.items()}
    _, first = _make(shapes=wrapped)
    params, optimizer = _make()
    optimizer.load_state_dict(first.state_dict())
    assert_same(
        first.state_dict()["state"], optimizer.state_dict()["state"], "loaded state"
    )
    assert optimizer.param_groups[0]["param_names"] == list(params)


def test_state_dict_indices_are_those_of_torch() -> None:
    """Indices run through the groups, and groups hold indices only."""
    _, optimizer = _make(cut=1)
    saved = optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1, 2, 3]]
    assert sorted(saved["state"]) == [0, 1, 2, 3]


def test_optimizers_loaded_from_one_dict_share_nothing() -> None:
    """A tensor rate that was loaded belongs to one optimizer, and not to the dict."""
    rate = torch.tensor(0.1, dtype=torch.float64)
    _, first = _make(fo.adamw(rate))
    saved = copy.deepcopy(first.state_dict())
    loaded = [_make(fo.adamw(rate))[1] for _ in range(2)]
    for optimizer in loaded:
        optimizer.load_state_dict(saved)
    loaded[0].param_groups[0]["lr"].fill_(0.7)
    assert loaded[1].param_groups[0]["lr"].item() == 0.1
    assert saved["param_groups"][0]["lr"].item() == 0.1

"""Parameters that are added in the middle of training."""

from __future__ import annotations

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
    "schedule": fo.adamw(fo.schedules.cosine_decay(0.1, 20)),
}
PARTITION = fo.Partition(
    {"slow": fo.sgd(0.01, momentum=0.9), "fast": fo.adamw(0.1)},
    {"*.bias": "slow", "*": "fast"},
)


@pytest.mark.parametrize("name", ["adamw", "tensor rate", "sgd", "schedule"])
@pytest.mark.parametrize("start", [0, 3], ids=["before", "in mid training"])
def test_parameters_are_added(name: str, start: int) -> None:
    """New ones start from fresh state with their own numbers, old ones go on."""
    params = parameters()
    late = {own: params[own] for own in ("b.weight", "scale")}
    early = {own: p for own, p in params.items() if own not in late}
    optimizer = fo.TransformOptimizer(early.items(), TRANSFORMS[name])
    train(optimizer, early, range(start))
    optimizer.add_param_group({"params": late.items()})
    train(optimizer, params, range(start, 6))
    # Each part alone: no transform here looks across parameters.
    apart = parameters()
    for part, first in ((early, 0), (late, start)):
        own = {key: apart[key] for key in part}
        transform: Any = TRANSFORMS[name]
        if name == "schedule":
            rate, offset = fo.schedules.cosine_decay(0.1, 20), first
            transform = fo.adamw(lambda t, o=offset, r=rate: r(t + o))
        reference = fo.TransformOptimizer(own.items(), transform)
        train(reference, own, range(first, 6))
        for key, param in own.items():
            assert torch.equal(param, params[key]), key


def test_added_parameters_get_labels_and_numbers() -> None:
    """They are cut by labels, have the group's numbers, and refuse what was refused."""
    params = parameters()
    named = list(params.items())
    optimizer = fo.TransformOptimizer(named[:2], PARTITION)
    train(optimizer, dict(named[:2]), range(2))
    extra = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    added = [*named[2:], ("c.bias", extra)]
    optimizer.add_param_group({"params": added, "lr": 0.5})
    shown = [(g["param_names"], g["lr"]) for g in optimizer.param_groups]
    assert shown[2:] == [(["b.weight", "scale"], 0.5), (["c.bias"], 0.5)]
    everyone = {**params, "c.bias": extra}
    before = values(everyone)
    train(optimizer, everyone, [2])
    step = before["c.bias"] - 0.5 * extra.grad
    # The first step of momentum is the gradient itself: two roundings.
    torch.testing.assert_close(extra.detach(), step, rtol=1e-15, atol=0)
    assert optimizer.state[params["a.weight"]]["step"].item() == 3
    assert optimizer.state[params["scale"]]["step"].item() == 1


def _grown(transform: fo.Transform) -> Any:
    """Return parameters, those that come late, and the optimizer of the others."""
    params = parameters()
    late = {own: params[own] for own in ("b.weight", "scale")}
    early = {own: p for own, p in params.items() if own not in late}
    return params, late, fo.TransformOptimizer(early.items(), transform)


def test_a_window_that_is_open_takes_new_parameters() -> None:
    """What they missed of the window counts as zero, as always."""
    params, late, optimizer = _grown(fo.chain(fo.Accumulate(3), fo.sgd(1.0)))
    early = {own: p for own, p in params.items() if own not in late}
    before = values(params)
    train(optimizer, early, [0])
    optimizer.add_param_group({"params": late.items()})
    sums = {name: torch.zeros_like(param) for name, param in params.items()}
    for step in range(3):
        set_gradients(params if step else early, step)
        for name, param in (params if step else early).items():
            sums[name] += param.grad
        if step:
            optimizer.step()
    for name, param in params.items():
        expected = before[name] - sums[name] / 3
        # Two roundings of numbers around 1.
        torch.testing.assert_close(param.detach(), expected, rtol=1e-15, atol=4e-16)


def test_added_parameters_without_a_gradient_stay_out_of_an_open_window() -> None:
    """A parameter that no micro-batch of the window saw keeps value and state."""
    params, late, optimizer = _grown(fo.chain(fo.Accumulate(2), fo.adamw(0.1)))
    early = {own: p for own, p in params.items() if own not in late}
    train(optimizer, early, [0])
    optimizer.add_param_group({"params": late.items()})
    before = everything(optimizer, late)
    train(optimizer, early, [1])
    assert_same(before, everything(optimizer, late), "without a gradient")


def test_a_clip_sees_added_parameters() -> None:
    """The norm is over all, old and new."""
    params, late, optimizer = _grown(fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(1.0)))
    early = {own: p for own, p in params.items() if own not in late}
    train(optimizer, early, [0])
    optimizer.add_param_group({"params": late.items(), "lr": 0.5})
    before = values(params)
    train(optimizer, params, [1])
    norm = torch.nn.utils.get_total_norm([p.grad for p in params.values()]).item()
    for name, param in params.items():
        rate = 0.5 if name in late else 1.0
        expected = before[name] - rate * param.grad / (norm + 1e-6)
        # Four roundings of numbers around 1.
        torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": ["b.weight"], "lr": -1.0}, "lr must be finite and >= 0, got -1"),
        ({"params": ["b.weight"], "lr": "fast"}, "lr must be a number"),
        ({"params": ["b.weight"], "amsgrad": True}, "amsgrad is False in the"),
        ({"params": ["b.weight"], "momentum": 0.9}, "'momentum', which no transform"),
        ({"params": ["b.weight"], "weight_deacy": 0.9}, "did you mean 'weight_decay'"),
        ({"params": ["a.bias"]}, "'a.bias' comes twice"),
        ({"params": ["b.weight", "b.weight"]}, "'b.weight' comes twice"),
        ({"lr": 0.1}, "must have 'params'"),
    ],
    ids=str,
)
def test_a_group_that_is_refused_changes_nothing(
    group: dict[str, Any], message: str
) -> None:
    """After the error the optimizer trains on as if nobody had tried."""
    params, late, optimizer = _grown(fo.adamw(0.1))
    early = {own: p for own, p in params.items() if own not in late}
    train(optimizer, early, range(2))
    before = everything(optimizer, params)
    groups = [dict(own) for own in optimizer.param_groups]
    given = dict(group)
    if "params" in given:
        given["params"] = [(name, params[name]) for name in given["params"]]
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.add_param_group(given)
    assert_same(before, everything(optimizer, params), "after the error")
    assert [dict(own) for own in optimizer.param_groups] == groups
    train(optimizer, early, range(2, 4))
    other, _, reference = _grown(fo.adamw(0.1))
    rest = {own: p for own, p in other.items() if own in early}
    train(reference, rest, range(4))
    assert_same(values(rest), values(early), "trained on")


def test_a_group_in_other_memory_that_overlaps_changes_nothing() -> None:
    """Two parameters in one memory are refused when added, and nothing is left."""
    params, late, optimizer = _grown(fo.adamw(0.1))
    early = {own: p for own, p in params.items() if own not in late}
    train(optimizer, early, range(2))
    before = everything(optimizer, early)
    view = torch.nn.Parameter(params["a.weight"].data.view(-1)[:3])
    with pytest.raises(ValueError, match="'view' and 'a.weight' lie in the same"):
        optimizer.add_param_group({"params": [("view", view)]})
    assert len(optimizer.param_groups) == 1
    assert view not in optimizer.state
    train(optimizer, early, range(2, 4))
    other, _, reference = _grown(fo.adamw(0.1))
    rest = {own: p for own, p in other.items() if own in early}
    train(reference, rest, range(4))
    assert before.keys() == everything(optimizer, early).keys()
    assert_same(values(rest), values(early), "trained on")


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.ones(2, dtype=torch.int64), "'late' has dtype torch.int64"),
        (torch.ones(2, device="meta"), "'late' on meta"),
        (torch.ones(2, 2).to_sparse(), "'late' is sparse"),
    ],
    ids=["integer", "other device", "sparse"],
)
def test_a_tensor_that_is_refused_changes_nothing(
    param: torch.Tensor, message: str
) -> None:
    """What no transform can take is named when added, and the old ones train on."""
    params, late, optimizer = _grown(fo.adamw(0.1))
    early = {own: p for own, p in params.items() if own not in late}
    train(optimizer, early, range(2))
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group({"params": [("late", param)]})
    assert len(optimizer.param_groups) == 1
    train(optimizer, early, range(2, 4))
    assert optimizer.state[early["a.bias"]]["step"].item() == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampening": 0.5}, "dampening"),
        ({"lr": lambda step: 0.1}, "lr must be a number or a 0-dim tensor"),
    ],
    ids=["structure", "schedule"],
)
def test_a_group_that_no_step_could_follow_is_left_out(
    options: Any, message: str
) -> None:
    """An error after the group was added takes it out again, and steps go on."""
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = fo.TransformOptimizer([a], fo.sgd(0.1, 0.9))
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.add_param_group({"params": [b], **options})
    assert len(optimizer.param_groups) == 1
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert (a[0].item(), b[0].item()) == (pytest.approx(0.9), 1.0)
    optimizer.add_param_group({"params": [b]})
    optimizer.step()
    assert b[0].item() == pytest.approx(0.9)

"""Groups with equal settings step as one, and nobody sees it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import functional_optim as fo
from functional_optim.optim_wrapper import _merged_groups as _merging
from functional_optim.optim_wrapper._merged_groups import MergedGroups

KINDS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.RMSprop, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Adafactor, {}),
]


def _groups(options: list[dict[str, Any]]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"params": [nn.Parameter(torch.randn(2, 3, generator=generator))], **own}
        for own in options
    ]


def _train(optimizer: Any, *, merge: bool) -> tuple[list[Any], int]:
    """Return parameters and state after some steps, and how often groups were seen."""
    wrapper = fo.OptimWrapper(optimizer, merge_groups=merge)
    seen = []
    step = type(optimizer).step

    def spied(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(self.param_groups))
        return step(self, *args, **kwargs)

    optimizer.step = spied.__get__(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for index, group in enumerate(optimizer.param_groups):
            (param,) = group["params"]
            param.grad = torch.randn(2, 3, generator=generator) if index != 2 else None
        own = optimizer.param_groups
        wrapper.step()
        assert optimizer.param_groups is own
        schedule.step()
    params = [group["params"][0] for group in optimizer.param_groups]
    state = [dict(optimizer.state[param]) for param in params]
    return [params, state, [g["lr"] for g in optimizer.param_groups]], seen[0]


OPTIONS = [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.01}, {}]


@pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_the_same_bits(kind: Any, options: dict[str, Any]) -> None:
    merged, count = _train(kind(_groups(OPTIONS), lr=0.2, **options), merge=True)
    single, whole = _train(kind(_groups(OPTIONS), lr=0.2, **options), merge=False)
    assert (count, whole) == (3, 5)
    flat = torch.utils._pytree.tree_leaves
    for a, b in zip(flat(merged), flat(single), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_groups_come_back_after_an_error() -> None:
    optimizer = torch.optim.SGD(_groups([{}, {}]), lr=0.1)
    own = optimizer.param_groups
    with pytest.raises(ZeroDivisionError), MergedGroups(optimizer):
        assert len(optimizer.param_groups) == 1 / 0
    assert optimizer.param_groups is own


def test_a_closure_sees_its_groups() -> None:
    optimizer = torch.optim.SGD(_groups([{}, {}]), lr=0.1)

    def closure() -> float:
        optimizer.param_groups[1]["lr"] = 0.5
        return 1.0

    assert fo.OptimWrapper(optimizer).step(closure=closure) == 1.0
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_a_parameter_that_changes_its_group_takes_its_rate() -> None:
    optimizer = torch.optim.SGD(_groups([{}, {}, {"lr": 0.5}]), lr=0.1)
    wrapper = fo.OptimWrapper(optimizer)
    wrapper.step()
    moved = optimizer.param_groups[1]["params"].pop()
    optimizer.param_groups[2]["params"].insert(0, moved)
    before = moved.detach().clone()
    moved.grad = torch.ones(2, 3)
    wrapper.step()
    assert torch.equal(moved, before - 0.5)


def test_global_hooks_see_the_groups() -> None:
    seen: list[int] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append(len(optimizer.param_groups))
    )
    try:
        fo.OptimWrapper(torch.optim.SGD(_groups([{}, {}]), lr=0.1)).step()
    finally:
        handle.remove()
    assert seen == [2]


def _hooked() -> Any:
    optimizer = torch.optim.SGD(_groups([{}, {}]), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


class _OwnSGD(torch.optim.SGD):
    """Somebody's optimizer, which may look at its groups."""


@pytest.mark.parametrize(
    "make",
    [
        _hooked,
        lambda: _OwnSGD(_groups([{}, {}]), lr=0.1),
        lambda: fo.TransformOptimizer(_groups([{}, {}]), fo.sgd(0.1)),
        lambda: torch.optim.SGD(_groups([{"lr": torch.tensor(0.1)}, {}]), lr=0.1),
    ],
    ids=["hook", "subclass", "ours", "tensor"],
)
def test_nothing_is_merged_where_others_look(make: Any) -> None:
    optimizer = make()
    with MergedGroups(optimizer):
        assert len(optimizer.param_groups) == 2


def test_tensors_are_merged_by_identity() -> None:
    rate = torch.tensor(0.1)
    options = [{"lr": rate}, {"lr": rate}, {"lr": rate.clone()}]
    optimizer = torch.optim.SGD(_groups(options), lr=0.1)
    with MergedGroups(optimizer):
        assert [len(g["params"]) for g in optimizer.param_groups] == [2, 1]


def test_changes_between_steps_are_seen() -> None:
    """Groups are merged anew after any change: settings, keys, parameters, order."""
    optimizer = torch.optim.SGD(_groups([{} for _ in range(3)]), lr=0.1)

    def merged() -> list[tuple[float, int]]:
        with MergedGroups(optimizer):
            found = optimizer.param_groups
            return [(group["lr"], len(group["params"])) for group in found]

    groups = optimizer.param_groups
    assert merged() == merged() == [(0.1, 3)]
    groups[1]["lr"] = 0.2
    assert merged() == [(0.1, 2), (0.2, 1)]
    groups[1]["lr"] = 0.1
    groups[2]["mark"] = None
    assert merged() == [(0.1, 2), (0.1, 1)]
    for group in groups:
        group["lr"] = 0.0
        group["mark"] = None
    groups[2]["lr"] = -0.0
    assert merged() == [(0.0, 2), (0.0, 1)]
    groups.reverse()
    assert merged() == [(0.0, 1), (0.0, 2)]
    replaced = nn.Parameter(torch.ones(2))
    groups[0]["params"][0] = replaced
    groups[2]["lr"] = groups[1]["lr"] = groups[0]["lr"]
    with MergedGroups(optimizer):
        assert optimizer.param_groups[0]["params"][0] is replaced
    groups[1]["params"][0] = other = nn.Parameter(torch.ones(2))
    with MergedGroups(optimizer):
        assert optimizer.param_groups[0]["params"][1] is other
    groups[0]["params"].append(nn.Parameter(torch.ones(1)))
    assert merged() == [(-0.0, 4)]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -0.0})
    assert [count for _, count in merged()] == [4, 1]


def _scheduled(kind: Any, *, merge: bool) -> tuple[list[torch.Tensor], list[int]]:
    """Return parameters after steps whose rates change, and the merged groups."""
    rates = [0.1, 0.2, 0.1, 0.1, 0.2]
    optimizer = kind(_groups([{"lr": rate} for rate in rates]), lr=0.1)
    groups, seen = optimizer.param_groups, []
    step = type(optimizer).step

    def spied(self: Any) -> Any:
        seen.append(len(self.param_groups))
        return step(self)

    optimizer.step = spied.__get__(optimizer)
    cyclic = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=40, cycle_momentum=kind is torch.optim.AdamW
    )
    wrapper = fo.OptimWrapper(optimizer, merge_groups=merge)
    for index in range(12):
        for group in groups:
            group["params"][0].grad = torch.full((2, 3), 0.5)
        if index == 4:  # One parts.
            groups[3]["lr"] = 0.7
        if index == 5:  # Rates meet; their peaks stay apart.
            for group in groups:
                group["lr"] = 0.3
        if index == 6:  # Equal, but not the same.
            groups[1]["lr"] = 0.0
            for place in (0, 2, 3, 4):
                groups[place]["lr"] = -0.0
        wrapper.step()
        cyclic.step()
    return [group["params"][0].detach() for group in groups], seen


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_schedules_are_followed(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that change alike are written over; groups are merged anew if not."""
    anew = mock.Mock(wraps=_merging._merge)
    monkeypatch.setattr(_merging, "_merge", anew)
    merged, seen = _scheduled(kind, merge=True)
    single, _ = _scheduled(kind, merge=False)
    for a, b in zip(merged, single, strict=True):
        assert torch.equal(a, b)
    assert seen == [2, 2, 2, 2, 3, 2, 3, 2, 2, 2, 2, 2]
    assert anew.call_count == 1 + 4  # At first, and for the three changes and the end.

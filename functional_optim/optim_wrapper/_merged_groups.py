"""Step parameter groups with equal settings as one, while torch's optimizers step."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from functional_optim.algebra._torch_modes import untraced
from functional_optim.optim_wrapper._settings import LISTS, is_torch_optimizer


class MergedGroups:
    """A context in which groups with equal settings are one group."""

    # A generator would cost more than the rest of it, in a loop that leaves no cache.
    __slots__ = ("_groups", "_optimizer")

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @untraced
    def __enter__(self) -> None:
        optimizer = self._optimizer
        self._groups = groups = optimizer.param_groups
        if len(groups) > 1 and _may_merge(optimizer):
            merged = _merged_now(optimizer)
            if len(merged) < len(groups):
                optimizer.param_groups = merged

    def __exit__(self, *_: object) -> None:
        self._optimizer.param_groups = self._groups


def _may_merge(optimizer: Any) -> bool:
    """Return whether only torch's own code reads the groups during a step."""
    step = vars(optimizer).get("step")
    return (
        is_torch_optimizer(optimizer)
        and not isinstance(optimizer, torch.optim.LBFGS)
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and not _global_optimizer_pre_hooks
        and not _global_optimizer_post_hooks
        and (step is None or hasattr(step, "_wrapped_by_lr_sched"))
    )


class _Merging(NamedTuple):
    """Merged groups, and the groups as they were when they were merged."""

    merged: list[dict[str, Any]]
    firsts: list[int]  # For each merged group, the position of its first group.
    values: list[Any]  # The settings of all groups in a row.
    params: list[Tensor]
    sizes: list[int]


_last: weakref.WeakKeyDictionary[Any, _Merging] = weakref.WeakKeyDictionary()


def _merged_now(optimizer: Any) -> list[dict[str, Any]]:
    """Return the merged groups, those of the last step if nothing else has changed."""
    groups, last = optimizer.param_groups, _last.get(optimizer)
    flat = itertools.chain.from_iterable
    # Not the keys: those that torch reads are there in every group, from the start.
    values = list(flat(map(dict.values, groups)))
    lists = [group["params"] for group in groups]
    params, sizes = list(flat(lists)), list(map(len, lists))
    if (
        last is None
        or sizes != last.sizes
        or not all(map(operator.is_, params, last.params))
        or not _follow_values(last, groups, values)
    ):
        _last[optimizer] = last = _Merging(*_merge(groups), values, params, sizes)
    return last.merged


def _follow_values(
    last: _Merging, groups: list[dict[str, Any]], values: list[Any]
) -> bool:
    """Write changed settings into the merged groups, if the same groups are equal."""
    if _are_equal(values, last.values):
        return True
    width, *others = set(map(len, [*groups, *last.merged]))
    if others or len(values) != len(last.values):
        return False
    for index in range(width):
        column, before = values[index::width], last.values[index::width]
        if _are_equal(column, before):
            continue
        if _first_equal(column) != _first_equal(before):
            return False
        for group, first in zip(last.merged, last.firsts, strict=True):
            group[list(group)[index]] = column[first]
    last.values[:] = values
    return True


def _are_equal(values: Any, others: Any) -> bool:
    """Compare values, those that are the same object without a look at them."""
    try:
        return bool(values == others)
    except RuntimeError:  # Tensors that cannot be compared.
        return False


def _merge(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    merged: dict[Hashable, dict[str, Any]] = {}
    firsts = []
    for position, group in enumerate(groups):
        key = tuple((k, _setting_key(v)) for k, v in group.items() if k not in LISTS)
        if key not in merged:
            merged[key] = {**group, "params": []}
            firsts.append(position)
        merged[key]["params"].extend(group["params"])
    return list(merged.values()), firsts


def _first_equal(values: Sequence[Any]) -> list[int]:
    """Return for each value the position of the first one that has the same effect."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(_setting_key(value), i) for i, value in enumerate(values)]


def _setting_key(value: Any) -> Hashable:
    """Return a key that is equal only for values that have the same effect."""
    if type(value) is float and value:
        return value
    if isinstance(value, tuple):
        return tuple(map(_setting_key, value))
    if isinstance(value, float):
        return type(value), str(value)  # 0.0 equals -0.0.
    if value is None or isinstance(value, (bool, int, str)):
        return type(value), value
    return Tensor, id(value)

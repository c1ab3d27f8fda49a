"""Groups with equal settings, stepped as one.

A group for every parameter is what rules by name make, and costs a loop over groups in
each step. Merged copies take their place while an optimizer of torch steps; nobody else
sees them.
"""

from __future__ import annotations

import itertools
import math
import operator
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from functional_optim.algebra._torch_modes import untraced
from functional_optim.optim_wrapper._checkpoint import is_of_torch

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

_LISTS = ("params", "param_names")


class MergedGroups:
    """Let groups with equal settings be one group until the end of the block.

    Every parameter takes the same step, bit for bit. Nothing is merged where others
    look at the groups during a step: an optimizer that is not torch's own, or has step
    hooks.
    """

    # A generator would cost more than the rest of it, in a loop that leaves no cache.
    __slots__ = ("_optimizer", "_own")

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @untraced
    def __enter__(self) -> None:
        optimizer = self._optimizer
        self._own = own = optimizer.param_groups
        if len(own) > 1 and _may_merge(optimizer):
            merged = _merging_of(optimizer).merged
            if len(merged) < len(own):
                optimizer.param_groups = merged

    def __exit__(self, *_: object) -> None:
        self._optimizer.param_groups = self._own


def _may_merge(optimizer: Any) -> bool:
    step = vars(optimizer).get("step")
    return (
        is_of_torch(optimizer)
        and not isinstance(optimizer, torch.optim.LBFGS)
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and not _global_optimizer_pre_hooks
        and not _global_optimizer_post_hooks
        and (step is None or hasattr(step, "_wrapped_by_lr_sched"))
    )


class _Merging(NamedTuple):
    """Merged groups, and what the groups held that they were made of."""

    merged: list[dict[str, Any]]
    places: tuple[int, ...]
    """For every group, the first one of those that it is merged with."""
    values: list[Any]
    """Those of all groups in a row."""
    params: list[Tensor]
    sizes: list[int]


_last: weakref.WeakKeyDictionary[Any, _Merging] = weakref.WeakKeyDictionary()


def _merging_of(optimizer: Any) -> _Merging:
    """Return how the groups are merged now.

    Looking whether it is as in the last step takes a tenth of the time of merging.
    """
    groups, last = optimizer.param_groups, _last.get(optimizer)
    # Not the keys: those that torch reads are there in every group, from the start.
    flat = itertools.chain.from_iterable
    values = list(flat(map(dict.values, groups)))
    lists = [group["params"] for group in groups]
    params, sizes = list(flat(lists)), list(map(len, lists))
    if (
        last is None
        or sizes != last.sizes
        or not all(map(operator.is_, params, last.params))
        or not _holds(last, groups, values)
    ):
        _last[optimizer] = last = _Merging(*_merged(groups), values, params, sizes)
    return last


def _holds(last: _Merging, groups: list[dict[str, Any]], values: list[Any]) -> bool:
    """Whether the same groups have equal settings; takes over what schedules wrote."""
    if _are_equal(values, last.values):
        return True
    (count, *others) = set(map(len, groups))
    if others or len(values) != len(last.values):
        return False
    for index in range(count):
        column, before = values[index::count], last.values[index::count]
        if _are_equal(column, before):
            continue
        if not _is_told_by_equality(column) or not _is_told_by_equality(before):
            return False
        same = operator.itemgetter(*last.places)(column) == tuple(column)
        if not same or len(set(column)) < len(set(before)):  # Fewer: merge more.
            return False
        for merged, place in zip(last.merged, sorted(set(last.places)), strict=True):
            merged[list(groups[place])[index]] = column[place]
    last.values[:] = values
    return True


def _are_equal(some: Any, others: Any) -> bool:
    """Whether values are equal; those that are the same object are not looked at."""
    try:
        return bool(some == others)
    except RuntimeError:  # Tensors that cannot be compared.
        return False


def _is_told_by_equality(values: Collection[Any]) -> bool:
    """Whether values that are equal are sure to do the same."""
    kinds = set(map(type, values))
    if kinds == {tuple}:
        return _is_told_by_equality(list(itertools.chain.from_iterable(values)))
    return kinds == {float} and 0.0 not in values  # 0.0 equals -0.0.


def _merged(
    groups: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    found: dict[Hashable, tuple[int, dict[str, Any]]] = {}
    told: dict[int, Hashable] = {}  # Most values are the same object in all groups.
    places = []
    for place, group in enumerate(groups):
        key: list[Hashable] = [tuple(group)]
        for name, value in group.items():
            if name in _LISTS:
                continue
            index = id(value)
            if index not in told:
                told[index] = _identity_key(value)
            key.append(told[index])
        first, known = found.setdefault(tuple(key), (place, {**group, "params": []}))
        known["params"].extend(group["params"])
        places.append(first)
    return [known for _, known in found.values()], tuple(places)


def _identity_key(value: Any) -> Hashable:
    """Return what is equal only for values that do the same, also inside a tuple."""
    if isinstance(value, tuple):
        return tuple(map(_identity_key, value))
    if isinstance(value, float):
        return type(value), value, math.copysign(1.0, value)  # 0.0 is not -0.0 here.
    if value is None or isinstance(value, (bool, int, str)):
        return type(value), value
    return (Tensor, id(value))

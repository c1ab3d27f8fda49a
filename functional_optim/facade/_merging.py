"""Groups with equal settings, stepped as one.

A group for every parameter is what rules by name make, and costs a loop over groups in
each step. Merged copies take their place while an optimizer of torch steps; nobody else
sees them.
"""

from __future__ import annotations

import contextlib
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

from functional_optim.facade._fitting import is_of_torch

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

_LISTS = ("params", "param_names")


@contextlib.contextmanager
def merged_groups(optimizer: Any) -> Iterator[None]:
    """Let groups with equal settings be one group until the end of the block.

    Every parameter takes the same step, bit for bit. Nothing is merged where others
    look at the groups during a step: an optimizer that is not torch's own, or has step
    hooks.

    Args:
        optimizer: The optimizer.
    """
    own = optimizer.param_groups
    if len(own) < 2 or not _may_merge(optimizer):
        yield
        return
    merged = _merging_of(optimizer).merged
    if len(merged) == len(own):
        yield
        return
    optimizer.param_groups = merged
    try:
        yield
    finally:
        optimizer.param_groups = own


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
    values: list[Any]
    params: list[Tensor]
    sizes: list[int]


_last: weakref.WeakKeyDictionary[Any, _Merging] = weakref.WeakKeyDictionary()


def _merging_of(optimizer: Any) -> _Merging:
    """Return how the groups are merged now: as in the last step, if they are equal.

    Looking takes a tenth of the time of merging.
    """
    groups, last = optimizer.param_groups, _last.get(optimizer)
    # Not the keys: those that torch reads are there in every group, from the start.
    flat = itertools.chain.from_iterable
    values = list(flat([group.values() for group in groups]))
    lists = [group["params"] for group in groups]
    params, sizes = list(flat(lists)), list(map(len, lists))
    if (
        last is None
        or sizes != last.sizes
        or not all(map(operator.is_, params, last.params))
        or not _are_equal(values, last.values)
    ):
        _last[optimizer] = last = _Merging(_merged(groups), values, params, sizes)
    return last


def _are_equal(some: list[Any], others: list[Any]) -> bool:
    """Whether values are equal; those that are the same object are not looked at."""
    try:
        return some == others
    except RuntimeError:  # Tensors that cannot be compared.
        return False


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[Hashable, dict[str, Any]] = {}
    told: dict[int, Hashable] = {}  # Most values are the same object in all groups.
    for group in groups:
        key: list[Hashable] = [tuple(group)]
        for name, value in group.items():
            if name in _LISTS:
                continue
            index = id(value)
            if index not in told:
                told[index] = _told_apart(value)
            key.append(told[index])
        known = found.setdefault(tuple(key), {**group, "params": []})
        known["params"].extend(group["params"])
    return list(found.values())


def _told_apart(value: Any) -> Hashable:
    """Return what is equal only for values that do the same, also inside a tuple."""
    if isinstance(value, tuple):
        return tuple(map(_told_apart, value))
    if isinstance(value, float):
        return type(value), value, math.copysign(1.0, value)  # 0.0 is not -0.0 here.
    if value is None or isinstance(value, (bool, int, str)):
        return type(value), value
    return (Tensor, id(value))

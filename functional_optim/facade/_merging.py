"""Groups with equal settings, stepped as one.

A group for every parameter is what rules by name make, and costs a loop over groups in
each step. Merged copies take their place while an optimizer of torch steps; nobody else
sees them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    merged = _merged(own)
    if len(merged) == len(own):
        yield
        return
    optimizer.param_groups = merged
    try:
        yield
    finally:
        optimizer.param_groups = own


def _may_merge(optimizer: Any) -> bool:
    kind = type(optimizer)
    return (
        f"{kind.__module__}.".startswith("torch.optim.")
        and not isinstance(optimizer, torch.optim.LBFGS)
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
    )


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[Hashable, dict[str, Any]] = {}
    for group in groups:
        key = tuple(
            (name, _told_apart(value))
            for name, value in group.items()
            if name not in _LISTS
        )
        known = found.get(key)
        if known is None:
            found[key] = {**group, "params": list(group["params"])}
        else:
            known["params"].extend(group["params"])
    return list(found.values())


def _told_apart(value: Any) -> Hashable:
    """Return what is equal only for values that do the same, also inside a tuple."""
    if isinstance(value, tuple):
        return tuple(map(_told_apart, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value, str(value)  # 0.0 is not -0.0 here.
    return (Tensor, id(value))

"""Keys and values of groups: which mean something, and when one has changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from functional_optim._names import shown

TRANSFORM_STATE = "transform_state"
"""The key of the first group that has what belongs to the transform as a whole."""

OWN_KEYS = {"params", "param_names", "differentiable", TRANSFORM_STATE}
"""What every group has beside hyperparameters."""

_WRITTEN_BY_SCHEDULERS = ("initial_", "base_", "max_", "min_", "swa_")
_MEANINGFUL = {
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "momentum",
    "dampening",
    "max_norm",
    "amsgrad",
    "nesterov",
    "maximize",
}

_NOTHING_AT_ZERO = _MEANINGFUL - {"lr", "betas", "eps", "max_norm"}


def check_keys(
    group: Mapping[str, Any], own: set[str], elsewhere: Iterable[str], place: str
) -> bool:
    """Refuse a key that looks as if it meant something, and does not.

    Schedulers and users may keep their own things in a group. A decay of zero asks for
    nothing, so a transform without one is right; it may not become another number.

    Args:
        group: The group.
        own: The keys that mean something in it.
        elsewhere: Those that mean something in other groups.
        place: How to call the group in an error.

    Returns:
        Whether the answer may become another one with the same keys.

    Raises:
        ValueError: naming the key, and what was probably meant.
    """
    inert = {*own, *OWN_KEYS, *elsewhere}
    changeable = False
    for key, value in group.items():
        if key in inert or not isinstance(key, str):
            continue
        if key in _NOTHING_AT_ZERO and isinstance(value, (int, float)) and value == 0:
            changeable = True
            continue
        if key in _MEANINGFUL:
            remedy = "leave it out, or add a transform that has it"
            if key == "max_norm":
                remedy = "one clip sees all groups: set it in the transform"
            msg = (
                f"{place} has {key!r}, which no transform here has for each group; the "
                f"keys are {shown(sorted(own), most=20)}: {remedy}"
            )
            raise ValueError(msg)
        if key.startswith(_WRITTEN_BY_SCHEDULERS):
            continue
        near = difflib.get_close_matches(key.lower(), own, n=1, cutoff=0.85)
        if near:
            msg = f"{place} has {key!r}; did you mean {near[0]!r}?"
            raise ValueError(msg)
    return changeable


def same(a: Any, b: Any) -> bool:
    """Compare without a look at tensors: these are the same, or they may differ.

    Example:
        >>> same((0.9, 0.999), (0.9, 0.999)), same(0.1, 0.2)
        (True, False)
    """
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def key_of(value: Any) -> Any:
    """Return what tells values apart: numbers by value, all else by identity."""
    if isinstance(value, tuple):
        return tuple(map(key_of, value))
    if isinstance(value, (int, float)):
        return value
    return "object", id(value)


def two_owners(key: str) -> str:
    """Say that a schedule and somebody else set the same key."""
    return (
        f"{key} has two owners: the transform has a schedule for it, and something "
        "else, such as an LRScheduler, sets it in the groups; put a number into the "
        "transform, or leave the scheduler out"
    )


def fixed(key: str, value: object) -> str:
    """Say that a key decides structure."""
    return (
        f"{key} is {value} in the transform and cannot be changed in a group, because "
        "it decides the structure of the state; build an optimizer with another "
        "transform"
    )


def lacking(place: str, keys: Iterable[str]) -> str:
    """Say that a group has no value for what it must have one for."""
    return (
        f"{place} lacks {shown(sorted(keys), most=20)}; every group must have a value "
        "for what its transform has one for"
    )

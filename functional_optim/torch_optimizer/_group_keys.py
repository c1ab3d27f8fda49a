"""Validate keys of groups: which have an effect, and which are typos."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from functional_optim._messages import close_matches, format_names
from functional_optim.core._hyperparameters import is_schedule, is_zero
from functional_optim.torch_optimizer._group_hyperparameters import (
    GroupKey,
    group_value,
    parts_of,
)

TRANSFORM_STATE = "transform_state"
"""The key of the first group that holds the state of the transform as a whole."""

OWN_KEYS = {"params", "param_names", "differentiable", TRANSFORM_STATE}
"""Keys of groups that are no hyperparameters; `differentiable` is torch's."""

OPTIONS = {"transform", "amp_scaling", "compile", "notes"}
"""Arguments of the optimizer among its defaults; groups have none of them."""

_FLAGS = {"amsgrad", "nesterov", "maximize"}
_NO_EFFECT_AT_ZERO = {"weight_decay", "momentum", "dampening"} | _FLAGS
_MEANINGFUL = {"lr", "betas", "eps", "max_norm"} | _NO_EFFECT_AT_ZERO

ZERO_UNLESS_OWN = _NO_EFFECT_AT_ZERO - {"momentum"}
"""Keys that must be zero in other groups; schedulers cycle momentum in all of them."""

_WRITTEN_BY_SCHEDULERS = {
    before + key
    for before in ("initial_", "base_", "max_", "min_", "swa_")
    for key in ("lr", "momentum")
}
_ALIASES = {"learning_rate": "lr", "wd": "weight_decay", "l2": "weight_decay"}

_TYPO_LETTERS = 2
"""Letters that a typo adds or leaves out at most."""


def check_keys(
    group: Mapping[str, Any],
    own: set[str],
    elsewhere: Collection[str],
    place: str,
    *,
    new: bool = False,
) -> bool:
    """Refuse keys that look like hyperparameters and have no effect.

    Returns whether one is legal by its value only, which may be written later.
    """
    by_value = False
    for key, value in group.items():
        if not isinstance(key, str) or key in own | OWN_KEYS or key in elsewhere:
            continue
        # MMEngine's schedulers set momentum, and then betas by it.
        follows = not new and key == "momentum" and "betas" in own
        if (key in _NO_EFFECT_AT_ZERO and is_zero(value)) or (
            follows and group["betas"][0] == value
        ):
            by_value = True
            continue
        if key in _MEANINGFUL:
            remedy = "leave it out, or add a transform that has it"
            if key == "max_norm":
                remedy = "ClipByGlobalNorm sees all groups: set it in the transform"
            raise ValueError(
                f"{place} has {key!r}, which no transform here has for each group; the "
                f"keys are {format_names(sorted(own), most=20)}: {remedy}"
            )
        meant = None if key in _WRITTEN_BY_SCHEDULERS else _meant_key(key, own)
        if meant:
            raise ValueError(
                f"{place} has {key!r}; did you mean {meant!r}? If it is a note of your "
                f"own, say so: TransformOptimizer(..., notes=[{key!r}])"
            )
    return by_value


def _meant_key(key: str, own: Collection[str]) -> str | None:
    """Return the key of which another is a typo; `weight_decay_mult` is none."""
    if _ALIASES.get(key, "") in own:
        return _ALIASES[key]
    alike = close_matches(key, own, cutoff=0.8)
    return (
        alike[0] if alike and abs(len(key) - len(alike[0])) <= _TYPO_LETTERS else None
    )


def without_effect(key: str, value: Any) -> Any:
    """Return the value of a key of other groups for a group that has no use for it."""
    at_zero = key in _NO_EFFECT_AT_ZERO and isinstance(value, (int, float))
    return type(value)(0) if at_zero else group_value(value)


def check_written(option: GroupKey, value: Any, place: str) -> None:
    """Refuse a value that would need another state."""
    if any(map(is_schedule, parts_of(value))):
        raise TypeError(
            f"{place}: {option.key} must be a number or a 0-dim tensor, got {value!r}; "
            "put a schedule into the transform, and build the optimizer with it"
        )
    if option.field == "dampening" and is_zero(value) != is_zero(option.value):
        raise ValueError(f"{place}: {fixed_key(option.key, option.value)}")


def two_owners(key: str) -> str:
    """Return the message for a key that a schedule and something else set."""
    return (
        f"{key} has two owners: the transform has a schedule for it, and something "
        "else, such as an LRScheduler, sets it in the groups; put a number into the "
        "transform, or leave the scheduler out"
    )


def fixed_key(key: str, value: object) -> str:
    """Return the message for a key that decides structure."""
    return (
        f"{key} is {value} in the transform and cannot be changed in a group, because "
        "it decides the structure of the state; build an optimizer with another "
        "transform"
    )


# -- arguments of the optimizer ----------------------------------------------------

_REMOVED = {
    "layout": "small tensors are always gathered, as layout='auto' did; leave it out",
    "differentiable": "an optimizer steps in place; for derivatives through a step "
    "call transform.update and apply_updates(..., differentiable=True)",
}
"""Arguments of earlier versions, and what to do instead."""


def check_has_transform(transform: Any, defaults: Mapping[str, Any]) -> None:
    """Refuse arguments of earlier versions, and hyperparameters without a transform."""
    for name in _REMOVED.keys() & defaults.keys():
        raise TypeError(
            f"TransformOptimizer has no argument {name!r}: {_REMOVED[name]}"
        )
    if transform is None:
        numbers = ", ".join(f"{key}={value!r}" for key, value in defaults.items())
        raise TypeError(
            "TransformOptimizer needs a transform, in which the hyperparameters stand: "
            f"write TransformOptimizer(params, functional_optim.adamw({numbers}))"
        )


def check_defaults(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse hyperparameters beside the transform, unless they are all `defaults`."""
    if not defaults or own.keys() <= defaults.keys():
        return
    first = next(iter(defaults))
    remedy = "leave it out"
    if first in own:
        remedy = (
            f"hyperparameters stand in the transform: write adamw({first}="
            f"{defaults[first]!r}) there, or {{'params': ..., {first!r}: ...}} for a "
            "group"
        )
    raise TypeError(f"TransformOptimizer has no argument {first!r}; {remedy}")


def checked_notes(notes: Any) -> tuple[str, ...]:
    """Return the keys of groups that a user lists as notes."""
    single = isinstance(notes, str) or not isinstance(notes, Iterable)
    keys = (notes,) if single else tuple(notes)
    if not all(isinstance(note, str) for note in keys):
        raise TypeError(
            f'notes must be a list of keys of groups, such as ["lrs"], got {notes!r}'
        )
    return keys

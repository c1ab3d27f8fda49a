"""Keys and values of groups: which mean something, and when one has changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from functional_optim._messages import close_matches, format_names
from functional_optim.core._hyperparameters import is_schedule, is_zero

if TYPE_CHECKING:
    from functional_optim.torch_optimizer._group_hyperparameters import Option

TRANSFORM_STATE = "transform_state"
"""The key of the first group that has what belongs to the transform as a whole."""

OWN_KEYS = {"params", "param_names", "differentiable", TRANSFORM_STATE}
"""What every group has beside hyperparameters."""

OPTIONS = {"transform", "amp_scaling", "compile", "notes"}
"""What an optimizer has among its defaults, but no group."""

_WRITTEN_BY_SCHEDULERS = {
    before + key
    for before in ("initial_", "base_", "max_", "min_", "swa_")
    for key in ("lr", "momentum")
}
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
_SLIPS = 2
"""Letters that a slip of the pen adds or leaves out."""

_ALIASES = {"learning_rate": "lr", "wd": "weight_decay", "l2": "weight_decay"}

INERT_AT_ZERO = _NOTHING_AT_ZERO - {"momentum"}
"""What must be zero where nobody has it; schedulers cycle momentum in all groups."""


def check_keys(
    group: Mapping[str, Any],
    own: set[str],
    elsewhere: Iterable[str],
    place: str,
    *,
    new: bool,
) -> bool:
    """Refuse a key that looks as if it meant something, and does not.

    Schedulers and users may keep their own things in a group. A decay of zero asks for
    nothing, so a transform without one is right; it may not become another number.
    """
    inert = {*own, *OWN_KEYS, *elsewhere}
    changeable = False
    for key, value in group.items():
        if key in inert or not isinstance(key, str):
            continue
        if key in _NOTHING_AT_ZERO and isinstance(value, (int, float)) and value == 0:
            changeable = True
            continue
        follows = not new and key == "momentum" and "betas" in own
        if follows and group["betas"][0] == value:
            changeable = True  # MMEngine's schedulers set it, and then betas by it.
            continue
        if key in _MEANINGFUL:
            remedy = "leave it out, or add a transform that has it"
            if key == "max_norm":
                remedy = "ClipByGlobalNorm sees all groups: set it in the transform"
            raise ValueError(
                f"{place} has {key!r}, which no transform here has for each group; the "
                f"keys are {format_names(sorted(own), most=20)}: {remedy}"
            )
        if key in _WRITTEN_BY_SCHEDULERS:
            continue
        meant = _slip(key, own)
        if meant:
            raise ValueError(
                f"{place} has {key!r}; did you mean {meant!r}? If it is a note of your "
                f"own, say so: TransformOptimizer(..., notes=[{key!r}])"
            )
    return changeable


def checked_notes(notes: Any) -> tuple[str, ...]:
    """Return the keys that a user lists as notes."""
    found = (
        [notes]
        if isinstance(notes, str) or not isinstance(notes, Iterable)
        else [*notes]
    )
    if not all(isinstance(note, str) for note in found):
        raise TypeError(
            f'notes must be a list of keys of groups, such as ["lrs"], got {notes!r}'
        )
    return tuple(found)


def _slip(key: str, own: Iterable[str]) -> str | None:
    """Return the key that was probably meant: a letter or two are other ones.

    `weight_decay_mult` and the like are words of their own.
    """
    if _ALIASES.get(key, "") in own:
        return _ALIASES[key]
    alike = close_matches(key, own, cutoff=0.8)
    return alike[0] if alike and abs(len(key) - len(alike[0])) <= _SLIPS else None


def inert_value(key: str, value: Any) -> Any:
    """Return what a group shows for a key that means something in other groups only."""
    at_zero = key in _NOTHING_AT_ZERO and isinstance(value, (int, float))
    return type(value)(0) if at_zero else value


def check_inert(group: Mapping[str, Any], own: set[str], place: str) -> None:
    """Refuse a decay and the like where no transform has it, but others do."""
    for key in INERT_AT_ZERO - own:
        value = group.get(key, 0)
        if not isinstance(value, (int, float)) or value != 0:
            raise ValueError(
                f"{place} has {key}={value!r}, which no transform of its parameters "
                "has; write it into the groups where it means something"
            )


def check_written(option: Option, value: Any, place: str) -> None:
    """Refuse a value that would need another state."""
    if any(map(is_schedule, value if isinstance(value, tuple) else (value,))):
        raise TypeError(
            f"{place}: {option.key} must be a number or a 0-dim tensor, got {value!r}; "
            "put a schedule into the transform, and build the optimizer with it"
        )
    if option.field == "dampening" and is_zero(value) != is_zero(option.value):
        raise ValueError(f"{place}: {fixed(option.key, option.value)}")


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
        f"{place} lacks {format_names(sorted(keys), most=20)}; every group must "
        "have a value for what its transform has one for"
    )

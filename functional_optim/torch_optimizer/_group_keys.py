"""Find the keys of a group: the hyperparameters of its transforms, and all others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from functional_optim._messages import close_matches, format_names
from functional_optim.core._hyperparameters import is_schedule, is_zero, value_at
from functional_optim.core._transform import Role, Transform
from functional_optim.core._traversal import (
    Path,
    children_of,
    map_children,
    routes,
    routes_of,
)
from functional_optim.core._value_class import same_value
from functional_optim.transforms import Scale

Labels: TypeAlias = tuple[tuple[Path, str], ...]
"""The names that routers give to the parameters of a group, by path of the router."""

Stages: TypeAlias = dict[Path, Transform]
"""The transforms that serve a group, in order, by path."""


class GroupKey(NamedTuple):
    """A key of a group, and the fields that it sets."""

    key: str
    field: str
    paths: tuple[Path, ...]
    value: Any

    @property
    def scheduled(self) -> bool:
        """Whether a schedule decides it."""
        return any(map(is_schedule, parts_of(self.value)))

    def evaluated(self, count: Tensor) -> Any:
        """Return the value that its schedules have at a count."""
        now = tuple(value_at(part, count) for part in parts_of(self.value))
        return now if isinstance(self.value, tuple) else now[0]


def parts_of(value: Any) -> tuple[Any, ...]:
    """Return the numbers of a hyperparameter: a pair such as `betas` has two."""
    return value if isinstance(value, tuple) else (value,)


def labels_of(transform: Transform, name: str, param: Tensor) -> Labels:
    """Return the names that routers give to a parameter."""
    found = routes_of(transform, name, param)
    return tuple((path, label) for path, label in found if isinstance(label, str))


def stages_of(transform: Transform, labels: Labels, path: Path = ()) -> Stages:
    """Return the transforms that serve parameters with these labels."""
    stages = {path: transform}
    by_name = routes(transform)
    for label, child in children_of(transform).items():
        if not by_name or isinstance(label, int) or (path, label) in labels:
            stages |= stages_of(child, labels, (*path, label))
    return stages


def options_of(transform: Transform, labels: Labels) -> list[GroupKey]:
    """Return the keys of a group."""
    stages = stages_of(transform, labels)
    for path in _sign_flips(stages):
        del stages[path]
    return _keyed(stages, labels, _exposed)


def structure_of(transform: Transform, labels: Labels) -> dict[str, bool]:
    """Return the options that decide the structure of the state or of the formula."""
    stages = stages_of(transform, labels)
    flags = {option.key: option.value for option in _keyed(stages, labels, _flags)}
    return {**flags, "maximize": len(_sign_flips(stages)) % 2 == 1}


def _sign_flips(stages: Stages) -> list[Path]:
    """Return what presets put before a rule that descends for `maximize=True`."""
    leaves = [path for path, stage in stages.items() if not children_of(stage)]
    roles = [getattr(stages[path], "role", None) for path in leaves]
    if Role.LEARNING_RATE not in roles:
        return []
    descends = {Role.MOMENT, Role.LEARNING_RATE}
    first = next(i for i, role in enumerate(roles) if role in descends)
    return [path for path in leaves[:first] if stages[path] == Scale(-1.0)]


def _keyed(
    stages: Stages, labels: Labels, fields_of: Callable[[Transform], list[str]]
) -> list[GroupKey]:
    """Return the keys for fields of transforms; names come before those of several."""
    owners: dict[str, list[Path]] = {}
    for path, stage in stages.items():
        for field in fields_of(stage):
            owners.setdefault(field, []).append(path)
    options: dict[str, GroupKey] = {}
    for field, paths in owners.items():
        for path in paths:
            names = [
                label
                for depth, label in enumerate(path)
                if isinstance(label, str) and (path[:depth], label) not in labels
            ]
            key = ".".join([*names, field]) if len(paths) > 1 else field
            value = getattr(stages[path], field)
            known = options.setdefault(key, GroupKey(key, field, (), value))
            if not same_value(known.value, value):
                first, second = stages[known.paths[0]], stages[path]
                raise ValueError(
                    f"{key} has two values on one path, in {first!r} and in "
                    f'{second!r}; give one of them a name, such as Named("l2", '
                    f'{second!r}): its {field} is then "l2.{field}" in the groups'
                )
            options[key] = known._replace(paths=(*known.paths, path))
    return list(options.values())


def _exposed(transform: Transform) -> list[str]:
    """Return the fields of one transform that a group may have its own value of."""
    if not dataclasses.is_dataclass(transform):
        return []
    declared = getattr(type(transform), "hyperparameters", ())
    return [
        field.name
        for field in dataclasses.fields(transform)
        if (field.metadata.get("per_parameter") or field.name in declared)
        and not any(
            isinstance(part, Mapping)
            for part in parts_of(getattr(transform, field.name))
        )
    ]


def _flags(transform: Transform) -> list[str]:
    """Return the structural options of one transform that has hyperparameters."""
    if not _exposed(transform):
        return []
    own: Any = transform
    return [f.name for f in dataclasses.fields(own) if f.metadata.get("flag")]


def with_values(
    transform: Transform, changes: Mapping[Path, Mapping[str, Any]], path: Path = ()
) -> Transform:
    """Return a transform with other numbers in some places."""
    result: Any = map_children(
        transform, lambda label, child: with_values(child, changes, (*path, label))
    )
    if path in changes:
        result = dataclasses.replace(result, **changes[path])
    changed: Transform = result
    return changed


def group_value(value: Any) -> Any:
    """Return a hyperparameter for a group: schedulers write into copies of tensors."""
    if isinstance(value, tuple):
        return tuple(group_value(part) for part in value)
    return value.detach().clone() if isinstance(value, Tensor) else value


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
    "call transform.update(..., context=Context(differentiable=True)) and "
    "apply_updates(..., differentiable=True)",
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

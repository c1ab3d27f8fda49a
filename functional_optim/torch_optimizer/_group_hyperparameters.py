"""Map keys of groups, such as `lr`, to fields of the transforms that serve a group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from functional_optim.core._hyperparameters import is_schedule, value_at
from functional_optim.core._transform import Role, Transform
from functional_optim.core._traversal import Path, children_of, map_children, routes
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


def labels_of(
    transform: Transform, name: str, param: Tensor, path: Path = ()
) -> Labels:
    """Return the names that routers give to a parameter."""
    labels: Labels = ()
    children = children_of(transform)
    served = list(children)
    if routes(transform):
        router: Any = transform
        label = router.route(name, param)
        served = [] if label is None else [label]
        labels = ((path, label),) if isinstance(label, str) else ()
    for label in served:
        labels += labels_of(children[label], name, param, (*path, label))
    return labels


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

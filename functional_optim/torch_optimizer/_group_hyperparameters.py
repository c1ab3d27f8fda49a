"""Which hyperparameters a group of parameters shows, and what writing to them means.

A key of a group is the name of a field, such as `lr`. It stands for that field in every
transform that the group's parameters pass through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from functional_optim.core._hyperparameters import is_schedule
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

Choices: TypeAlias = tuple[tuple[Path, str], ...]
"""The names that routes give to the parameters of a group, by the path of the router.
"""

_DESCENDS = {Role.MOMENT, Role.LEARNING_RATE}


class GroupKey(NamedTuple):
    """A key of a group."""

    key: str
    field: str
    paths: tuple[Path, ...]
    value: Any

    @property
    def scheduled(self) -> bool:
        """Whether a schedule decides it."""
        return any(map(is_schedule, _parts(self.value)))


class Place(NamedTuple):
    """A transform inside another."""

    path: Path
    transform: Transform
    names: tuple[str, ...]
    choices: Choices


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _places(
    transform: Transform,
    path: Path = (),
    names: tuple[str, ...] = (),
    choices: Choices = (),
) -> Iterator[Place]:
    """Yield a transform and all inside it, with the names and routes on the way."""
    yield Place(path, transform, names, choices)
    is_router = routes(transform)
    for label, child in children_of(transform).items():
        below = (*path, label)
        if not isinstance(label, str):
            yield from _places(child, below, names, choices)
        elif is_router:
            yield from _places(child, below, names, (*choices, (path, label)))
        else:
            yield from _places(child, below, (*names, label), choices)


def on_path(transform: Transform, choices: Choices) -> list[Place]:
    """Return what the parameters with these labels pass, in order."""
    wanted = set(choices)
    return [p for p in _places(transform) if set(p.choices) <= wanted]


def choices_of(transform: Transform, name: str, param: Tensor) -> Choices:
    """Return the names that routes give to a parameter: labels of a `Partition`."""
    found = routes_of(transform, name, param)
    return tuple((path, label) for path, label in found if isinstance(label, str))


def options_of(transform: Transform, choices: Choices) -> list[GroupKey]:
    """Return the keys of a group."""
    places = on_path(transform, choices)
    turns = {place.path for place in _turns(places)}
    return _keyed([p for p in places if p.path not in turns], _exposed)


def _keyed(
    places: Sequence[Place], fields_of: Callable[[Transform], list[str]]
) -> list[GroupKey]:
    """Return the keys for fields of transforms; names come before those of several."""
    owners: dict[str, list[Place]] = {}
    for place in places:
        for field in fields_of(place.transform):
            owners.setdefault(field, []).append(place)
    options: dict[str, GroupKey] = {}
    for field, owning in owners.items():
        for place in owning:
            key = field
            if len(owning) > 1 and place.names:
                key = ".".join([*place.names, field])
            value = getattr(place.transform, field)
            known = options.get(key)
            if known is None:
                options[key] = GroupKey(key, field, (place.path,), value)
            elif not same_value(known.value, value):
                raise ValueError(_two_values(key, field, owning))
            else:
                options[key] = known._replace(paths=(*known.paths, place.path))
    return list(options.values())


def _exposed(transform: Transform) -> list[str]:
    """Return the fields of one transform that a group may have its own value of."""
    if not dataclasses.is_dataclass(transform):
        return []
    told = getattr(type(transform), "hyperparameters", ())
    return [
        field.name
        for field in dataclasses.fields(transform)
        if (field.metadata.get("per_parameter") or field.name in told)
        and not any(
            isinstance(p, Mapping) for p in _parts(getattr(transform, field.name))
        )
    ]


def _flags(transform: Transform) -> list[str]:
    """Return the structural options of one transform that has hyperparameters."""
    if not _exposed(transform):
        return []
    own: Any = transform
    return [f.name for f in dataclasses.fields(own) if f.metadata.get("flag")]


def _two_values(key: str, field: str, places: list[Place]) -> str:
    alike = [p for p in places if ".".join([*p.names, field]).endswith(key)]
    first = alike[0].transform
    second = next(
        place.transform
        for place in alike
        if not same_value(getattr(place.transform, field), getattr(first, field))
    )
    return (
        f"{key} has two values on one path, in {first!r} and in {second!r}; give one "
        f'of them a name, such as Named("l2", {second!r}): its {field} is then '
        f'"l2.{field}" in the groups'
    )


def structure_of(transform: Transform, choices: Choices) -> dict[str, bool]:
    """Return the options that decide the structure of the state or of the formula."""
    places = on_path(transform, choices)
    found = {option.key: option.value for option in _keyed(places, _flags)}
    found["maximize"] = len(_turns(places)) % 2 == 1
    return found


def _turns(places: Sequence[Place]) -> list[Place]:
    """Return what turns gradients around before a rule that descends gets them.

    That is what the presets make of `maximize=True`.
    """
    leaves = [place for place in places if not children_of(place.transform)]
    roles = [getattr(place.transform, "role", None) for place in leaves]
    if Role.LEARNING_RATE not in roles:
        return []
    first = next(i for i, role in enumerate(roles) if role in _DESCENDS)
    return [place for place in leaves[:first] if place.transform == Scale(-1.0)]


def scheduled_places(transform: Transform) -> dict[Path, Transform]:
    """Return the transforms of ours that hold a schedule, by path."""
    return {
        place.path: place.transform
        for place in _places(transform)
        if any(
            is_schedule(part)
            for field in _exposed(place.transform)
            for part in _parts(getattr(place.transform, field))
        )
    }


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
    """Return a hyperparameter as a group shows it: tensors are copied.

    Schedulers write into tensors of a group; the transform must not change.
    """
    if isinstance(value, tuple):
        return tuple(group_value(part) for part in value)
    return value.detach().clone() if isinstance(value, Tensor) else value

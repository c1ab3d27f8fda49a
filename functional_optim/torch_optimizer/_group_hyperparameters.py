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
from functional_optim.core._selection import picks
from functional_optim.core._transform import (
    Role,
    Transform,
    inner_transforms,
    with_inner,
)
from functional_optim.core._value_class import same_value
from functional_optim.transforms import Masked, Named, Partition, Scale

Path: TypeAlias = tuple[int, ...]
"""Where a transform stands: which of the inner transforms, at each depth."""

Choices: TypeAlias = tuple[tuple[Path, str], ...]
"""The labels that the parameters of a group have, by the path of the `Partition`."""


_DESCENDS = {Role.MOMENT, Role.LEARNING_RATE}


class Option(NamedTuple):
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
    """Yield a transform and all that is visible inside it."""
    yield Place(path, transform, names, choices)
    labels = list(transform.inner) if isinstance(transform, Partition) else []
    if isinstance(transform, Named):
        names = (*names, transform.name)
    for index, inner in enumerate(inner_transforms(transform)):
        chosen = (*choices, (path, labels[index])) if labels else choices
        yield from _places(inner, (*path, index), names, chosen)


def on_path(transform: Transform, choices: Choices) -> list[Place]:
    """Return what the parameters with these labels pass, in order."""
    wanted = set(choices)
    return [p for p in _places(transform) if set(p.choices) <= wanted]


def choices_of(transform: Transform, name: str, param: Tensor) -> Choices:
    """Return the labels that a parameter has, at every `Partition` that it passes."""
    return tuple(_chosen(transform, name, param, ()))


def _chosen(
    transform: Transform, name: str, param: Tensor, path: Path
) -> Iterator[tuple[Path, str]]:
    if isinstance(transform, Masked) and not picks(transform.mask, name, param):
        return
    chosen = None
    if isinstance(transform, Partition):
        label = transform.label_of(name, param)
        chosen = list(transform.inner).index(label)
        yield path, label
    for index, inner in enumerate(inner_transforms(transform)):
        if chosen in {None, index}:
            yield from _chosen(inner, name, param, (*path, index))


def options_of(transform: Transform, choices: Choices) -> list[Option]:
    """Return the keys of a group."""
    places = on_path(transform, choices)
    turns = {place.path for place in _turns(places)}
    return _keyed([p for p in places if p.path not in turns], _exposed)


def _keyed(
    places: Sequence[Place], fields_of: Callable[[Transform], list[str]]
) -> list[Option]:
    """Return the keys for fields of transforms; names come before those of several."""
    owners: dict[str, list[Place]] = {}
    for place in places:
        for field in fields_of(place.transform):
            owners.setdefault(field, []).append(place)
    options: dict[str, Option] = {}
    for field, owning in owners.items():
        for place in owning:
            key = field
            if len(owning) > 1 and place.names:
                key = ".".join([*place.names, field])
            value = getattr(place.transform, field)
            known = options.get(key)
            if known is None:
                options[key] = Option(key, field, (place.path,), value)
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
    leaves = [place for place in places if not inner_transforms(place.transform)]
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
    inner = iter(
        [
            with_values(part, changes, (*path, index))
            for index, part in enumerate(inner_transforms(transform))
        ]
    )
    result: Any = with_inner(transform, lambda _: next(inner))
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

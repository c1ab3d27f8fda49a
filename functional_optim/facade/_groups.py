"""The groups of an optimizer: what they show, and the transforms that they mean."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._names import shown
from functional_optim._parts import walk
from functional_optim._scheduling import ScheduleState, evaluate
from functional_optim._value import same_value
from functional_optim.facade._exposure import (
    Choices,
    Option,
    Path,
    group_value,
    options_of,
    scheduled_places,
    structure_of,
    with_values,
)

if TYPE_CHECKING:
    from functional_optim._types import TensorMap, Transform

OWN_KEYS = {"params", "param_names", "differentiable"}
_WRITTEN_BY_SCHEDULERS = ("initial_", "base_", "max_", "min_", "swa_")
_MEANINGFUL = {
    "lr", "betas", "eps", "weight_decay", "momentum", "dampening", "max_norm",
    "amsgrad", "nesterov", "maximize",
}  # fmt: skip


class Groups:
    """What the groups of an optimizer show, and what was written into them.

    Args:
        transform: The transform as the user gave it.
    """

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        self._options: list[list[Option]] = []
        self._structure: list[dict[str, bool]] = []
        self._choices: list[Choices] = []
        self._seen: list[tuple[Any, ...]] = []
        self._sizes: list[int] = []
        self._shown: list[tuple[int, str, Path, Tensor]] = []
        self._versions: list[int] = []
        self._scheduled = scheduled_places(transform)
        self._counts: dict[Path, ScheduleState] = {}

    def defaults(self, choices: Sequence[Choices]) -> dict[str, Any]:
        """Return what every group has, for parameters with these labels.

        Args:
            choices: The labels that there are.

        Raises:
            ValueError: two transforms have a field of one name with different values.
        """
        found: dict[str, Any] = {}
        for labels in choices or [()]:
            for option in options_of(self._transform, labels):
                found.setdefault(option.key, self._first_value(option))
            for key, value in structure_of(self._transform, labels).items():
                found.setdefault(key, value)
        return found

    def _first_value(self, option: Option) -> Any:
        """Return an option as a group shows it before the first step."""
        path = option.paths[0]
        if not option.scheduled:
            return group_value(option.value)
        held = self._scheduled[path]
        zero = torch.zeros((), dtype=torch.float64)
        now, _ = evaluate(held, ScheduleState(zero), {})
        return group_value(getattr(now, option.field))

    def own_values(self, choices: Choices, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a new group, those that the user gave included.

        Args:
            choices: The labels of its parameters.
            given: What the user gave.

        Raises:
            ValueError: a value for what a schedule or the structure decides, or that
                is not legal.
            TypeError: a value that is no hyperparameter.
        """
        values: dict[str, Any] = {}
        changes: dict[Path, dict[str, Any]] = {}
        for option in options_of(self._transform, choices):
            if option.key not in given:
                values[option.key] = self._first_value(option)
                continue
            if option.scheduled:
                raise ValueError(_two_owners(option.key, option.value))
            values[option.key] = given[option.key]
            for path in option.paths:
                changes.setdefault(path, {})[option.field] = given[option.key]
        with_values(self._transform, changes)  # Checks them.
        for key, value in structure_of(self._transform, choices).items():
            if given.get(key, value) != value:
                raise ValueError(_structural(key, value))
            values[key] = value
        return values

    def add(self, group: dict[str, Any], choices: Choices) -> None:
        """Watch one more group.

        Args:
            group: The group, with all its keys.
            choices: The labels of its parameters.
        """
        index = len(self._options)
        options = options_of(self._transform, choices)
        self._choices.append(choices)
        self._options.append(options)
        self._structure.append(structure_of(self._transform, choices))
        self._seen.append(())
        self._sizes.append(-1)
        for option in options:
            if not option.scheduled:
                continue
            parts = group[option.key]
            for part in parts if isinstance(parts, tuple) else (parts,):
                if isinstance(part, Tensor):
                    self._shown.append((index, option.key, option.paths[0], part))
                    self._versions.append(part._version)

    def connect(self, state: Any, params: TensorMap) -> None:
        """Find the counts that schedules are evaluated at.

        Args:
            state: The whole state; its tensors stay the same from step to step.
            params: All parameters.
        """
        places = {id(held): path for path, held in self._scheduled.items()}
        for stage in walk(self._transform, state, params):
            path = places.get(id(stage.transform))
            if path is None or path in self._counts:
                continue
            own = getattr(stage.state, "schedule", stage.state)
            if isinstance(own, ScheduleState):
                self._counts[path] = own

    def show_schedules(self, groups: list[dict[str, Any]]) -> None:
        """Write the values of the next step into the groups."""
        if not self._shown:
            return
        now = {
            path: evaluate(self._scheduled[path], count, {})[0]
            for path, count in self._counts.items()
        }
        fields = {
            (index, option.key): option.field
            for index, options in enumerate(self._options)
            for option in options
            if option.scheduled
        }
        positions: dict[tuple[int, str], int] = {}
        for place, (index, key, path, tensor) in enumerate(self._shown):
            value = getattr(now[path], fields[index, key])
            if isinstance(value, tuple):
                tensors = [part for part in value if isinstance(part, Tensor)]
                position = positions.get((index, key), 0)
                positions[index, key] = position + 1
                value = tensors[position]
            tensor.copy_(value)
            self._versions[place] = tensor._version

    def changed(self, groups: list[dict[str, Any]]) -> list[Transform] | None:
        """Return the transform of each group if somebody wrote into one, else None.

        Groups that agree share one object.

        Args:
            groups: The groups.

        Raises:
            ValueError: an unknown or structural key, a value that is not legal, a
                schedule and somebody else who writes the same key.
        """
        seen = []
        for index, (group, options) in enumerate(
            zip(groups, self._options, strict=True)
        ):
            if len(group) != self._sizes[index]:
                self.check_keys(group, index)
                self._sizes[index] = len(group)
            for key, value in self._structure[index].items():
                if group[key] is not value:
                    raise ValueError(_structural(key, value))
            seen.append(tuple([group[option.key] for option in options]))
        for (index, key, _, tensor), version in zip(
            self._shown, self._versions, strict=True
        ):
            value = groups[index][key]
            own = (
                any(p is tensor for p in value)
                if type(value) is tuple
                else value is tensor
            )
            if (
                not own
                or tensor._version != version
                or f"initial_{key}" in groups[index]
            ):
                raise ValueError(_two_owners(key, None))
        if all(map(_same_values, seen, self._seen)):
            return None
        transforms = self._transforms(seen)
        self._seen = seen
        return transforms

    def _transforms(self, seen: list[tuple[Any, ...]]) -> list[Transform]:
        known: dict[Any, Transform] = {}
        found = []
        for index, values in enumerate(seen):
            key = self._choices[index], tuple(map(_hashable, values))
            if key not in known:
                known[key] = self._with_values(index, values)
            found.append(known[key])
        return found

    def _with_values(self, index: int, values: tuple[Any, ...]) -> Transform:
        changes: dict[Path, dict[str, Any]] = {}
        for option, value in zip(self._options[index], values, strict=True):
            if option.scheduled or _same(value, option.value):
                continue
            for path in option.paths:
                changes.setdefault(path, {})[option.field] = value
        try:
            return with_values(self._transform, changes)
        except (ValueError, TypeError) as error:
            msg = f"param_groups[{index}]: {error}"
            raise type(error)(msg) from None

    def check_keys(self, group: Mapping[str, Any], index: int) -> None:
        """Refuse a key that looks as if it meant something, and does not.

        Schedulers and users may keep their own things in a group.

        Raises:
            ValueError: naming the key, and what was probably meant.
        """
        own = {option.key for option in self._options[index]} | set(
            self._structure[index]
        )
        self.check_unknown(group, own, f"param_groups[{index}]")

    def check_unknown(
        self, group: Mapping[str, Any], own: set[str], place: str
    ) -> None:
        """Refuse a key that looks as if it meant something; see `check_keys`."""
        inert = {*own, *OWN_KEYS, *self._everywhere()}
        for key in group:
            if key in inert or not isinstance(key, str):
                continue
            if key in _MEANINGFUL:
                msg = (
                    f"{place} has {key!r}, which no transform here has for each group; "
                    f"the keys are {shown(own, most=20)}. "
                    + (
                        "One clip sees all groups: set max_norm in the transform"
                        if key == "max_norm"
                        else "Leave it out, or add a transform that has it"
                    )
                )
                raise ValueError(msg)
            if key.startswith(_WRITTEN_BY_SCHEDULERS):
                continue
            near = difflib.get_close_matches(key.lower(), own, n=1, cutoff=0.85)
            if near:
                msg = f"{place} has {key!r}; did you mean {near[0]!r}?"
                raise ValueError(msg)

    def _everywhere(self) -> set[str]:
        """Return the keys that some group has: the others have them too, unused."""
        return {o.key for options in self._options for o in options} | {
            key for structure in self._structure for key in structure
        }

    @property
    def keys(self) -> list[list[str]]:
        """The keys of each group that a checkpoint sets."""
        return [
            [option.key for option in options if not option.scheduled]
            for options in self._options
        ]

    @property
    def structure(self) -> list[dict[str, bool]]:
        """The structural options of each group."""
        return self._structure

    def check_values(self, index: int, values: Mapping[str, Any]) -> None:
        """Refuse values of a checkpoint that are not legal.

        Raises:
            ValueError, TypeError: as at construction.
        """
        self._with_values(
            index,
            tuple(
                option.value if option.scheduled else values[option.key]
                for option in self._options[index]
            ),
        )


def _same(a: Any, b: Any) -> bool:
    """Compare without a look at tensors: these are the same, or they may differ."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) and not callable(b)


def _same_values(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    return len(now) == len(before) and all(map(_same, now, before))


def _hashable(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, (int, float)) and not isinstance(value, Tensor):
        return value
    return "object", id(value)


def _two_owners(key: str, schedule: Any) -> str:
    held = f" {schedule!r}" if schedule is not None else ""
    return (
        f"{key} has two owners: the transform has a schedule{held} for it, and something "
        f"else, such as an LRScheduler, sets it in the groups; put a number into the "
        "transform, or leave the scheduler out"
    )


def _structural(key: str, value: bool) -> str:  # noqa: FBT001
    return (
        f"{key} is {value} in the transform and cannot be changed in a group: it decides "
        f"the structure of the state; build an optimizer with another transform"
    )


__all__ = ["Groups", "same_value"]

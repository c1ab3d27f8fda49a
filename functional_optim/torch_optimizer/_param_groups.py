"""The groups of an optimizer: what they show, and the transforms that they mean."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functional_optim.core._hyperparameters import ScheduleState, evaluate
from functional_optim.core._traversal import Path, walk
from functional_optim.core._value_class import same_value
from functional_optim.torch_optimizer._group_hyperparameters import (
    Choices,
    Option,
    group_value,
    options_of,
    scheduled_places,
    structure_of,
    with_values,
)
from functional_optim.torch_optimizer._group_keys import (
    OPTIONS,
    OWN_KEYS,
    TRANSFORM_STATE,
    check_inert,
    check_keys,
    check_written,
    fixed,
    inert_value,
    key_of,
    lacking,
    two_owners,
)

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform


class _Shown(NamedTuple):
    group: int
    option: Option
    position: int
    tensor: Tensor


class Scheduled:
    """Keeps what groups show in step with the schedules of a transform."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        self._held = scheduled_places(transform)
        self._counts: dict[Path, ScheduleState] = {}
        self._shown: list[_Shown] = []
        self._versions: list[int] = []

    def first_value(self, option: Option) -> Any:
        """Return what a schedule gives before the first step."""
        zero = ScheduleState(torch.zeros((), dtype=torch.float64))
        now, _ = evaluate(self._held[option.paths[0]], zero, {})
        return group_value(getattr(now, option.field))

    def add(self, index: int, group: Mapping[str, Any], options: list[Option]) -> None:
        """Watch what one more group shows."""
        for option in options:
            if option.scheduled:
                for position, part in enumerate(_tensors(group[option.key])):
                    self._shown.append(_Shown(index, option, position, part))
                    self._versions.append(part._version)

    def forget(self, count: int) -> None:
        """Watch no groups after the first ones."""
        pairs = zip(self._shown, self._versions, strict=True)
        kept = [(shown, version) for shown, version in pairs if shown.group < count]
        self._shown = [shown for shown, _ in kept]
        self._versions = [version for _, version in kept]

    def connect(self, state: Any, params: TensorMap) -> None:
        """Find the counts that the schedules are evaluated at."""
        self._counts = {}
        for stage in walk(self._transform, state, params):
            own = getattr(stage.state, "schedule", stage.state)
            if stage.path in self._held and isinstance(own, ScheduleState):
                self._counts[stage.path] = own

    def show(self) -> None:
        """Write the values of the next step into the groups."""
        now = {
            path: evaluate(self._held[path], count, {})[0]
            for path, count in self._counts.items()
        }
        for shown in self._shown:
            value = getattr(now[shown.option.paths[0]], shown.option.field)
            shown.tensor.copy_(_tensors(value)[shown.position])
        self._versions = [shown.tensor._version for shown in self._shown]

    def check(self, groups: list[dict[str, Any]]) -> None:
        """Refuse that somebody else has written what a schedule decides."""
        for shown, version in zip(self._shown, self._versions, strict=True):
            group, key = groups[shown.group], shown.option.key
            here = _tensors(group[key])
            own = len(here) > shown.position and here[shown.position] is shown.tensor
            if not own or shown.tensor._version != version or f"initial_{key}" in group:
                raise ValueError(two_owners(key))


def _tensors(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, tuple) else (value,)
    return [part for part in parts if isinstance(part, Tensor)]


class Groups:
    """What the groups of an optimizer show, and what was written into them."""

    def __init__(self, transform: Transform, notes: Collection[str]) -> None:
        self._transform, self._notes = transform, notes
        self._options: list[list[Option]] = []
        self._structure: list[dict[str, bool]] = []
        self._choices: list[Choices] = []
        self._seen: list[tuple[Any, ...]] = []
        self._sizes: list[int] = []
        self._own: list[set[str]] = []
        self._params: list[list[Tensor]] = []
        self._scheduled = Scheduled(transform)
        self._cycled: list[Any] = []
        self._known: list[Transform] = []

    def defaults(self, choices: Sequence[Choices]) -> dict[str, Any]:
        """Return what every group has, for parameters with these labels."""
        found: dict[str, Any] = {}
        for labels in choices or [()]:
            for option in options_of(self._transform, labels):
                if option.key not in found:
                    found[option.key] = self._first_value(option)
            for key, value in structure_of(self._transform, labels).items():
                found.setdefault(key, value)
        return found

    def _first_value(self, option: Option) -> Any:
        """Return an option as a group shows it before the first step.

        A tensor is the user's own, in every group, as with torch.
        """
        if option.scheduled:
            return self._scheduled.first_value(option)
        return option.value

    def values_of_new(
        self,
        choices: list[Choices],
        given: Mapping[str, Any],
        defaults: Mapping[str, Any],
        written: Mapping[str, Any],
        place: str,
    ) -> list[dict[str, Any]]:
        """Return the values of new groups, those that the user gave included."""
        own = {option.key for c in choices for option in options_of(self._transform, c)}
        own |= {key for c in choices for key in structure_of(self._transform, c)}
        meant = {
            key: value
            for key, value in given.items()
            if key not in defaults or not _same(value, defaults[key])
        }
        check_keys(meant, own, self._notes, place, new=True)
        return [
            self._own_values(labels, given, defaults, written) for labels in choices
        ]

    def _own_values(
        self,
        choices: Choices,
        given: Mapping[str, Any],
        defaults: Mapping[str, Any],
        written: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the values of a new group, those that the user gave included."""
        values: dict[str, Any] = {}
        changes: dict[Path, dict[str, Any]] = {}
        chosen = {**written, **given}
        for option in options_of(self._transform, choices):
            if option.key not in chosen:
                values[option.key] = self._first_value(option)
                continue
            if option.scheduled:
                raise ValueError(two_owners(option.key))
            values[option.key] = chosen[option.key]
            for path in option.paths:
                changes.setdefault(path, {})[option.field] = chosen[option.key]
        with_values(self._transform, changes)  # Checks them.
        for key, value in structure_of(self._transform, choices).items():
            if chosen.get(key, value) != value:
                raise ValueError(fixed(key, value))
            values[key] = value
        inert = defaults.keys() - values.keys() - OWN_KEYS - OPTIONS - given.keys()
        shown = {key: group_value(inert_value(key, defaults[key])) for key in inert}
        return {**values, **shown}

    def add(self, group: dict[str, Any], choices: Choices) -> None:
        """Watch one more group."""
        index = len(self._options)
        options = options_of(self._transform, choices)
        self._choices.append(choices)
        self._options.append(options)
        self._structure.append(structure_of(self._transform, choices))
        self._own.append({option.key for option in options} | {*self._structure[-1]})
        self._seen.append((None,))  # Unlike any values, also unlike none.
        self._sizes.append(-1)
        self._params.append(list(group["params"]))
        self._cycled.append(group.get("betas"))
        self._scheduled.add(index, group, options)

    def forget(self, count: int) -> None:
        """Watch no groups after the first ones."""
        for own in (
            self._options,
            self._structure,
            self._choices,
            self._seen,
            self._sizes,
            self._own,
            self._params,
            self._cycled,
            self._known,
        ):
            del own[count:]
        self._scheduled.forget(count)

    def have_moved(self, groups: list[dict[str, Any]]) -> bool:
        """Whether groups have other parameters than when they were added."""
        return len(groups) != len(self._params) or not all(
            len(group["params"]) == len(known)
            and all(map(operator.is_, group["params"], known))
            for group, known in zip(groups, self._params, strict=True)
        )

    def connect(self, state: Any, params: TensorMap) -> None:
        """Find the counts of the schedules in a state; see `Scheduled`."""
        self._scheduled.connect(state, params)

    def show_schedules(self) -> None:
        """Write the values that schedules have at the next step into the groups."""
        self._scheduled.show()

    def changed(self, groups: list[dict[str, Any]]) -> list[Transform] | None:
        """Return the transform of each group if somebody wrote into one, else None.

        Groups that agree share one object.
        """
        seen = []
        for index, (group, options) in enumerate(
            zip(groups, self._options, strict=True)
        ):
            own, place = self._own[index], f"param_groups[{index}]"
            if len(group) != self._sizes[index]:
                again = self._check_keys(index, group)
                self._sizes[index] = -1 if again else len(group)
            check_inert(group, own, place)
            if "betas" not in own and group.get("betas") is not self._cycled[index]:
                self._follow_cycle(index, group)
            try:
                for key, value in self._structure[index].items():
                    if group[key] is not value:
                        raise ValueError(fixed(key, value))
                seen.append(tuple([_value(option, group) for option in options]))
            except KeyError as error:
                raise ValueError(lacking(place, error.args)) from None
        self._scheduled.check(groups)
        # Most steps find the very objects of the step before.
        if all(map(_all_same, seen, self._seen)):
            return None
        transforms = self._built(seen)
        self._seen, self._known = seen, transforms
        return transforms

    def _check_keys(self, index: int, group: Mapping[str, Any]) -> bool:
        """Refuse keys of a group that mean nothing; see `check_keys`."""
        elsewhere = {*self._notes, *set().union(*self._own)}
        place = f"param_groups[{index}]"
        return check_keys(group, self._own[index], elsewhere, place, new=False)

    def _follow_cycle(self, index: int, group: dict[str, Any]) -> None:
        """Copy the first beta that a scheduler cycled to momentum.

        torch's OneCycleLR and CyclicLR write either of the two into all groups.
        """
        before, self._cycled[index] = self._cycled[index], group["betas"]
        if "momentum" in self._own[index] and not _same(before, group["betas"]):
            group["momentum"] = group["betas"][0]

    def settle(self, groups: list[dict[str, Any]]) -> None:
        """Record the loaded betas, which no scheduler wrote."""
        self._cycled = [group.get("betas") for group in groups]

    def transforms(self, groups: list[dict[str, Any]]) -> list[Transform]:
        """Return the transform of each group, as `changed` does, in any case."""
        changed = self.changed(groups)
        return self._known if changed is None else changed

    def _built(self, seen: list[tuple[Any, ...]]) -> list[Transform]:
        known: dict[Any, Transform] = {}
        found = []
        for index, values in enumerate(seen):
            key = self._choices[index], tuple(map(key_of, values))
            if key not in known:
                known[key] = self._with_values(index, values)
            found.append(known[key])
        return found

    def _with_values(self, index: int, values: tuple[Any, ...]) -> Transform:
        changes: dict[Path, dict[str, Any]] = {}
        place = f"param_groups[{index}]"
        for option, value in zip(self._options[index], values, strict=True):
            if option.scheduled or _same(value, option.value):
                continue
            check_written(option, value, place)
            for path in option.paths:
                changes.setdefault(path, {})[option.field] = value
        try:
            return with_values(self._transform, changes)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{place}: {error}") from None

    @property
    def choices(self) -> list[Choices]:
        """The labels of the parameters of each group."""
        return self._choices

    @property
    def keys(self) -> list[list[str]]:
        """The keys of each group that a checkpoint sets."""
        return [
            [option.key for option in options if not option.scheduled]
            for options in self._options
        ]

    def owned(self, index: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return copies of what a step writes into a group."""
        shown = [option.key for option in self._options[index] if option.scheduled]
        found = {key: group_value(group[key]) for key in shown if key in group}
        if TRANSFORM_STATE in group:
            found[TRANSFORM_STATE] = copy.deepcopy(group[TRANSFORM_STATE])
        return found

    def fixed_keys(self, index: int) -> set[str]:
        """Return the keys of a group that only the transform decides."""
        keys = {option.key for option in self._options[index] if option.scheduled}
        return keys | set(self._structure[index])

    @property
    def structure(self) -> list[dict[str, bool]]:
        """The structural options of each group."""
        return self._structure

    def check_saved(self, index: int, saved: Mapping[str, Any]) -> None:
        """Refuse a group of a checkpoint that the next step could not follow."""
        self._with_values(
            index,
            tuple(
                option.value if option.scheduled else _value(option, saved)
                for option in self._options[index]
            ),
        )
        try:
            self._check_keys(index, saved)
            check_inert(saved, self._own[index], f"param_groups[{index}]")
        except ValueError as error:
            raise ValueError(
                f"{error}. It stands in the state dict: build the optimizer with the "
                "transform that it was saved with"
            ) from None


def _value(option: Option, group: Mapping[str, Any]) -> Any:
    """Return the value of an option; a list for a pair may be written into later."""
    value = group[option.key]
    pair = type(value) is list and isinstance(option.value, tuple)
    return tuple(value) if pair else value


def _all_same(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    if len(now) != len(before):
        return False
    return all(map(operator.is_, now, before)) or all(map(_same, now, before))


_same = functools.partial(same_value, tensors="identity")

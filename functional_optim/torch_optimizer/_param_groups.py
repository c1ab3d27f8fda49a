"""Read, validate and write the hyperparameters in `param_groups`."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._hyperparameters import Scheduled, is_zero
from functional_optim.core._transform import Transform
from functional_optim.core._traversal import Path, walk
from functional_optim.core._value_class import same_value
from functional_optim.torch_optimizer._group_keys import (
    OPTIONS,
    OWN_KEYS,
    ZERO_UNLESS_OWN,
    GroupKey,
    Labels,
    check_keys,
    check_written,
    fixed_key,
    group_value,
    options_of,
    parts_of,
    structure_of,
    two_owners,
    with_values,
    without_effect,
)
from functional_optim.torch_optimizer._params import (
    NamedParams,
    check_distinct,
    given_params,
    materialize_params,
    named_params,
    renamed_params,
    split_by_labels,
)

_same = functools.partial(same_value, tensors="identity")


class _ScheduledKey:
    """A key of a group with the value of a schedule, in tensors of the group."""

    def __init__(self, option: GroupKey, group: Mapping[str, Any]) -> None:
        self.option = option
        self._tensors = _tensors_in(group[option.key])
        self._versions = [tensor._version for tensor in self._tensors]

    def write(self, numbers: list[Tensor]) -> None:
        """Write the value of now into the tensors."""
        for tensor, number in zip(self._tensors, numbers, strict=True):
            tensor.copy_(number)
        self._versions = [tensor._version for tensor in self._tensors]

    def check_unwritten(self, group: Mapping[str, Any]) -> None:
        """Refuse a value that something else has written, too."""
        key = self.option.key
        tensors = _tensors_in(group[key])
        if (
            f"initial_{key}" in group
            or len(tensors) != len(self._tensors)
            or not all(map(operator.is_, tensors, self._tensors))
            or [tensor._version for tensor in tensors] != self._versions
        ):
            raise ValueError(two_owners(key))


class GroupRecord:
    """A group as it was read last: its parameters, keys, values and transform."""

    def __init__(
        self, transform: Transform, group: Mapping[str, Any], labels: Labels, place: str
    ) -> None:
        self.transform, self.labels, self.place = transform, labels, place
        self.params = list(group["params"])
        self.options = options_of(transform, labels)
        self.flags = structure_of(transform, labels)
        self.keys = {*self.flags, *[option.key for option in self.options]}
        self.zero_keys = ZERO_UNLESS_OWN - self.keys
        self.scheduled = [
            _ScheduledKey(option, group) for option in self.options if option.scheduled
        ]
        self.betas = group.get("betas")
        self.values: tuple[Any, ...] | None = None
        self.num_keys = -1

    def values_in(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the values of hyperparameters; pairs as tuples, since lists change."""
        values = [group[option.key] for option in self.options]
        if list in set(map(type, values)):
            pairs = zip(self.options, values, strict=True)
            values = [
                tuple(value)
                if type(value) is list and isinstance(option.value, tuple)
                else value
                for option, value in pairs
            ]
        return tuple(values)


class ParamGroups:
    """The groups of an optimizer: names of parameters, and hyperparameters."""

    def __init__(self, transform: Transform, notes: Collection[str]) -> None:
        self._transform, self._notes = transform, notes
        self.names: dict[Tensor, str] = {}
        self.records: list[GroupRecord] = []
        self._counts: dict[Path, Tensor] = {}

    def defaults(self, groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what every group has, after validating the parameters of all."""
        members: list[NamedParams] = []
        taken: set[str] = set()
        for group in groups:
            members.append(named_params(given_params(group), taken))
            taken.update(name for name, _ in members[-1])
        check_distinct(members)
        everyone = itertools.chain.from_iterable(members)
        defaults: dict[str, Any] = {}
        for labels in split_by_labels(self._transform, everyone):
            for key, value in self._initial_values(labels).items():
                defaults.setdefault(key, value)
        return defaults

    def _initial_values(self, labels: Labels) -> dict[str, Any]:
        """Return what a group has before the first step; tensors are the user's own."""
        zero = torch.zeros((), dtype=torch.float64)
        values = {
            option.key: group_value(option.evaluated(zero))
            if option.scheduled
            else option.value
            for option in options_of(self._transform, labels)
        }
        return {**values, **structure_of(self._transform, labels)}

    def new_groups(
        self,
        group: Mapping[str, Any],
        defaults: Mapping[str, Any],
        first_defaults: Mapping[str, Any],
    ) -> list[tuple[dict[str, Any], Labels, NamedParams]]:
        """Return the groups that a new one is split into, with labels and names."""
        group = materialize_params(group)
        members = given_params(group)
        params = named_params(members, self.names.values())
        check_distinct([params], self.names)
        split = split_by_labels(self._transform, params)
        is_named = group.get("param_names") is not None or any(
            n is not None for n, _ in members
        )
        given = {k: v for k, v in group.items() if k not in {"params", "param_names"}}
        initial = {labels: self._initial_values(labels) for labels in split}
        meant = {
            key: value
            for key, value in given.items()
            if key not in defaults or not _same(value, defaults[key])
        }
        own = {key for values in initial.values() for key in values}
        check_keys(meant, own, self._notes, self._next_place(), new=True)
        # As with torch, what was written into the defaults counts for new groups.
        written = {
            key: value
            for key, value in defaults.items()
            if not _same(value, first_defaults.get(key, value))
        }
        groups = []
        for labels, values in initial.items():
            self._set_values(values, labels, {**written, **given})
            for key in defaults.keys() - OWN_KEYS - OPTIONS - given.keys():
                if key not in values:
                    values[key] = without_effect(key, defaults[key])
            new = {**given, **values, "params": [param for _, param in split[labels]]}
            if is_named:
                new["param_names"] = [name for name, _ in split[labels]]
            groups.append((new, labels, split[labels]))
        return groups

    def _set_values(
        self, values: dict[str, Any], labels: Labels, given: Mapping[str, Any]
    ) -> None:
        """Set the values that are given for a new group, after validating them."""
        changed = [o for o in options_of(self._transform, labels) if o.key in given]
        for option in changed:
            if option.scheduled:
                raise ValueError(two_owners(option.key))
            values[option.key] = given[option.key]
        with_values(self._transform, _changes((o, values[o.key]) for o in changed))
        for key, value in structure_of(self._transform, labels).items():
            if given.get(key, value) != value:
                raise ValueError(fixed_key(key, value))

    def _next_place(self) -> str:
        return f"param_groups[{len(self.records)}]"

    def add(
        self, group: Mapping[str, Any], labels: Labels, params: NamedParams
    ) -> None:
        """Record one more group."""
        record = GroupRecord(self._transform, group, labels, self._next_place())
        self.records.append(record)
        self.names.update({param: name for name, param in params})

    @property
    def group_of(self) -> dict[str, int]:
        """The index of the group of each parameter, by name."""
        return {
            self.names[param]: index
            for index, record in enumerate(self.records)
            for param in record.params
        }

    def forget(self, count: int) -> None:
        """Forget the groups after the first ones, and the names of their parameters."""
        for record in self.records[count:]:
            for param in record.params:
                del self.names[param]
        del self.records[count:]

    def have_other_params(self, groups: list[dict[str, Any]]) -> bool:
        """Whether groups have other parameters than when they were recorded."""
        if len(groups) != len(self.records):
            return True
        for group, record in zip(groups, self.records, strict=True):
            params, known = group["params"], record.params
            if len(params) != len(known) or not all(map(operator.is_, params, known)):
                return True
        return False

    def reread(self, groups: list[dict[str, Any]]) -> ParamGroups:
        """Return the records of groups after their parameters were changed by hand."""
        reread = ParamGroups(self._transform, self._notes)
        everyone: list[NamedParams] = []
        here = {param for group in groups for param in group["params"]}
        known = {param: n for param, n in self.names.items() if param in here}
        for group in groups:
            place = reread._next_place()
            params = renamed_params(group, place, known, len(reread.names))
            everyone.append(params)
            known.update({param: name for name, param in params})
            labels, *others = split_by_labels(self._transform, params)
            if others:
                raise ValueError(
                    f"{place} has parameters of {1 + len(others)} labels; add new ones "
                    "with add_param_group, which gives each label a group of its own"
                )
            reread.add(group, labels, params)
        check_distinct(everyone)
        return reread

    # -- schedules -------------------------------------------------------------------

    def connect(self, state: Any, params: TensorMap) -> None:
        """Find the counts in a state at which schedules are evaluated."""
        self._counts = {}
        for stage in walk(self._transform, state, params):
            if isinstance(stage.state, Scheduled):
                self._counts[stage.path] = stage.state.num_updates
        for record in self.records:
            for each in record.scheduled:
                if each.option.paths[0] not in self._counts:
                    raise ValueError(
                        f"{each.option.key} is the schedule {each.option.value!r}, and "
                        "its transform's state counts no updates; make a Scheduled "
                        f"the state, or take {each.option.field!r} out of "
                        "`hyperparameters`"
                    )

    def write_schedules(self) -> None:
        """Write the values that schedules have at the next step into the groups."""
        now: dict[tuple[Path, str], list[Tensor]] = {}
        for record in self.records:
            for each in record.scheduled:
                path, field = each.option.paths[0], each.option.field
                if (path, field) not in now:
                    value = each.option.evaluated(self._counts[path])
                    now[path, field] = _tensors_in(value)
                each.write(now[path, field])

    # -- values ----------------------------------------------------------------------

    def transforms(self, groups: list[dict[str, Any]]) -> list[Transform]:
        """Return the transform of each group; groups that agree share one object."""
        self.changed(groups)
        return [record.transform for record in self.records]

    def changed(self, groups: list[dict[str, Any]]) -> list[Transform] | None:
        """Return the transform of each group if a value has changed, else None."""
        values = list(map(self._read, self.records, groups))
        before = [record.values for record in self.records]
        if all(map(_are_same, values, before)):
            return None
        known: dict[Any, Transform] = {}
        transforms = []
        for record, own in zip(self.records, values, strict=True):
            key = record.labels, tuple(map(_key_of, own))
            if key not in known:
                known[key] = self._with_values(record, own)
            transforms.append(known[key])
        # At once: after an error the next step finds the same changes.
        for record, own, new in zip(self.records, values, transforms, strict=True):
            record.values, record.transform = own, new
        return transforms

    def _read(self, record: GroupRecord, group: dict[str, Any]) -> tuple[Any, ...]:
        """Validate a group, and return the values of its hyperparameters."""
        if len(group) != record.num_keys:
            again = self._check_keys(record, group)
            record.num_keys = -1 if again else len(group)
        _check_zeros(record, group)
        try:
            if "betas" not in record.keys and group.get("betas") is not record.betas:
                # torch's OneCycleLR and CyclicLR cycle betas or momentum in all groups.
                before, record.betas = record.betas, group["betas"]
                if "momentum" in record.keys and not _same(before, record.betas):
                    group["momentum"] = group["betas"][0]
            for key, value in record.flags.items():
                if group[key] is not value:
                    raise ValueError(fixed_key(key, value))
            for each in record.scheduled:
                each.check_unwritten(group)
            return record.values_in(group)
        except KeyError as error:
            raise ValueError(
                f"{record.place} lacks {format_names(error.args)}; every group must "
                "have a value for what its transform has one for"
            ) from None

    def _check_keys(self, record: GroupRecord, group: Mapping[str, Any]) -> bool:
        elsewhere = {*self._notes, *[key for one in self.records for key in one.keys]}
        return check_keys(group, record.keys, elsewhere, record.place)

    def _with_values(self, record: GroupRecord, values: tuple[Any, ...]) -> Transform:
        """Return the transform with the values of a group, after validating them."""
        changed = [
            (option, value)
            for option, value in zip(record.options, values, strict=True)
            if not (option.scheduled or _same(value, option.value))
        ]
        for option, value in changed:
            check_written(option, value, record.place)
        try:
            return with_values(self._transform, _changes(changed))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{record.place}: {error}") from None

    # -- state dicts -----------------------------------------------------------------

    def check_saved(self, saved: list[dict[str, Any]]) -> None:
        """Refuse groups of a state dict that the next step could not go on from."""
        for record, theirs in zip(self.records, saved, strict=True):
            scheduled = {o.key: o.value for o in record.options if o.scheduled}
            missing = sorted(record.keys - scheduled.keys() - theirs.keys())
            if missing:
                raise ValueError(
                    f"{record.place} lacks {format_names(missing)} in the state dict; "
                    "it is of another transform. For one of torch.optim use "
                    "from_torch_state_dict"
                )
            for key, value in record.flags.items():
                if theirs[key] != value:
                    raise ValueError(
                        f"{record.place} has {key}={theirs[key]} in the state dict, "
                        f"{value} here; build the optimizer with the transform that it "
                        "was saved with"
                    )
            self._with_values(record, record.values_in({**theirs, **scheduled}))
            try:
                self._check_keys(record, theirs)
                _check_zeros(record, theirs)
            except ValueError as error:
                raise ValueError(
                    f"{error}. It stands in the state dict: build the optimizer with "
                    "the transform that it was saved with"
                ) from None

    def load(self, groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
        """Copy saved values into the groups; names only where a group has none."""
        for record, group, theirs in zip(self.records, groups, saved, strict=True):
            kept = OWN_KEYS - ({"param_names"} - group.keys())
            kept |= record.flags.keys() | {each.option.key for each in record.scheduled}
            new = {key: value for key, value in theirs.items() if key not in kept}
            group.update(copy.deepcopy(new))
            record.betas = group.get("betas")  # No scheduler wrote them.


def _are_same(now: tuple[Any, ...], before: tuple[Any, ...] | None) -> bool:
    """Whether values are the same; most are the very objects of the step before."""
    if before is None or len(now) != len(before):
        return False
    return all(map(operator.is_, now, before)) or all(map(_same, now, before))


def _changes(values: Iterable[tuple[GroupKey, Any]]) -> dict[Path, dict[str, Any]]:
    """Return values of keys by path and field, as `with_values` takes them."""
    changes: dict[Path, dict[str, Any]] = {}
    for option, value in values:
        for path in option.paths:
            changes.setdefault(path, {})[option.field] = value
    return changes


def _key_of(value: Any) -> Any:
    """Return a hashable key for a value: numbers by value, all else by identity."""
    if isinstance(value, tuple):
        return tuple(map(_key_of, value))
    return value if isinstance(value, (int, float)) else ("object", id(value))


def _tensors_in(value: Any) -> list[Tensor]:
    return [part for part in parts_of(value) if isinstance(part, Tensor)]


def _check_zeros(record: GroupRecord, group: Mapping[str, Any]) -> None:
    """Refuse a decay and the like in a group where no transform has it."""
    for key in record.zero_keys:
        value = group.get(key, 0)
        if not is_zero(value):
            raise ValueError(
                f"{record.place} has {key}={value!r}, which no transform of its "
                "parameters has; write it into the groups where it means something"
            )

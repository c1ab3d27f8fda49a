"""What others may do to an optimizer, and what it makes of it before a step."""

from __future__ import annotations

import copy
import importlib
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.algebra._torch_modes import untraced
from functional_optim.core._value_class import same_value
from functional_optim.execution._bucketing import ExecutionOptions
from functional_optim.execution.compiled._kernels import KernelCache
from functional_optim.torch_optimizer._engine import Engine
from functional_optim.torch_optimizer._group_keys import OPTIONS, TRANSFORM_STATE
from functional_optim.torch_optimizer._param_groups import Groups
from functional_optim.torch_optimizer._param_state import entries_of
from functional_optim.torch_optimizer._params import (
    by_choices,
    check_apart,
    check_group_parameters,
    members_of,
    named_members,
    numbered,
    read_once,
)
from functional_optim.torch_optimizer._state_dict import (
    Start,
    checked_groups,
    entries_at,
    loaded_options,
    plain,
    start_from,
    text_of,
)

if TYPE_CHECKING:
    from functional_optim.core._transform import Transform


class Tracking(torch.optim.Optimizer):
    """An optimizer over a transform that follows its parameters, groups and state.

    Schedulers write into groups, `model.to` moves parameters, trainers put others into
    a group or replace the state: what is found before a step is what counts in it.
    """

    _transform: Transform
    _compiles: bool
    _groups: Groups
    _engine: Engine | None
    _names: dict[Tensor, str]
    _notes: tuple[str, ...]
    _first_defaults: dict[str, Any]
    _warned: bool
    _step_supports_amp_scaling: bool

    def _start(self) -> None:
        self._engine, self._names, self._warned = None, {}, False

    @untraced
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with hyperparameters of their own where given."""
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # Says what is wrong.
        if self._engine is not None:
            with torch.no_grad():
                self._followed()
        param_group = read_once(param_group)
        members = members_of(param_group)
        named = any(name is not None for name, _ in members)
        members = numbered(members, self._names.values())
        check_group_parameters([members], list(self._names.items()))
        split = by_choices(self._transform, members, 0)
        options = {
            k: v for k, v in param_group.items() if k not in {"params", "param_names"}
        }
        # What was written into the defaults counts for new groups, as with torch.
        written = {
            key: value
            for key, value in self.defaults.items()
            if not same_value(
                value, self._first_defaults.get(key, value), tensors="identity"
            )
        }
        place = f"param_groups[{len(self.param_groups)}]"
        values = self._groups.values_of_new(
            list(split), options, self.defaults, written, place
        )
        if self._engine is not None:
            added = {p: n for some in split.values() for n, p in some}
            start = self._next_start({**self._names, **added})
        count = len(self.param_groups)
        for (labels, some), own in zip(split.items(), values, strict=True):
            params = some if named else [param for _, param in some]
            group = {**options, **own, "params": params}
            if not some and "param_names" in param_group:
                group["param_names"] = []  # No pair says that it has names.
            super().add_param_group(group)
            for key in OPTIONS:
                group.pop(key, None)
            self._groups.add(group, labels)
            self._names.update({param: name for name, param in some})
        if self._engine is not None:
            try:
                self._engine = self._built(start)
            except Exception:
                del self.param_groups[count:]
                self._groups.forget(count)
                for _, param in members:
                    del self._names[param]
                raise

    def _next_start(
        self,
        names: Mapping[Tensor, str],
        entries: Mapping[str, Mapping[str, Any]] | None = None,
        transform_state: Mapping[str, Any] | None = None,
    ) -> Start:
        """Return the state that these parameters go on from."""
        params = {name: param.detach() for param, name in names.items()}
        check_apart(params)
        if entries is None:
            entries = {n: entries_at(self.state, p, n) for p, n in names.items()}
        frozen = {
            name
            for param, name in names.items()
            if not param.requires_grad and param.grad is None
        }
        before = None if self._engine is None else self._engine.start
        return start_from(
            self._transform,
            params,
            entries,
            frozen=frozen,
            before=before,
            transform_state=transform_state,
        )

    def _built(self, start: Start) -> Engine:
        """Return an engine for the parameters as they are."""
        engine = self._engine_for(start)
        self._install(engine)
        return engine

    def _engine_for(self, start: Start) -> Engine:
        group_of = {
            self._names[param]: index
            for index, group in enumerate(self.param_groups)
            for param in group["params"]
        }
        return Engine(
            self._transform,
            self._names,
            group_of,
            self._groups.transforms(self.param_groups),
            start,
            options=ExecutionOptions(kernels=_kernels() if self._compiles else None),
        )

    def _install(self, engine: Engine) -> None:
        """Show what an engine has."""
        self._groups.connect(engine.state, engine.params())
        self._groups.show_schedules()
        engine.show(self.state)
        for group in self.param_groups:
            group.pop(TRANSFORM_STATE, None)
        if engine.rest_shown:
            self.param_groups[0][TRANSFORM_STATE] = engine.rest_shown

    def _followed(self, *, each: bool = False) -> Engine:
        """Return the engine after what others did to parameters, state and groups."""
        engine = self._engine
        if engine is None:
            engine = self._engine = self._built(self._next_start(self._names))
        elif self._groups.have_moved(self.param_groups):
            engine = self._engine = self._regrouped()
        elif (
            engine.survey.look()
            or engine.has_new_gradients()
            or not engine.follow(self.state, each=each)
        ):
            engine = self._engine = self._built(self._next_start(self._names))
        transforms = self._groups.changed(self.param_groups)
        if transforms is not None:
            engine.set_transforms(transforms)
        engine.show_replaced(self.state)
        return engine

    def _regrouped(self) -> Engine:
        """Return an engine for parameters that somebody put into groups by hand."""
        groups = Groups(self._transform, self._notes)
        everyone: list[list[tuple[str, Tensor]]] = []
        here = {param for group in self.param_groups for param in group["params"]}
        known = {param: n for param, n in self._names.items() if param in here}
        for index, group in enumerate(self.param_groups):
            place = f"param_groups[{index}]"
            count = sum(map(len, everyone))
            everyone.append(named_members(group, place, known, count))
            known.update({param: name for name, param in everyone[-1]})
            split = by_choices(self._transform, everyone[-1], 0)
            if len(split) > 1:
                raise ValueError(
                    f"{place} has parameters of {len(split)} labels; add new ones with "
                    "add_param_group, which gives each label a group of its own"
                )
            groups.add(group, next(iter(split)))
        check_group_parameters(everyone)
        names = {param: name for members in everyone for name, param in members}
        start = self._next_start(names)
        before = self._groups, self._names
        self._groups, self._names = groups, names
        try:
            return self._built(start)
        except Exception:
            self._groups, self._names = before
            raise

    def _load(self, data: Any) -> None:
        """Take over a state dict if all of it fits."""
        engine = self._followed()
        saved = checked_groups(data, self.param_groups, self._groups)
        params = [param for group in self.param_groups for param in group["params"]]
        indices = [index for group in saved for index in group["params"]]
        per_name: dict[str, Any] = {}
        notes: dict[Tensor, dict[str, Any]] = {}
        for param, index in zip(params, indices, strict=True):
            name = self._names[param]
            own = data["state"].get(index, {})
            # Keys that the transform does not have are the user's: kept, not checked.
            here = entries_at(self.state, param, name)
            others = here.keys() - engine.outlined(name).keys()
            if others and isinstance(own, dict):
                notes[param] = {key: own[key] for key in others & own.keys()}
                own = {key: own[key] for key in own.keys() - others}
            # torch.distributed has names, and says itself what is missing.
            may_lack = isinstance(index, str) or not param.requires_grad
            if own != {} or (index not in data["state"] and not may_lack):
                per_name[name] = own
        self._take(engine, per_name, saved[0].get(TRANSFORM_STATE, {}))
        for index, group in enumerate(self.param_groups):
            names = {k: group[k] for k in {"param_names"} & group.keys()}
            group.update(loaded_options(saved[index], self._groups, index) | names)
        self._groups.settle(self.param_groups)
        for param, found in notes.items():
            self.state[param].update(copy.deepcopy(found))
        known = {*indices, *range(len(indices))}
        for key in data["state"].keys() - known:
            self.state[key] = copy.deepcopy(data["state"][key])
        self._groups.show_schedules()
        self._followed()

    def _take(
        self, engine: Engine, per_name: Mapping[str, Any], rest: Mapping[str, Any]
    ) -> None:
        """Go on from a saved state; those without an entry begin afresh."""
        nodes = engine.loaded(per_name, rest)
        has = {name for name in engine.names.values() if engine.entries(name)}
        if has == {name for name, own in per_name.items() if own}:
            engine.check(nodes)
            engine.load(nodes)
            return
        found = {
            name: {
                k: v.clone() for k, v in entries_of(nodes, engine.keys, name).items()
            }
            for name in self._names.values()
        }
        engine = self._engine_for(self._next_start(self._names, found, rest))
        engine.check()
        for param, name in self._names.items():
            own = entries_at(self.state, param, name)
            for key in engine.outlined(name).keys() & own.keys():
                del self.state[param][key]
        self._install(engine)
        self._engine = engine

    def _packed(self, engine: Engine) -> dict[Any, Any]:
        """Return the state by index, as of this moment: nothing is shared with it."""
        params = [param for group in self.param_groups for param in group["params"]]
        packed: dict[Any, Any] = {}
        for index, param in enumerate(params):
            name = self._names[param]
            found = entries_at(self.state, param, name)
            # One without state says so by an empty dict: else it could have been lost.
            if found or engine.outlined(name):
                packed[index] = _copied(found)
        others = {k: v for k, v in self.state.items() if not isinstance(k, Tensor)}
        return packed | copy.deepcopy(others)

    def _packed_groups(self) -> list[dict[str, Any]]:
        """Return the groups with indices for parameters."""
        packed: list[dict[str, Any]] = []
        start = 0
        for index, group in enumerate(self.param_groups):
            end = start + len(group["params"])
            # Groups show what the next step changes: loading must not write into it.
            own = {**group, **self._groups.owned(index, group)}
            own["params"] = list(range(start, end))
            packed.append(plain(own))
            start = end
        return packed

    @untraced
    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: no plan, and no memory of others."""
        with torch.no_grad():
            self._followed(each=True)
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "state": dict(self.state),
            "_transform": self._transform,
            "_compiles": self._compiles,
            "_step_supports_amp_scaling": self._step_supports_amp_scaling,
            "_notes": self._notes,
            "_first_defaults": self._first_defaults,
            "_names": list(self._names.items()),
        }

    @untraced
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what pickle kept, or what torch's own code hands over: a part."""
        if "_names" not in state:
            super().__setstate__(state)
            return
        self._start()
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch puts it there.
        self._names = dict(state["_names"])
        self.defaults["transform"] = text_of(self._transform)
        self.state = defaultdict(dict, state["state"])
        self._groups = Groups(self._transform, self._notes)
        for group in self.param_groups:
            members = [(self._names[param], param) for param in group["params"]]
            self._groups.add(group, next(iter(by_choices(self._transform, members, 0))))
        saved = self.param_groups[0].get(TRANSFORM_STATE, {})
        with torch.no_grad():
            self._engine = self._built(
                self._next_start(self._names, transform_state=saved)
            )


def _copied(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of what the state has for a parameter, each tensor by itself."""
    return {
        key: value.detach().clone()
        if isinstance(value, Tensor)
        else copy.deepcopy(value)
        for key, value in found.items()
    }


def _kernels() -> KernelCache:
    # Imported when it is needed: the compiler takes seconds.
    inductor = importlib.import_module("functional_optim.execution.compiled._inductor")
    return KernelCache(inductor.compile_graph)

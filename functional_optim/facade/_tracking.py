"""What others may do to an optimizer, and what it makes of it before a step."""

from __future__ import annotations

import copy
import importlib
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from functional_optim.facade._engine import Engine
from functional_optim.facade._group_keys import TRANSFORM_STATE
from functional_optim.facade._groups import Groups
from functional_optim.facade._loading import checked_groups, loaded_options
from functional_optim.facade._members import (
    by_choices,
    check_group_parameters,
    members_of,
    named_members,
    read_once,
)

if TYPE_CHECKING:
    from torch import Tensor

    from functional_optim._types import Transform
    from functional_optim.execution._compiled import Compiling


class Tracking(torch.optim.Optimizer):
    """An optimizer over a transform that follows its parameters, groups and state.

    Schedulers write into groups, `model.to` moves parameters, trainers put others into
    a group or replace the state: what is found before a step is what counts in it.
    """

    _transform: Transform
    _differentiable: bool
    _compiles: bool
    _layout: str = "auto"
    _lays_anew: bool = False
    _groups: Groups
    _engine: Engine | None
    _names: dict[Tensor, str]
    _warned: bool
    _step_supports_amp_scaling: bool

    def _start(self) -> None:
        self._engine, self._names, self._warned = None, {}, False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with hyperparameters of their own where given.

        Args:
            param_group: `{"params": ..., "lr": 0.1, ...}`. Parameters with different
                labels of a `Partition` become several groups.

        Raises:
            ValueError, TypeError: as at construction; nothing is changed then.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # Says what is wrong.
        param_group = read_once(param_group)
        members = members_of(param_group, differentiable=self._differentiable)
        check_group_parameters([members], list(self._names.items()))
        split = by_choices(self._transform, members, len(self._names))
        options = {
            k: v for k, v in param_group.items() if k not in {"params", "param_names"}
        }
        place = f"param_groups[{len(self.param_groups)}]"
        values = self._groups.values_of_new(list(split), options, self.defaults, place)
        state = None
        if self._engine is not None:
            added = {p: n for some in split.values() for n, p in some}
            state = self._engine.state_for({**self._names, **added})
        named = any(name is not None for name, _ in members)
        for (labels, some), own in zip(split.items(), values, strict=True):
            params = some if named else [param for _, param in some]
            group = {**options, **own, "params": params}
            super().add_param_group(group)
            self._groups.add(group, labels)
            self._names.update({param: name for name, param in some})
        if self._engine is not None:
            self._engine = self._built(state)

    def _built(self, state: Any) -> Engine:
        """Return an engine for the parameters as they are, from a state or afresh."""
        group_of = {
            self._names[param]: index
            for index, group in enumerate(self.param_groups)
            for param in group["params"]
        }
        transforms = self._groups.transforms(self.param_groups)
        engine = Engine(
            self._transform,
            self._names,
            group_of,
            transforms,
            state,
            compiling=_compiling() if self._compiles else None,
            layout=self._layout,
            before=self._engine,
        )
        self._groups.connect(engine.state, engine.params())
        self._groups.show_schedules()
        engine.show(self.state)
        for group in self.param_groups:
            group.pop(TRANSFORM_STATE, None)
        if engine.rest_shown:
            self.param_groups[0][TRANSFORM_STATE] = engine.rest_shown
        return engine

    def _followed(self) -> Engine:
        """Return the engine after what others did to parameters, state and groups."""
        engine = self._engine
        if engine is None:
            engine = self._engine = self._built(None)
        elif self._groups.have_moved(self.param_groups):
            engine = self._engine = self._regrouped(engine)
        elif self._lays_anew:
            self._lays_anew = False
            engine = self._engine = self._built(engine.state_beside())
        elif engine.survey.look():
            engine = self._engine = self._built(engine.state_beside())
        engine.follow(self.state)
        transforms = self._groups.changed(self.param_groups)
        if transforms is not None:
            engine.set_transforms(transforms)
        return engine

    def _regrouped(self, engine: Engine) -> Engine:
        """Return an engine for parameters that somebody put into groups by hand."""
        groups = Groups(self._transform)
        everyone: list[list[tuple[str, Tensor]]] = []
        for index, group in enumerate(self.param_groups):
            place = f"param_groups[{index}]"
            count = sum(map(len, everyone))
            everyone.append(named_members(group, place, self._names, count))
            split = by_choices(self._transform, everyone[-1], 0)
            if len(split) > 1:
                msg = (
                    f"{place} has parameters of {len(split)} labels; add new ones with "
                    "add_param_group, which gives each label a group of its own"
                )
                raise ValueError(msg)
            groups.add(group, next(iter(split)))
        check_group_parameters(everyone)
        names = {param: name for members in everyone for name, param in members}
        state = engine.state_for(names)
        before = self._groups, self._names
        self._groups, self._names = groups, names
        try:
            built = self._built(state)
        except Exception:
            self._groups, self._names = before
            raise
        for param in before[1].keys() - names.keys():
            self.state.pop(param, None)
        return built

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
            # What a user has put beside our entries is none of our business.
            others = self.state[param].keys() - engine.entries(name).keys()
            if others and isinstance(own, dict):
                notes[param] = {key: own[key] for key in others & own.keys()}
                own = {key: own[key] for key in own.keys() - others}
            per_name[name] = own
        engine.load(per_name, saved[0].get(TRANSFORM_STATE, {}))
        for index, group in enumerate(self.param_groups):
            group.update(loaded_options(saved[index], self._groups, index))
        for param, found in notes.items():
            self.state[param].update(copy.deepcopy(found))
        self._groups.show_schedules()
        engine.follow(self.state)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: no plan, and no memory of others."""
        with torch.no_grad():
            saved = self._followed().own_copy()
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "_transform": self._transform,
            "_differentiable": self._differentiable,
            "_compiles": self._compiles,
            "_layout": self._layout,
            "_step_supports_amp_scaling": self._step_supports_amp_scaling,
            "_saved": (list(self._names.items()), saved),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what pickle kept, or what torch's own code hands over: a part."""
        if "_saved" not in state:
            super().__setstate__(state)
            return
        self._start()
        names, saved = state["_saved"]
        self.state = defaultdict(dict)
        super().__setstate__({k: v for k, v in state.items() if k != "_saved"})
        self._names = dict(names)
        self._groups = Groups(self._transform)
        for group in self.param_groups:
            members = [(self._names[param], param) for param in group["params"]]
            self._groups.add(group, next(iter(by_choices(self._transform, members, 0))))
        self._engine = self._built(saved)
        # While others of the pickle are made, their makers look at the parameters, too.
        self._lays_anew = self._layout == "flat"


def _compiling() -> Compiling:
    # Imported when it is needed: the compiler takes seconds.
    module = importlib.import_module("functional_optim.execution._compiled")
    compiling: Compiling = module.with_inductor()
    return compiling

"""Run a transform on the parameters of an optimizer, with its state up to date."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._context import Context
from functional_optim.core._transform import Transform
from functional_optim.execution._executor import Executor
from functional_optim.execution._grad_scaling import Scaling
from functional_optim.execution._group_transforms import joined
from functional_optim.execution._state_tree import flatten
from functional_optim.execution._units import ExecutionOptions
from functional_optim.execution.compiled._kernels import KernelCache
from functional_optim.torch_optimizer._gradients import GradientCollector, StateSnapshot
from functional_optim.torch_optimizer._param_groups import ParamGroups
from functional_optim.torch_optimizer._param_state import (
    StartingState,
    check_entries,
    entries_at,
    entries_of,
    fresh_state,
    global_entries_of,
    load_leaves,
)
from functional_optim.torch_optimizer._params import ShardCheck


class Engine:
    """A transform at work on the parameters of an optimizer."""

    def __init__(
        self,
        transform: Transform,
        groups: ParamGroups,
        transforms: list[Transform],
        start: StartingState,
        *,
        compiles: bool = False,
    ) -> None:
        self._transform, self.template = transform, start.template
        self._all_names = all_names = dict(groups.names)
        self._transforms, self._group_of = transforms, groups.group_of
        served = set(start.names)
        self.names = {p: name for p, name in all_names.items() if name in served}
        self.frozen = [p for p, name in all_names.items() if name not in served]
        """Parameters without state, until they have a gradient."""
        self.collector = GradientCollector(self.names, compiles=compiles)
        kernels = None
        if compiles:  # Imported when it is needed: the compiler takes seconds.
            inductor = "functional_optim.execution.compiled._inductor"
            kernels = KernelCache(importlib.import_module(inductor).compile_graph)
        self.executor = Executor(
            self.params(),
            transforms,
            self._group_of,
            start.state,
            options=ExecutionOptions(kernels=kernels),
            check_totals=ShardCheck(self.names, transform).check_totals,
        )
        self._state = self.executor.state
        self._shown = StateSnapshot({}, [])
        self.global_entries: dict[str, Any] = {}
        """The state of the transform as a whole, in the first group."""
        self.write_global_entries()

    def params(self) -> TensorMap:
        """Return the parameters that have state, by name."""
        return {name: param.detach() for param, name in self.names.items()}

    def all_params(self) -> TensorMap:
        """Return all parameters by name, also those that wait for a gradient."""
        return {name: param.detach() for param, name in self._all_names.items()}

    @property
    def state(self) -> Any:
        """The state by name, in the structure of the transform."""
        return self._state.tree

    @property
    def start(self) -> StartingState:
        """The state from which another engine goes on."""
        return StartingState(self.state, list(self.names.values()), self.template)

    @property
    def transform(self) -> Transform:
        """The transform with the values of the groups, by name where they differ."""
        return joined(self._transforms, self._group_of, self.all_params())

    def set_transforms(self, transforms: list[Transform]) -> None:
        """Go on with other hyperparameters; see `Executor`."""
        self._transforms = transforms
        self.executor.set_transforms(transforms)

    # -- optimizer.state -------------------------------------------------------------

    def entries(self, name: str) -> dict[str, Tensor]:
        """Return the state of one parameter, by the keys of `optimizer.state`."""
        return entries_of(self._state.leaves, self.template.keys, name)

    def first_entries(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of parameters before their first step, in new tensors."""
        params, keys = self.all_params(), self.template.keys
        fresh = flatten(fresh_state(self._transform, params, self.names.values()))
        return {name: entries_of(fresh, keys, name) for name in params}

    def write_state(self, state: MutableMapping[Tensor, Any]) -> None:
        """Write the tensors of the state into `optimizer.state`."""
        own = {param: self.entries(name) for param, name in self.names.items()}
        for param, entries in own.items():
            if entries or param in state:
                state.setdefault(param, {}).update(entries)
        self._shown = StateSnapshot(
            state, [e for some in own.values() for e in some.values()]
        )
        self._state.replaced = False

    def write_replaced_state(self, state: MutableMapping[Tensor, Any]) -> None:
        """Write the state if its tensors were replaced since it was written."""
        if self._state.replaced:
            self.write_state(state)

    def write_global_entries(self) -> None:
        """Write the state of the transform as a whole into the first group."""
        leaves = self._state.leaves
        self.global_entries.update(global_entries_of(leaves, self.template.keys))

    def sync_state(
        self, state: MutableMapping[Tensor, Any], *, each: bool = False
    ) -> bool:
        """Copy what was written into `optimizer.state`; False if the plan is old."""
        if self.collector.scan() or self._shown.has_moved(each=each):
            return False
        if self.frozen and any(param.grad is not None for param in self.frozen):
            return False
        if self._shown.is_in(state):
            return True
        changed: list[tuple[Tensor, Tensor]] = []
        for param, name in self._all_names.items():
            new, own = entries_at(state, param, name), self.template.entries(name)
            has_state = not own.keys().isdisjoint(new)
            if own and has_state != (param in self.names):
                return False
            if has_state:
                check_entries(name, new, own)
            for key, entry in self.entries(name).items():
                if new[key].dtype != entry.dtype:
                    return False
                if new[key] is not entry:
                    # It may be what another had: read before any is written.
                    changed.append((entry, new[key].clone()))
        for entry, value in changed:
            entry.copy_(value)
        self.write_state(state)
        return True

    # -- checkpoints -----------------------------------------------------------------

    def load_state(
        self, per_name: Mapping[str, Mapping[str, Any]], saved: Mapping[str, Any]
    ) -> dict[Tensor, dict[str, Tensor]] | None:
        """Load a saved state, or return its entries if other parameters have one."""
        template = self.template
        likes = [
            {n: leaf.get(n, like[n]) for n in like if n in per_name}
            if isinstance(leaf, dict) and isinstance(like, dict)
            else leaf
            for leaf, like in zip(self._state.leaves, template.leaves, strict=True)
        ]
        every_name = self._all_names.values()
        leaves = load_leaves(likes, template.keys, per_name, saved, every_name)
        has = {name for name in self.names.values() if self.entries(name)}
        if has != {name for name, own in per_name.items() if own}:
            return {
                param: {
                    key: entry.clone()
                    for key, entry in entries_of(leaves, template.keys, name).items()
                }
                for param, name in self._all_names.items()
            }
        self.executor.check(leaves)
        self.executor.load(leaves)
        self.write_global_entries()
        return None

    def check(self) -> None:
        """Refuse a state that the transform cannot go on from."""
        self.executor.check(self._state.leaves)

    def split_state(
        self, state: Any
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return a state by name as a checkpoint has it: by parameter, and the rest."""
        leaves, keys = flatten(state), self.template.keys
        if list(map(type, leaves)) != list(map(type, self.template.leaves)):
            raise ValueError(
                f"state is of another transform than {self._transform!r}: pass what "
                "its init or update returned"
            )
        names = {n for leaf in leaves if isinstance(leaf, dict) for n in leaf}
        per_name = {name: entries_of(leaves, keys, name) for name in names}
        return per_name, global_entries_of(leaves, keys)

    # -- steps -----------------------------------------------------------------------

    def step(
        self, grads: Mapping[str, Tensor], *, context: Context, scaling: Scaling | None
    ) -> None:
        """Update parameters and state in place."""
        if scaling is not None and self.executor.holds:
            raise ValueError(
                "a GradScaler cannot skip a micro-batch inside Accumulate; take it out "
                "of the transform and accumulate in .grad: call backward for each "
                "micro-batch, and step once"
            )
        self.executor.step(grads, context=context, scaling=scaling)
        if self.executor.holds:
            self.write_global_entries()

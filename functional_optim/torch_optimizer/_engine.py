"""What stands between an optimizer's tensors and the executor: who is whose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from functional_optim.execution._executor import Executor
from functional_optim.execution._group_transforms import joined
from functional_optim.execution._state_tree import nodes_of
from functional_optim.torch_optimizer._gradients import Shown, Survey
from functional_optim.torch_optimizer._param_state import (
    entries_of,
    loaded_nodes,
    rest_of,
)
from functional_optim.torch_optimizer._sharding import ShardCheck
from functional_optim.torch_optimizer._state_dict import (
    Start,
    check_entries,
    entries_at,
    fresh_state,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._context import Context
    from functional_optim.core._transform import Transform
    from functional_optim.execution._bucketing import ExecutionOptions
    from functional_optim.execution._grad_scaling import Scaling
    from functional_optim.execution._state_tree import Node


class Engine:
    """Runs a transform on the tensors of an optimizer, and shows its state."""

    def __init__(
        self,
        transform: Transform,
        everyone: Mapping[Tensor, str],
        group_of: Mapping[str, int],
        transforms: list[Transform],
        start: Start,
        *,
        options: ExecutionOptions,
    ) -> None:
        self._transform, self._outline = transform, start.outline
        self._everyone = dict(everyone)
        served = set(start.names)
        self.names = {p: name for p, name in everyone.items() if name in served}
        self.frozen = [p for p, name in everyone.items() if name not in served]
        self._group_of = group_of
        self._transforms = transforms
        params = self.params()
        self.survey = Survey(self.names, compiles=options.kernels is not None)
        """What looks at parameters and gradients."""
        self._executor = Executor(
            params,
            transforms,
            group_of,
            start.state,
            options=options,
            check_totals=ShardCheck(self.names, transform).check_totals,
        )
        self._store = self._executor.store
        self._keys = start.outline.keys
        self._shown = Shown({}, [])
        self.rest_shown: dict[str, Any] = {}
        """What belongs to the transform as a whole, as it is now."""
        self.show_rest()

    def params(self) -> TensorMap:
        """Return the parameters by name, as they are now."""
        return {name: param.detach() for param, name in self.names.items()}

    def everyone(self) -> TensorMap:
        """Return all parameters by name, those that wait for a gradient, too."""
        return {name: param.detach() for param, name in self._everyone.items()}

    @property
    def executor(self) -> Executor:
        """What runs the transform."""
        return self._executor

    @property
    def state(self) -> Any:
        """The whole state by name."""
        return self._store.state

    @property
    def keys(self) -> list[str]:
        """The keys of the nodes of a state."""
        return self._keys

    @property
    def start(self) -> Start:
        """What the next plan goes on from."""
        return Start(self.state, list(self.names.values()), self._outline)

    @property
    def transform(self) -> Transform:
        """The transform with what the groups say, by name where they differ."""
        return joined(self._transforms, self._group_of, self.everyone())

    def set_transforms(self, transforms: list[Transform]) -> None:
        """Go on with other numbers; see `Executor`."""
        self._transforms = transforms
        self._executor.set_transforms(transforms)

    def has_new_gradients(self) -> bool:
        """Whether a frozen parameter has its first gradient."""
        return any(param.grad is not None for param in self.frozen)

    # -- the state by parameter ------------------------------------------------------

    def show(self, state: MutableMapping[Tensor, Any]) -> None:
        """Write the state by parameter, as torch shows it; the tensors are ours."""
        own = {param: self.entries(name) for param, name in self.names.items()}
        for param, entries in own.items():
            if entries or param in state:
                state.setdefault(param, {}).update(entries)
        self._shown = Shown(state, [e for some in own.values() for e in some.values()])
        self._store.replaced = False

    def entries(self, name: str) -> dict[str, Tensor]:
        """Return the state of one parameter, by the keys that are shown."""
        return entries_of(self._store.nodes, self._keys, name)

    def outlined(self, name: str) -> dict[str, Tensor]:
        """Return what the state of any parameter looks like, on the meta device."""
        return self._outline.entries(name)

    def first_entries(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of parameters before their first step, in new tensors.

        Those that have none yet have entries without memory.
        """
        params = self.everyone()
        fresh = nodes_of(fresh_state(self._transform, params, self.names.values()))
        return {name: entries_of(fresh, self._keys, name) for name in params}

    def follow(self, state: MutableMapping[Tensor, Any], *, each: bool = False) -> bool:
        """Copy changed entries of `optimizer.state` into the memory of the plan."""
        if self._shown.have_moved(each=each):
            return False
        if not self.survey.shows(state, self._shown.everything):
            found: list[tuple[Tensor, Tensor]] = []
            for param, name in self._everyone.items():
                new, own = entries_at(state, param, name), self.outlined(name)
                is_there = not own.keys().isdisjoint(new)
                if own and is_there != (param in self.names):
                    return False
                if is_there:
                    check_entries(name, new, own)
                for key, entry in self.entries(name).items():
                    if new[key].dtype != entry.dtype:
                        return False
                    if new[key] is not entry:
                        # It may be what another had: read before any is written.
                        found.append((entry, new[key].clone()))
            for entry, value in found:
                entry.copy_(value)
            self.show(state)
        self.show_replaced(state)
        return True

    def show_replaced(self, state: MutableMapping[Tensor, Any]) -> None:
        """Write the state by parameter if its tensors are others now."""
        if self._store.replaced:
            self.show(state)

    # -- checkpoints -----------------------------------------------------------------

    def loaded(
        self, per_name: Mapping[str, Mapping[str, Any]], rest: Mapping[str, Any]
    ) -> list[Node]:
        """Return the nodes of a saved state, after all of it was checked."""
        likes = [
            {n: node[n] if n in node else like[n] for n in like if n in per_name}
            if isinstance(node, dict) and isinstance(like, dict)
            else node
            for node, like in zip(self._store.nodes, self._outline.nodes, strict=True)
        ]
        names = self._everyone.values()
        return loaded_nodes(likes, self._keys, per_name, rest, names)

    def check(self, nodes: list[Node] | None = None) -> None:
        """Refuse what the transform cannot go on from, such as a window too long."""
        self._executor.check(self._store.nodes if nodes is None else nodes)

    def load(self, nodes: list[Node]) -> None:
        """Take over the numbers of nodes over the same parameters."""
        self._executor.load(nodes)
        self.show_rest()

    def saved(self, state: Any) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return a state by name as a checkpoint has it: by parameter, and the rest."""
        nodes, own = nodes_of(state), self._outline.nodes
        if [type(node) for node in nodes] != [type(node) for node in own]:
            raise ValueError(
                f"state is of another transform than {self.transform!r}: pass what its "
                "init or update returned"
            )
        names = {n for node in nodes if isinstance(node, dict) for n in node}
        per_name = {name: entries_of(nodes, self._keys, name) for name in names}
        return per_name, rest_of(nodes, self._keys)

    def show_rest(self) -> None:
        """Write the state of the transform as a whole where it is shown."""
        self.rest_shown.update(rest_of(self._store.nodes, self._keys))

    # -- steps -----------------------------------------------------------------------

    def step(
        self,
        grads: Mapping[str, Tensor],
        *,
        context: Context,
        scaling: Scaling | None,
    ) -> None:
        """Step in place."""
        if scaling is not None and self._executor.holds:
            raise ValueError(
                "a GradScaler cannot skip a micro-batch inside Accumulate; take it out "
                "of the transform and accumulate in .grad: call backward for each "
                "micro-batch, and step once"
            )
        self._executor.step(grads, context=context, scaling=scaling)
        if self._executor.holds:
            self.show_rest()

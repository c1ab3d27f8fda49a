"""What stands between an optimizer's tensors and the executor: who is whose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from functional_optim._apply import apply_updates
from functional_optim._types import Static
from functional_optim.execution._executor import Executor
from functional_optim.execution._joining import joined
from functional_optim.execution._nodes import mapped, nodes_of, rebuilt
from functional_optim.facade._apart import check_apart
from functional_optim.facade._entries import (
    entries_of,
    initial,
    keys_of,
    loaded_nodes,
    rest_of,
)
from functional_optim.facade._laying import Laying, check_may_be_flat
from functional_optim.facade._survey import Survey, entries_in

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Set

    from functional_optim._context import Context
    from functional_optim._types import TensorMap, Transform
    from functional_optim.execution._compiled import Compiling
    from functional_optim.execution._nodes import Node
    from functional_optim.execution._runs import Scaling


class Engine:
    """Runs a transform on the tensors of an optimizer, and shows its state.

    Args:
        transform: The transform as the user gave it.
        names: Names of the parameters.
        group_of: The group of each.
        transforms: The transform of each group, now.
        state: The state to go on from; None makes a fresh one.
        compiling: Makes code of what runs on units; None runs without.
        layout: Where small parameters lie; see `TransformOptimizer`.
        before: What served some of them up to now.
    """

    def __init__(
        self,
        transform: Transform,
        names: Mapping[Tensor, str],
        group_of: Mapping[str, int],
        transforms: list[Transform],
        state: Any,
        *,
        compiling: Compiling | None = None,
        layout: str = "auto",
        before: Engine | None = None,
    ) -> None:
        self._transform = transform
        self.names = dict(names)
        self._group_of = group_of
        self._transforms = transforms
        params = self.params()
        check_apart(params)
        if state is None:
            state = initial(transform, params)
        self.survey = Survey(self.names, compiles=compiling is not None)
        """What looks at parameters and gradients."""
        self._laying: Laying | None = None
        if layout == "flat":
            check_may_be_flat(params)
            self._laying = Laying({name: param for param, name in names.items()})
            if before is not None:
                self._laying.disregard(before.executor.views())
        self._executor = Executor(
            params,
            transforms,
            group_of,
            state,
            compiling=compiling,
            apart=layout == "leaves",
            laying=self._laying,
        )
        self._settle()
        self._store = self._executor.store
        self._keys = keys_of(self._store.nodes, self._store.fields)
        self._shapes = {name: param.shape for name, param in params.items()}
        self._shown: list[Any] = []
        self.rest_shown: dict[str, Any] = {}
        """What belongs to the transform as a whole, as it is now."""
        self._show_rest()

    def _settle(self) -> None:
        """Where parameters lie after a new plan is where they should be."""
        if self._laying is not None and self._laying.finish():
            self.survey.restart()

    def params(self) -> TensorMap:
        """Return the parameters by name, as they are now."""
        return {name: param.detach() for param, name in self.names.items()}

    @property
    def executor(self) -> Executor:
        """What runs the transform."""
        return self._executor

    @property
    def state(self) -> Any:
        """The whole state by name."""
        return self._store.state

    @property
    def transform(self) -> Transform:
        """The transform with what the groups say, by name where they differ."""
        return joined(self._transforms, self._group_of, self.params())

    def set_transforms(self, transforms: list[Transform]) -> None:
        """Go on with other numbers; see `Executor`."""
        self._transforms = transforms
        self._executor.set_transforms(transforms)
        self._settle()

    def state_beside(self) -> Any:
        """Return the state on the device where the parameters lie now.

        Raises:
            ValueError: a parameter has another shape than its state.
        """
        for param, name in self.names.items():
            if param.shape != self._shapes[name]:
                msg = (
                    f"parameter {name!r} has the shape {tuple(param.shape)} now, and "
                    f"had {tuple(self._shapes[name])} when its state was made; build "
                    "the optimizer anew"
                )
                raise ValueError(msg)
        device = next(iter(self.names)).device
        return mapped(self.state, lambda entry: entry.to(device))

    def state_for(self, names: Mapping[Tensor, str]) -> Any:
        """Return the state for other parameters; those that were here keep theirs.

        Args:
            names: Names of all parameters, old and new ones.
        """
        params = {name: param.detach() for param, name in names.items()}
        check_apart(params)
        fresh = initial(self._transform, params)
        gone = {n for p, n in self.names.items() if names.get(p) != n}
        nodes = [
            _continued(known, new, gone)
            for new, known in zip(nodes_of(fresh), self._store.nodes, strict=True)
        ]
        return rebuilt(fresh, iter(nodes))

    # -- the state by parameter ------------------------------------------------------

    def show(self, state: MutableMapping[Tensor, Any]) -> None:
        """Write the state by parameter, as torch shows it; the tensors are ours."""
        for param, name in self.names.items():
            state.setdefault(param, {}).update(self.entries(name))
        self._shown = entries_in(state)
        self._store.replaced = False

    def entries(self, name: str) -> dict[str, Tensor]:
        """Return the state of one parameter, by the keys that are shown."""
        return entries_of(self._store.nodes, self._keys, name)

    def first_entries(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of every parameter before its first step, in new tensors."""
        fresh = nodes_of(self._transform.init(self.params()))
        return {n: entries_of(fresh, self._keys, n) for n in self.names.values()}

    def follow(self, state: MutableMapping[Tensor, Any]) -> None:
        """Take over what others did to what was shown since then.

        Args:
            state: What `show` wrote into.
        """
        if not self.survey.shows(state, self._shown):
            self._adopt(state)
        self.show_replaced(state)

    def show_replaced(self, state: MutableMapping[Tensor, Any]) -> None:
        """Write the state by parameter if its tensors are others now."""
        if self._store.replaced:
            self.show(state)

    def _adopt(self, state: MutableMapping[Tensor, Any]) -> None:
        """Take over entries that somebody replaced; removed ones begin again.

        Raises:
            ValueError: an entry does not have the shape of what it replaces.
        """
        first = self.first_entries()
        found: list[tuple[Tensor, Tensor]] = []
        for param, name in self.names.items():
            own = state.get(param, {})
            for key, entry in self.entries(name).items():
                new = own.get(key, first[name][key])
                if not isinstance(new, Tensor) or new.shape != entry.shape:
                    msg = (
                        f"state of {name!r}: {key} must be a tensor of shape "
                        f"{tuple(entry.shape)}, got {new!r}"
                    )
                    raise ValueError(msg)
                if new is not entry:
                    # It may be what another parameter had: read before any is written.
                    found.append((entry, new.clone()))
        for entry, new in found:
            entry.copy_(new)
        self.show(state)

    # -- checkpoints -----------------------------------------------------------------

    def _show_rest(self) -> None:
        self.rest_shown.update(rest_of(self._store.nodes, self._keys))

    def load(
        self, per_name: Mapping[str, Mapping[str, Any]], rest: Mapping[str, Any]
    ) -> None:
        """Take over a saved state, after all of it was checked; see `loaded_nodes`."""
        nodes = loaded_nodes(self._store.nodes, self._keys, per_name, rest)
        self._executor.check(nodes)
        self._executor.load(nodes)
        self._settle()
        self._show_rest()

    def take(self, state: Any) -> None:
        """Take over a state by name.

        Raises:
            ValueError: it is of another transform, or of other parameters.
        """
        nodes, own = nodes_of(state), self._store.nodes
        if [type(node) for node in nodes] != [type(node) for node in own]:
            msg = (
                f"state is of another transform than {self.transform!r}: pass what its "
                "init or update returned"
            )
            raise ValueError(msg)
        names = {n for node in nodes if isinstance(node, dict) for n in node}
        names |= set(self.names.values())
        per_name = {name: entries_of(nodes, self._keys, name) for name in names}
        self.load(per_name, rest_of(nodes, self._keys))

    def own_copy(self) -> Any:
        """Return the state in memory of its own, every tensor by itself."""
        return mapped(self.state, Tensor.clone)

    # -- steps -----------------------------------------------------------------------

    def step(
        self,
        grads: Mapping[str, Tensor],
        *,
        context: Context,
        scaling: Scaling | None,
    ) -> None:
        """Step in place.

        Args:
            grads: Gradients by name.
            context: What the loop knows.
            scaling: What a gradient scaler asks for.

        Raises:
            ValueError: a scaler, and a window that it could skip a part of.
        """
        if scaling is not None and self._executor.holds:
            msg = (
                "a GradScaler cannot skip a micro-batch inside Accumulate; take it out "
                "of the transform and accumulate in .grad: call backward for each "
                "micro-batch, and step once"
            )
            raise ValueError(msg)
        self._executor.step(grads, context=context, scaling=scaling)
        self._settle()
        if self._executor.holds:
            self._show_rest()

    def step_recorded(self, grads: Mapping[str, Tensor], *, context: Context) -> None:
        """Step with a graph: everything at once, out of place.

        Args:
            grads: Gradients by name.
            context: What the loop knows.
        """
        params: TensorMap = {name: param for param, name in self.names.items()}
        moved, state = self.transform.update(
            dict(grads), self.state, params, context=context
        )
        new = apply_updates(params, moved, differentiable=True)
        for name in moved:
            params[name].copy_(new[name])
        self._store.replace(state)
        self._show_rest()


def _continued(known: Node, fresh: Node, gone: Set[str]) -> Node:
    """Return a node for other parameters; what the names in `gone` had is dropped."""
    if isinstance(known, dict) and isinstance(fresh, dict):
        return {**fresh, **{n: old for n, old in known.items() if n not in gone}}
    if isinstance(known, Static) and isinstance(known.value, tuple):
        return Static(tuple(told for told in known.value if told not in gone))
    return known

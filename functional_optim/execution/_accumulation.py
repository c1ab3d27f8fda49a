"""What holds and what emits: the `Static` part of a step, decided once for all units.

A unit cannot know by itself that others were given something. So the whole update runs
on stand-ins without memory, and tells the next `Static` values and the names that come
out; the answer depends on nothing but what is known on the host, and is remembered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor

from functional_optim.core._context import Context
from functional_optim.core._transform import Scope, Static, Transform
from functional_optim.core._traversal import Label, children_of, map_children, routes
from functional_optim.execution._state_tree import mapped, nodes_of, rebuilt

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.execution._state_tree import Node

_MOST_KNOWN = 256
"""Where gradients are missing by chance, no answer is asked for twice."""


class Structure(NamedTuple):
    """What a step does to structure."""

    statics: dict[int, Static[Any]]
    touched: frozenset[str]


class Windows:
    """Tells what a step does to structure."""

    def __init__(self, transform: Transform, template: Any, params: TensorMap) -> None:
        self._transform, self._template = transform, template
        self._params = params
        self._known: dict[Hashable, Structure] = {}

    def structure(
        self,
        given: dict[str, torch.dtype],
        nodes: list[Node],
        *,
        context: Context,
    ) -> Structure:
        """Return what a step does."""
        key = tuple(given.items()), statics_of(nodes), context.last
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._tried(given, nodes, context)
        return self._known[key]

    def _tried(
        self, given: dict[str, torch.dtype], nodes: list[Node], context: Context
    ) -> Structure:
        context = dataclasses.replace(context, loss=None, weight=None)
        try:
            return self._tried_on(_without_memory, given, nodes, context)
        except RuntimeError:
            # Something reads a number on the host, such as error_if_nonfinite: zeros
            # have one, at the price of results as large as the parameters.
            return self._tried_on(_of_zeros, given, nodes, context)

    def _tried_on(
        self,
        stand_in: Callable[[Tensor], Tensor],
        given: dict[str, torch.dtype],
        nodes: list[Node],
        context: Context,
    ) -> Structure:
        state = mapped(rebuilt(self._template, iter(nodes)), stand_in)
        before = nodes_of(state)
        params = {name: stand_in(param) for name, param in self._params.items()}
        updates = {name: params[name].to(dtype) for name, dtype in given.items()}
        moved, new_state = self._transform.update(
            updates, state, params, context=context
        )
        touched = set(moved)
        statics = {}
        for index, (old, new) in enumerate(
            zip(before, nodes_of(new_state), strict=True)
        ):
            if isinstance(new, Static):
                statics[index] = new
            elif isinstance(old, dict) and isinstance(new, dict):
                touched |= {name for name in old if new[name] is not old[name]}
        return Structure(statics, frozenset(touched))


def statics_of(nodes: list[Node]) -> Hashable:
    """Return the values that are known on the host."""
    return tuple(node.value for node in nodes if isinstance(node, Static))


def _without_memory(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _of_zeros(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(()).expand(tensor.shape)


@final
@dataclasses.dataclass(frozen=True)
class _Resting:
    """A transform that is not run, with its state as it is."""

    inner: Transform

    @property
    def scope(self) -> Scope:
        return self.inner.scope

    def init(self, params: TensorMap) -> Any:
        return self.inner.init(params)

    def update(
        self,
        updates: TensorMap,
        state: Any,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, Any]:
        return updates, state


def from_window(transform: Transform, state: Any) -> Transform:
    """Return what of a transform runs for names that got nothing when a window closes.

    What stands in front of the window saw nothing of them in this step.

    Example:
        >>> import torch
        >>> from functional_optim import Accumulate, Scale, chain
        >>> windowed = chain(Scale(2.0), Accumulate(2), Scale(3.0))
        >>> from_window(windowed, windowed.init({"w": torch.ones(1)}))
        chain(_Resting(inner=Scale(2.0)), Accumulate(2), Scale(3.0))
    """
    labels = list(children_of(transform))
    if not labels or not _has_static(state):
        return transform
    combinator: Any = transform
    states = combinator.split_state(state)
    holding = next(label for label in labels if _has_static(states[label]))

    def change(label: Label, child: Transform) -> Transform:
        if routes(transform) or label == holding:
            return from_window(child, states[label])
        is_before = labels.index(label) < labels.index(holding)
        return _Resting(child) if is_before else child

    return map_children(transform, change)


def _has_static(state: Any) -> bool:
    if isinstance(state, tuple):
        return any(map(_has_static, state))
    return isinstance(state, Static)

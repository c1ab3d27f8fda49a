"""What holds and what emits: the `Static` part of a step, decided once for all units.

A unit cannot know by itself that others were given something. So the whole update runs
on stand-ins without memory, and tells the next `Static` values and the names that come
out; the answer depends on nothing but what is known on the host, and is remembered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functional_optim._types import Static
from functional_optim.execution._nodes import nodes_of, rebuilt

if TYPE_CHECKING:
    from functional_optim._context import Context
    from functional_optim._types import TensorMap, Transform
    from functional_optim.execution._nodes import Node


class Structure(NamedTuple):
    """What a step does to structure.

    Attributes:
        statics: The `Static` values after it, by index of the node.
        emitted: The names that come out.
    """

    statics: dict[int, Static[Any]]
    emitted: frozenset[str]


class Windows:
    """Tells what a step does to structure.

    Args:
        transform: The transform.
        template: Its whole state.
        params: All parameters.
    """

    def __init__(self, transform: Transform, template: Any, params: TensorMap) -> None:
        self._transform, self._template = transform, template
        self._params = {n: p.to("meta") for n, p in params.items()}
        self._known: dict[Hashable, Structure] = {}

    def structure(
        self,
        given: dict[str, torch.dtype],
        nodes: list[Node],
        *,
        context: Context,
    ) -> Structure:
        """Return what a step does.

        Args:
            given: The names with a gradient, and its dtype.
            nodes: The nodes of the whole state.
            context: The context of the step.
        """
        key = tuple(given), statics_of(nodes), context.last
        if key not in self._known:
            self._known[key] = self._tried(given, nodes, context)
        return self._known[key]

    def _tried(
        self, given: dict[str, torch.dtype], nodes: list[Node], context: Context
    ) -> Structure:
        stand_ins = [_stand_in(node) for node in nodes]
        updates = {
            name: torch.empty_like(self._params[name], dtype=dtype)
            for name, dtype in given.items()
        }
        moved, state = self._transform.update(
            updates,
            rebuilt(self._template, iter(stand_ins)),
            self._params,
            context=dataclasses.replace(context, loss=None, weight=None),
        )
        after = enumerate(nodes_of(state))
        statics = {i: node for i, node in after if isinstance(node, Static)}
        return Structure(statics, frozenset(moved))


def statics_of(nodes: list[Node]) -> Hashable:
    """Return the values that are known on the host."""
    return tuple(node.value for node in nodes if isinstance(node, Static))


def _stand_in(node: Node) -> Node:
    if isinstance(node, Static):
        return node
    if isinstance(node, Tensor):
        return node.to("meta")
    return {name: entry.to("meta") for name, entry in node.items()}

"""A state as a list of nodes: what executors cut, keep and put together again.

A state is tuples down to its nodes: maps by parameter name, tensors of the transform as
a whole, and `Static` values. What kind a node is follows from its entries; whose it is
from the transform it belongs to.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor

from functional_optim.core._transform import Static
from functional_optim.core._traversal import walk
from functional_optim.execution._tensor_memory import storage_ptr, unalias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform

Node: TypeAlias = "TensorMap | Tensor | Static[Any]"


class Kind(enum.Enum):
    """What a node holds."""

    ELEMENTWISE = "a tensor like the parameter, for each"
    EACH = "a tensor of its own shape for each parameter"
    WHOLE = "one tensor for the transform"
    STATIC = "a value on the host"


class Field(NamedTuple):
    """What is known about a node."""

    kind: Kind
    owner: str
    name: str
    names: frozenset[str]
    donated: bool
    scalars: bool


def nodes_of(state: Any) -> list[Node]:
    """Return the nodes of a state, in order.

    Example:
        >>> import torch
        >>> from functional_optim import Trace, chain, sgd
        >>> tx = sgd(0.1, momentum=0.9)
        >>> [sorted(node) for node in nodes_of(tx.init({"w": torch.ones(1)}))]
        [['w']]
    """
    found: list[Node] = []
    _collect(state, found)
    return found


def _collect(state: Any, found: list[Node]) -> None:
    if isinstance(state, tuple):
        for part in state:
            _collect(part, found)
    else:
        found.append(state)


def tensors_of(state: Any) -> Iterator[Tensor]:
    """Yield the tensors of a state, in order."""
    for node in nodes_of(state):
        if isinstance(node, dict):
            yield from node.values()
        elif isinstance(node, Tensor):
            yield node


def statics_of(nodes: list[Node]) -> tuple[Any, ...]:
    """Return the values of a state that are on the host."""
    return tuple(node.value for node in nodes if isinstance(node, Static))


def rebuilt(template: Any, nodes: Iterator[Node]) -> Any:
    """Return a state of the structure of another with other nodes, in order."""
    if isinstance(template, tuple):
        parts = [rebuilt(part, nodes) for part in template]
        return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)
    return next(nodes)


def mapped(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a state with other tensors in the same places.

    Example:
        >>> import torch
        >>> mapped(({"w": torch.ones(1)}, Static(3)), torch.neg)
        ({'w': tensor([-1.])}, Static(value=3))
    """
    return rebuilt(state, iter([_changed(node, change) for node in nodes_of(state)]))


def _changed(node: Node, change: Callable[[Tensor], Tensor]) -> Node:
    if isinstance(node, Static):
        return node
    if isinstance(node, Tensor):
        return change(node)
    return {name: change(entry) for name, entry in node.items()}


def _named(state: Any, name: str = "") -> Iterator[tuple[Node, str]]:
    """Yield the nodes with the names of their fields."""
    if isinstance(state, tuple):
        fields = getattr(state, "_fields", None) or [name] * len(state)
        for part, field in zip(state, fields, strict=True):
            yield from _named(part, field)
    else:
        yield state, name


def fields_of(transform: Transform, state: Any, params: TensorMap) -> list[Field]:
    """Return what is known about each node of a state."""
    owners: dict[int, tuple[str, frozenset[str], bool]] = {}
    opaque: set[tuple[int | str, ...]] = set()
    for stage in walk(transform, state, params):
        # What looks back at an old state must find it as it was.
        consumes = stage.path[:-1] not in opaque and getattr(
            type(stage.transform), "consumes_state", False
        )
        if not consumes:
            opaque.add(stage.path)
        names = frozenset(stage.params)
        owner = type(stage.transform).__name__
        for node in nodes_of(stage.state):
            owners[id(node)] = owner, names, consumes
    fields = []
    for node, name in _named(state):
        owner, names, consumes = owners[id(node)]
        _check_node(node, owner, name, params)
        kind = _kind(node, params)
        scalars = isinstance(node, dict) and all(params[n].ndim == 0 for n in node)
        donated = consumes and kind is Kind.ELEMENTWISE
        fields.append(Field(kind, owner, name, names, donated, scalars))
    return fields


def _check_node(node: Any, owner: str, name: str, params: TensorMap) -> None:
    """Refuse what no state may hold: the transform may be a user's."""
    entries = node.values() if isinstance(node, dict) else [node]
    fits = isinstance(node, (dict, Tensor, Static))
    if fits and isinstance(node, dict):
        fits = all(isinstance(entry, Tensor) for entry in entries)
        fits = fits and node.keys() <= params.keys()
    if not fits:
        raise TypeError(
            f"the state of {owner} has {node!r} at {name or 'its top'!r}; it may hold "
            "tensors, dicts of tensors by parameter name, tuples of these, and Static "
            "for what the host must know"
        )


def _kind(node: Node, params: TensorMap) -> Kind:
    if isinstance(node, Static):
        return Kind.STATIC
    if isinstance(node, Tensor):
        return Kind.WHOLE
    alike = all(entry.shape == params[name].shape for name, entry in node.items())
    return Kind.ELEMENTWISE if alike else Kind.EACH


class Store:
    """A state whose tensors stay the same from step to step.

    Its tensors share no memory with each other or with the parameters. A rule may start
    from one zero for all, or from the parameters: where each step makes new tensors
    nobody can tell.
    """

    def __init__(self, transform: Transform, state: Any, params: TensorMap) -> None:
        self.replaced = True
        self.fields = fields_of(transform, state, params)
        own = iter(unalias(list(tensors_of(state)), params.values()))
        self._take(mapped(state, lambda _: next(own)))

    def _take(self, state: Any) -> None:
        self.nodes: list[Node] = [
            dict(node) if isinstance(node, dict) else node for node in nodes_of(state)
        ]
        self.state = rebuilt(state, iter(self.nodes))
        self.statics = statics_of(self.nodes)

    def load(self, nodes: list[Node]) -> None:
        """Take over the numbers of other nodes; tensors stay where dtypes agree."""
        # Ours may come back in another order: all is read before one is written.
        mine = {storage_ptr(entry) for entry in tensors_of(self.state)}
        nodes = nodes_of(mapped(tuple(nodes), lambda new: free(new, mine)))
        for index, (old, new) in enumerate(zip(self.nodes, nodes, strict=True)):
            if isinstance(old, Tensor) and isinstance(new, Tensor):
                old.copy_(new)
            elif isinstance(old, dict) and isinstance(new, dict):
                for name, entry in old.items():
                    if new[name].dtype == entry.dtype:
                        entry.copy_(new[name])
                    else:
                        old[name] = new[name].to(entry.device, copy=True)
            else:
                self.nodes[index] = new
        self._take(rebuilt(self.state, iter(self.nodes)))

    def set_statics(self, statics: dict[int, Static[Any]]) -> bool:
        """Replace values on the host; return whether one has changed."""
        changed = {i: node for i, node in statics.items() if self.nodes[i] != node}
        for index, node in changed.items():
            self.nodes[index] = node
        if changed:
            self.state = rebuilt(self.state, iter(self.nodes))
            self.statics = statics_of(self.nodes)
        return bool(changed)


def free(new: Tensor, homes: set[int]) -> Tensor:
    """Return a tensor that stays as it is while others are written."""
    return new.clone() if storage_ptr(new) in homes else new

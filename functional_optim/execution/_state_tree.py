"""Flatten a state into leaves, and keep it in the same tensors from step to step.

A state is made of tuples down to its leaves: maps by parameter name, tensors of the
transform as a whole, and `Static` values.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor

from functional_optim.core._transform import Static
from functional_optim.core._traversal import walk
from functional_optim.execution._tensor_memory import storage_ptr, unalias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform
    from functional_optim.core._traversal import Path

Leaf: TypeAlias = "TensorMap | Tensor | Static[Any]"


class LeafKind(enum.Enum):
    """The kinds of leaves."""

    ELEMENTWISE = "for each parameter a tensor of its shape"
    PER_PARAMETER = "for each parameter a tensor of another shape"
    GLOBAL = "one tensor for the transform"
    STATIC = "a value on the host"


class LeafInfo(NamedTuple):
    """The kind and the place of a leaf, and how it may be used."""

    kind: LeafKind
    owner: str
    """The class of the transform."""
    name: str
    """The field of the state."""
    names: frozenset[str]
    """The parameters that the transform serves."""
    donated: bool
    """Whether the last update of a step may overwrite it."""
    scalars: bool
    """Whether all its parameters are 0-dim, so that its kind is ambiguous."""


def flatten(state: Any) -> list[Leaf]:
    """Return the leaves of a state, in order."""
    leaves: list[Leaf] = []
    _collect(state, leaves)
    return leaves


def _collect(state: Any, leaves: list[Leaf]) -> None:
    if isinstance(state, tuple):
        for part in state:
            _collect(part, leaves)
    else:
        leaves.append(state)


def unflatten(template: Any, leaves: Iterable[Leaf]) -> Any:
    """Return a state of the structure of another with these leaves."""
    leaves = iter(leaves)
    if not isinstance(template, tuple):
        return next(leaves)
    parts = [unflatten(part, leaves) for part in template]
    return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)


def tree_map(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a state with other tensors in the same places."""
    leaves = flatten(state)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[index] = change(leaf)
        elif isinstance(leaf, dict):
            leaves[index] = {name: change(entry) for name, entry in leaf.items()}
    return unflatten(state, leaves)


def tensors_of(state: Any) -> Iterator[Tensor]:
    """Yield the tensors of a state, in order."""
    for leaf in flatten(state):
        if isinstance(leaf, dict):
            yield from leaf.values()
        elif isinstance(leaf, Tensor):
            yield leaf


def statics_of(leaves: Iterable[Leaf]) -> tuple[Any, ...]:
    """Return the values of a state that are on the host."""
    return tuple(leaf.value for leaf in leaves if isinstance(leaf, Static))


def leaf_infos(transform: Transform, state: Any, params: TensorMap) -> list[LeafInfo]:
    """Return an info for each leaf of a state, after a check of all leaves."""
    owners: dict[int, tuple[str, frozenset[str], bool]] = {}
    opaque: set[Path] = set()
    for node in walk(transform, state, params):
        # A combinator that reads an old state must find it as it was.
        consumes = node.path[:-1] not in opaque and getattr(
            type(node.transform), "consumes_state", False
        )
        if not consumes:
            opaque.add(node.path)
        owner = type(node.transform).__name__, frozenset(node.params), consumes
        owners.update((id(leaf), owner) for leaf in flatten(node.state))
    infos = []
    for leaf, name in _with_names(state):
        owner_name, names, consumes = owners[id(leaf)]
        _check_leaf(leaf, owner_name, name, params)
        kind = _leaf_kind(leaf, params)
        scalars = isinstance(leaf, dict) and all(params[n].ndim == 0 for n in leaf)
        donated = consumes and kind is LeafKind.ELEMENTWISE
        infos.append(LeafInfo(kind, owner_name, name, names, donated, scalars))
    return infos


def _with_names(state: Any, name: str = "") -> Iterator[tuple[Leaf, str]]:
    """Yield the leaves with the names of their fields."""
    if isinstance(state, tuple):
        fields = getattr(state, "_fields", None) or [name] * len(state)
        for part, field in zip(state, fields, strict=True):
            yield from _with_names(part, field)
    else:
        yield state, name


def _check_leaf(leaf: Any, owner: str, name: str, params: TensorMap) -> None:
    """Refuse a leaf that no state may have: the transform may be a user's."""
    fits = isinstance(leaf, (dict, Tensor, Static))
    if isinstance(leaf, dict):
        fits = all(isinstance(entry, Tensor) for entry in leaf.values())
        fits = fits and leaf.keys() <= params.keys()
    if not fits:
        raise TypeError(
            f"the state of {owner} has {leaf!r} at {name or 'its top'!r}; it may hold "
            "tensors, dicts of tensors by parameter name, tuples of these, and Static "
            "for what the host must know"
        )


def _leaf_kind(leaf: Leaf, params: TensorMap) -> LeafKind:
    if isinstance(leaf, Static):
        return LeafKind.STATIC
    if isinstance(leaf, Tensor):
        return LeafKind.GLOBAL
    alike = all(entry.shape == params[name].shape for name, entry in leaf.items())
    return LeafKind.ELEMENTWISE if alike else LeafKind.PER_PARAMETER


class ExecutorState:
    """A state whose tensors stay the same from step to step.

    They share no memory with each other or with the parameters. The state of a rule may
    start with one zero for all, or with the parameters: where each step makes new
    tensors it makes no difference.
    """

    def __init__(self, transform: Transform, state: Any, params: TensorMap) -> None:
        self.replaced = True
        """Whether tensors are others since this was last set to False."""
        self.infos = leaf_infos(transform, state, params)
        own = iter(unalias(list(tensors_of(state)), params.values()))
        self._set(tree_map(state, lambda _: next(own)))

    def _set(self, state: Any) -> None:
        self.leaves: list[Leaf] = [
            dict(leaf) if isinstance(leaf, dict) else leaf for leaf in flatten(state)
        ]
        self.tree = unflatten(state, self.leaves)
        self.statics = statics_of(self.leaves)

    def load(self, leaves: list[Leaf]) -> None:
        """Copy the numbers of other leaves; tensors stay where dtypes agree."""
        # They may be ours in another order: all are read before one is written.
        mine = {storage_ptr(entry) for entry in tensors_of(self.tree)}
        leaves = flatten(tree_map(tuple(leaves), lambda new: clone_if_in(new, mine)))
        for index, (old, new) in enumerate(zip(self.leaves, leaves, strict=True)):
            if isinstance(old, Tensor) and isinstance(new, Tensor):
                old.copy_(new)
            elif isinstance(old, dict) and isinstance(new, dict):
                for name, entry in old.items():
                    if new[name].dtype == entry.dtype:
                        entry.copy_(new[name])
                    else:
                        old[name] = new[name].to(entry.device, copy=True)
            else:
                self.leaves[index] = new
        self._set(unflatten(self.tree, self.leaves))

    def set_statics(self, statics: dict[int, Static[Any]]) -> bool:
        """Replace values on the host; return whether one has changed."""
        changed = {i: leaf for i, leaf in statics.items() if self.leaves[i] != leaf}
        for index, leaf in changed.items():
            self.leaves[index] = leaf
        if changed:
            self.tree = unflatten(self.tree, self.leaves)
            self.statics = statics_of(self.leaves)
        return bool(changed)


def clone_if_in(tensor: Tensor, memory: set[int]) -> Tensor:
    """Return a copy if the memory of a tensor is about to be written, else itself."""
    return tensor.clone() if storage_ptr(tensor) in memory else tensor

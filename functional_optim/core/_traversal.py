"""Walk through the transforms inside a transform.

A combinator is a transform made of transforms, ours or a user's. It has three methods:

    children() -> {label: transform}
    with_children(children) -> the same combinator of other transforms
    split_state(state) -> {label: state of that child}

and a fourth, `route(name, param) -> label | None`, if only one child, or none, serves a
parameter; without it all children do, one after the other. A label is a position, an
int, or a name, a string: a prefix of readings, and of keys in `param_groups`. The names
that `route` returns put parameters into groups of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._transform import Transform

Label: TypeAlias = "int | str"
Path: TypeAlias = "tuple[Label, ...]"
"""The labels on the way from the outermost transform to one inside it."""


class Node(NamedTuple):
    """A transform at some depth, with its state and the parameters that it serves."""

    path: Path
    transform: Transform
    state: Any
    params: TensorMap

    @property
    def names(self) -> list[str]:
        """The names that users gave on the way, outermost first."""
        return [label for label in self.path if isinstance(label, str)]


def children_of(transform: object) -> Mapping[Label, Transform]:
    """Return the transforms inside a combinator by label; none inside a leaf."""
    children: Callable[[], Mapping[Label, Transform]] | None
    children = getattr(transform, "children", None)
    return {} if children is None else children()


def routes(transform: object) -> bool:
    """Whether a parameter is served by one of the children at most."""
    return hasattr(transform, "route")


def map_children(
    transform: Transform, change: Callable[[Label, Transform], Transform]
) -> Transform:
    """Return a combinator of changed children; the same one if none differs."""
    old = children_of(transform)
    new = {label: change(label, child) for label, child in old.items()}
    if all(new[label] is child for label, child in old.items()):
        return transform
    combinator: Any = transform
    changed: Transform = combinator.with_children(new)
    return changed


def walk(
    transform: Transform, state: Any = None, params: TensorMap | None = None
) -> Iterator[Node]:
    """Yield a transform and all inside it, in the order in which they run.

    Example:
        >>> import functional_optim as fo
        >>> pipeline = fo.chain(fo.Masked(fo.Scale(2.0), "*.bias"))
        >>> [node.path for node in walk(pipeline)]
        [(), (0,), (0, 0)]
    """
    yield from _below(Node((), transform, state, params or {}))


def _below(node: Node) -> Iterator[Node]:
    children = children_of(node.transform)
    combinator: Any = node.transform
    states: Mapping[Label, Any] = {}
    if children and node.state is not None:
        states = combinator.split_state(node.state)  # Refuses that of another one.
    yield node
    served = dict.fromkeys(children, node.params)
    if routes(combinator):
        served = {label: {} for label in children}
        for name, param in node.params.items():
            label = combinator.route(name, param)
            if label is not None:
                served[label][name] = param
    for label, child in children.items():
        path = (*node.path, label)
        yield from _below(Node(path, child, states.get(label), served[label]))


def routes_of(
    transform: object, name: str, param: Tensor, path: Path = ()
) -> Iterator[tuple[Path, Label | None]]:
    """Yield the label that each router gives to a parameter, with the router's path."""
    children = children_of(transform)
    served = list(children)
    if routes(transform):
        router: Any = transform
        label = router.route(name, param)
        yield path, label
        served = [] if label is None else [label]
    for label in served:
        yield from routes_of(children[label], name, param, (*path, label))

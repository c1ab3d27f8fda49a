"""The state that an optimizer goes on from: what is found in it, else a fresh one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from functional_optim._names import shown
from functional_optim._types import Static
from functional_optim.execution._nodes import (
    fields_of,
    mapped,
    nodes_of,
    rebuilt,
)
from functional_optim.facade._entries import entries_of, keys_of, loaded_rest

if TYPE_CHECKING:
    from collections.abc import Collection, Set

    from functional_optim._types import TensorMap, Transform
    from functional_optim.execution._nodes import Node


class Outline:
    """What the state of every parameter looks like, without its memory.

    Args:
        transform: The transform.
        state: A state of it over all parameters.
        params: All parameters.

    Attributes:
        state: The state, on the meta device.
        nodes: Its nodes.
        keys: Their keys.
        shapes: The shape of each parameter.
    """

    def __init__(self, transform: Transform, state: Any, params: TensorMap) -> None:
        self.keys = keys_of(nodes_of(state), fields_of(transform, state, params))
        self.state = mapped(state, _without_memory)
        self.nodes = nodes_of(self.state)
        self.shapes = _shapes(params)

    def entries(self, name: str) -> dict[str, Tensor]:
        """Return what the state of one parameter looks like."""
        return entries_of(self.nodes, self.keys, name)


class Resumed(NamedTuple):
    """A state to go on from.

    Attributes:
        state: The state of the parameters that have one.
        names: The names of these parameters, in order.
        outline: What the state of all looks like.
    """

    state: Any
    names: list[str]
    outline: Outline


def resumed(
    transform: Transform,
    params: TensorMap,
    found: Mapping[str, Mapping[str, Any]],
    *,
    waiting: Set[str],
    before: Resumed | None,
    rest: Mapping[str, Any] | None = None,
) -> Resumed:
    """Return the state to go on from: what is found counts, whoever put it there.

    Args:
        transform: The transform.
        params: All parameters, by name.
        found: What there is for each parameter, with keys of the user's own.
        waiting: Those that get no state unless one is found.
        before: What the optimizer has up to now; None at the start.
        rest: The saved state of the transform as a whole; None keeps what it has.

    Raises:
        ValueError: entries of another shape, or not all of a parameter's; or the
            transform does not fit the parameters.
    """
    outline, fresh = (None, None) if before is None else (before.outline, None)
    made: set[str] = set()
    if outline is None or outline.shapes != _shapes(params):
        made = {name for name in params if name not in waiting and not found[name]}
        fresh = begun(transform, params, made)
        outline = Outline(transform, fresh, params)
    mine = {name: outline.entries(name) for name in params}
    kept = {name for name in params if not mine[name].keys().isdisjoint(found[name])}
    for name in kept:
        check_entries(name, found[name], mine[name])
    names = [name for name in params if name in kept or name not in waiting]
    new = {name for name in names if mine[name]} - kept
    if not new <= made:
        fresh = begun(transform, params, new)
    first = nodes_of(outline.state if fresh is None else fresh)
    known = first if before is None else nodes_of(before.state)
    gone = new if before is None else new | {*before.names} - {*names}
    nodes: list[Node] = []
    for key, like, own, old in zip(
        outline.keys, outline.nodes, first, known, strict=True
    ):
        if isinstance(like, dict) and isinstance(own, dict):
            nodes.append(
                {
                    name: _taken(found[name][key], like[name], params[name])
                    if name in kept
                    else own[name]
                    for name in names
                    if name in like
                }
            )
        else:
            nodes.append(_continued(old, gone, params))
    if rest is not None:
        nodes = loaded_rest(nodes, outline.keys, rest, params)
    return Resumed(rebuilt(outline.state, iter(nodes)), names, outline)


def begun(transform: Transform, params: TensorMap, names: Collection[str]) -> Any:
    """Return a fresh state over all parameters; others than these have no memory in it.

    Args:
        transform: The transform.
        params: All parameters.
        names: Names of those whose state is asked for.

    Raises:
        ValueError: the transform does not fit the parameters.
    """
    others = params.keys() - set(names)
    if others:
        # A rule that fits a frozen parameter only is none that fits nothing: all are
        # there, but most of a large model may be frozen.
        try:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            state = transform.init(
                {
                    n: mode.from_tensor(p) if n in others else p
                    for n, p in params.items()
                }
            )
            if _is_real(state, others):
                return state
        except Exception:  # What a transform of a user's may do without memory.
            return _initial(transform, params)
    return _initial(transform, params)


def entries_at(
    state: Mapping[Tensor, Any], param: Tensor, name: str
) -> Mapping[str, Any]:
    """Return what stands in a state for a parameter.

    Raises:
        ValueError: it is no dict.
    """
    found = state.get(param, {})
    if not isinstance(found, Mapping):
        msg = (
            f"state of {name!r} must be a dict, got {found!r}; delete "
            "optimizer.state[parameter] to begin afresh"
        )
        raise ValueError(msg)
    return found


def check_entries(
    name: str, found: Mapping[str, Any], wanted: Mapping[str, Tensor]
) -> None:
    """Refuse what cannot be the state of a parameter.

    Args:
        name: The parameter.
        found: What there is; other keys are the user's own.
        wanted: What its state looks like.

    Raises:
        ValueError: naming the parameter, the key and the remedy.
    """
    missing = wanted.keys() - found.keys()
    if missing:
        msg = (
            f"state of {name!r} has {shown(sorted(wanted.keys() & found.keys()))} and "
            f"lacks {shown(sorted(missing))}; move all of its entries, or none: "
            "without any it begins afresh"
        )
        raise ValueError(msg)
    for key, like in wanted.items():
        entry = found[key]
        if not isinstance(entry, Tensor) or entry.shape != like.shape:
            is_tensor = isinstance(entry, Tensor)
            got = f"one of {tuple(entry.shape)}" if is_tensor else repr(entry)
            msg = (
                f"state of {name!r}: {key} must be a tensor of shape "
                f"{tuple(like.shape)}, as the parameter is now, got {got}; give it "
                "that shape, or delete optimizer.state[parameter] to begin afresh"
            )
            raise ValueError(msg)


def _initial(transform: Transform, params: TensorMap) -> Any:
    """Return a fresh state.

    Raises:
        ValueError: the transform does not fit the parameters.
    """
    try:
        return transform.init(params)
    except ValueError as error:
        if all(name.isdecimal() for name in params):
            msg = (
                f"{error}. These parameters have no names: pass "
                "model.named_parameters() instead of model.parameters()"
            )
            raise ValueError(msg) from None
        raise


def _shapes(params: TensorMap) -> dict[str, torch.Size]:
    return {name: param.shape for name, param in params.items()}


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _is_real(state: Any, others: Set[str]) -> bool:
    """Whether nothing but the entries of some names is without memory."""
    return not any(
        isinstance(entry, FakeTensor)
        for node in nodes_of(state)
        for name, entry in (node if isinstance(node, dict) else {"": node}).items()
        if name not in others
    )


def _taken(entry: Tensor, like: Tensor, param: Tensor) -> Tensor:
    """Return an entry beside its parameter, at least as wide as a fresh one."""
    own = entry.detach() if entry.requires_grad else entry
    return own.to(param.device, torch.promote_types(own.dtype, like.dtype))


def _continued(node: Node, gone: Set[str], params: TensorMap) -> Node:
    """Return what the transform as a whole has, without the names in `gone`."""
    if isinstance(node, Static) and isinstance(node.value, tuple):
        return Static(tuple(told for told in node.value if told not in gone))
    if isinstance(node, Tensor):
        return node.to(next(iter(params.values())).device)
    return node

"""State dicts: what must fit before anything is loaded."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from functional_optim._messages import format_names
from functional_optim.core._transform import Scope, Static, Transform
from functional_optim.execution._state_tree import fields_of, mapped, nodes_of, rebuilt
from functional_optim.torch_optimizer._group_keys import OWN_KEYS, lacking
from functional_optim.torch_optimizer._param_state import (
    entries_of,
    keys_of,
    loaded_rest,
)
from functional_optim.torch_optimizer._params import bare

if TYPE_CHECKING:
    from collections.abc import Collection, Set

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.execution._state_tree import Node
    from functional_optim.torch_optimizer._param_groups import Groups


def saved_groups(data: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of a state dict if there are as many, of as many parameters."""
    if not isinstance(data, Mapping) or not {"state", "param_groups"} <= set(data):
        got = format_names(data) if isinstance(data, Mapping) else repr(data)
        raise ValueError(f"a state dict has 'state' and 'param_groups', got {got}")
    saved: list[dict[str, Any]] = list(data["param_groups"])
    if len(saved) != len(groups):
        raise ValueError(
            f"the state dict has {len(saved)} groups, the optimizer {len(groups)}; "
            "build it with the groups and the transform that it was saved with"
        )
    for index, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        place = f"param_groups[{index}]"
        if "params" not in theirs:
            raise ValueError(lacking(f"{place} of the state dict", ["params"]))
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"{place} has {len(theirs['params'])} parameters in the state dict, "
                f"{len(ours['params'])} here; the state dict is of another model or "
                "another layout of groups"
            )
    return saved


def checked_groups(
    data: Any,
    groups: list[dict[str, Any]],
    exposed: Groups,
) -> list[dict[str, Any]]:
    """Return the groups of a state dict if they fit those of the optimizer."""
    saved = saved_groups(data, groups)
    for index, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        place = f"param_groups[{index}]"
        _check_names(place, theirs.get("param_names"), ours.get("param_names"))
        wanted = [*exposed.keys[index], *exposed.structure[index]]
        missing = [key for key in wanted if key not in theirs]
        if missing:
            raise ValueError(
                f"{place} lacks {format_names(missing)} in the state dict; it is of "
                f"another transform. For one of torch.optim use from_torch_state_dict"
            )
        for key, value in exposed.structure[index].items():
            if theirs[key] != value:
                raise ValueError(
                    f"{place} has {key}={theirs[key]} in the state dict, {value} here; "
                    "build the optimizer with the transform that it was saved with"
                )
        exposed.check_saved(index, theirs)
    return saved


def loaded_options(
    saved: Mapping[str, Any], exposed: Groups, index: int
) -> dict[str, Any]:
    """Return what a group takes over from a saved one; nothing is shared.

    Names are among it where the group has none, as with torch.
    """
    fixed = exposed.fixed_keys(index) | OWN_KEYS - {"param_names"}
    return {k: copy.deepcopy(v) for k, v in saved.items() if k not in fixed}


def _check_names(place: str, theirs: Any, ours: Any) -> None:
    if theirs is None or ours is None:
        return
    for a, b in zip(theirs, ours, strict=True):
        if bare(a) != bare(b):
            raise ValueError(
                f"{place} has the parameter {a!r} in the state dict where {b!r} stands "
                "here; the state dict is of another model, or of parameters in another "
                "order"
            )


class Outline:
    """Describe the state of every parameter: keys, shapes and dtypes, no memory."""

    def __init__(self, transform: Transform, state: Any, params: TensorMap) -> None:
        self.keys = keys_of(nodes_of(state), fields_of(transform, state, params))
        self.state = mapped(state, _without_memory)
        self.nodes = nodes_of(self.state)
        self.shapes = _shapes(params)

    def entries(self, name: str) -> dict[str, Tensor]:
        """Return the entries of one parameter, on the meta device."""
        return entries_of(self.nodes, self.keys, name)


class Start(NamedTuple):
    """Hold the state that an optimizer goes on from."""

    state: Any
    names: list[str]
    outline: Outline


def start_from(
    transform: Transform,
    params: TensorMap,
    entries: Mapping[str, Mapping[str, Any]],
    *,
    frozen: Set[str],
    before: Start | None,
    transform_state: Mapping[str, Any] | None = None,
) -> Start:
    """Return the state with a user's entries, and fresh ones for the rest."""
    fresh: Any = None
    ready: set[str] = set()
    if before is not None and before.outline.shapes == _shapes(params):
        outline = before.outline
    else:
        ready = {n for n in params if n not in frozen and not entries[n]}
        fresh = fresh_state(transform, params, ready)
        outline = Outline(transform, fresh, params)
    wanted = {name: outline.entries(name) for name in params}
    kept = {n for n in params if not wanted[n].keys().isdisjoint(entries[n])}
    for name in kept:
        check_entries(name, entries[name], wanted[name])
    names = [name for name in params if name in kept or name not in frozen]
    new = {name for name in names if wanted[name]} - kept
    if not new <= ready:
        fresh = fresh_state(transform, params, new)
    if fresh is None:
        fresh = outline.state  # Nothing of it is needed.
    nodes: list[Node] = []
    for key, like, own in zip(
        outline.keys, outline.nodes, nodes_of(fresh), strict=True
    ):
        node = own
        if isinstance(like, dict) and isinstance(own, dict):
            node = {
                name: _beside(entries[name][key], params[name], like[name])
                if name in kept
                else own[name]
                for name in names
                if name in like
            }
        nodes.append(node)
    if before is not None:
        gone = new | {*before.names} - {*names}
        nodes = _with_whole(nodes, nodes_of(before.state), gone, params)
    if transform_state is not None:
        nodes = loaded_rest(nodes, outline.keys, transform_state, params)
    return Start(rebuilt(outline.state, iter(nodes)), names, outline)


def fresh_state(transform: Transform, params: TensorMap, names: Collection[str]) -> Any:
    """Return a fresh state over all parameters; only that of some names has memory."""
    others = params.keys() - set(names)
    if others and transform.scope is not Scope.GLOBAL:
        # init sees all parameters, or a mask of frozen ones alone would match nothing;
        # these are fake, because their state may be as large as the model.
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            fakes = {n: mode.from_tensor(p) for n, p in params.items() if n in others}
            state = transform.init({**params, **fakes})
        except Exception:  # A user's transform may read values here.
            return _initial(transform, params)
        if _is_real(state, others):
            return state
    return _initial(transform, params)


def entries_at(
    state: Mapping[Tensor, Any], param: Tensor, name: str
) -> Mapping[str, Any]:
    """Return the entries of a parameter in a state."""
    found = state.get(param, {})
    if not isinstance(found, Mapping):
        raise ValueError(
            f"state of {name!r} must be a dict, got {found!r}; delete "
            "optimizer.state[parameter] to begin afresh"
        )
    return found


def check_entries(
    name: str, found: Mapping[str, Any], wanted: Mapping[str, Tensor]
) -> None:
    """Refuse what cannot be the state of a parameter."""
    missing = wanted.keys() - found.keys()
    if missing:
        raise ValueError(
            f"state of {name!r} has "
            f"{format_names(sorted(wanted.keys() & found.keys()))} and lacks "
            f"{format_names(sorted(missing))}; move all of its entries, or none: "
            "without any it begins afresh"
        )
    for key, like in wanted.items():
        entry = found[key]
        if not isinstance(entry, Tensor) or entry.shape != like.shape:
            is_tensor = isinstance(entry, Tensor)
            got = f"one of {tuple(entry.shape)}" if is_tensor else repr(entry)
            raise ValueError(
                f"state of {name!r}: {key} must be a tensor of shape "
                f"{tuple(like.shape)}, as the parameter is now, got {got}; give it "
                "that shape, or delete optimizer.state[parameter] to begin afresh"
            )


def _initial(transform: Transform, params: TensorMap) -> Any:
    """Return a fresh state."""
    try:
        return transform.init(params)
    except ValueError as error:
        if all(name.isdecimal() for name in params):
            raise ValueError(
                f"{error}. These parameters have no names: pass "
                "model.named_parameters() instead of model.parameters()"
            ) from None
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


def _beside(entry: Tensor, param: Tensor, like: Tensor) -> Tensor:
    """Return an entry beside its parameter, at least as wide as a fresh one."""
    own = entry.detach() if entry.requires_grad else entry
    return own.to(param.device, torch.promote_types(own.dtype, like.dtype))


def _with_whole(
    nodes: list[Node], before: list[Node], gone: Set[str], params: TensorMap
) -> list[Node]:
    """Return nodes with what the whole transform had, without the names in `gone`."""
    result: list[Node] = []
    for node, old in zip(nodes, before, strict=True):
        if isinstance(old, Static) and isinstance(old.value, tuple):
            result.append(Static(tuple(n for n in old.value if n not in gone)))
        elif isinstance(old, Tensor):
            result.append(old.to(next(iter(params.values()), old).device))
        else:
            result.append(old if isinstance(old, Static) else node)
    return result


def plain(value: Any) -> Any:
    """Return saved data with Python's numbers in the place of numpy's.

    Hooks write what `np.interp` returns into groups; `torch.load(weights_only=True)`
    takes no such number.

    Example:
        >>> import numpy as np
        >>> plain({"lr": np.float64(0.5), "betas": (np.float32(0.25), 0.9)})
        {'lr': 0.5, 'betas': (0.25, 0.9)}
    """
    if type(value) is dict:
        return {plain(key): plain(inner) for key, inner in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(map(plain, value))
    is_number = not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0
    return value.item() if is_number else value


_living: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def text_of(transform: Transform) -> str:
    """Return a text that names a transform as long as it lives, in this process.

    Example:
        >>> from functional_optim import chain, sgd
        >>> pipeline = chain(sgd(0.1))
        >>> transform_of(text_of(pipeline)) is pipeline
        True
    """
    text = f"<{type(transform).__name__} at {id(transform):#x}>"
    _living[text] = transform
    return text


def transform_of(given: Any) -> Any:
    """Return the transform that a text names; what is no text is returned as it is."""
    if not isinstance(given, str):
        return given
    found = _living.get(given)
    if found is None:
        raise TypeError(
            f"transform must be a transform, got the text {given!r}, which names none "
            "that lives in this process; pass one, such as functional_optim.adamw()"
        )
    return found

"""The state of a transform in `optimizer.state`: a flat dict for each parameter."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from functional_optim._messages import format_names
from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._state_dict import as_tuples, check_like, check_same_keys
from functional_optim.core._transform import Scope, Static, Transform
from functional_optim.execution._state_tree import (
    Leaf,
    LeafInfo,
    flatten,
    leaf_infos,
    tree_map,
    unflatten,
)
from functional_optim.torch_optimizer._params import check_memory, strip_wrapper_prefix

_TORCH_KEYS = {
    "ScaleByAdam": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "Trace": {"momentum_buffer"},
}


def _keys_of(leaves: list[Leaf], infos: list[LeafInfo]) -> list[str]:
    """Return the key of every leaf, different for all that a parameter may have."""
    keys = []
    by_key: dict[str, list[int]] = {}
    for index, info in enumerate(infos):
        is_torch = info.name in _TORCH_KEYS.get(info.owner, ())
        full = ".".join(filter(None, [info.owner, info.name]))
        keys.append(info.name if is_torch else full)
        by_key.setdefault(keys[-1], []).append(index)
    for key, indices in by_key.items():
        if _collide([leaves[i] for i in indices]):
            for count, index in enumerate(indices):
                info = infos[index]
                keys[index] = f"{count}.{info.owner}.{info.name or key}"
    return keys


def _collide(leaves: list[Leaf]) -> bool:
    if not all(isinstance(leaf, dict) for leaf in leaves):
        return len(leaves) > 1
    names = Counter(name for leaf in leaves if isinstance(leaf, dict) for name in leaf)
    return any(count > 1 for count in names.values())


def entries_of(leaves: list[Leaf], keys: list[str], name: str) -> dict[str, Tensor]:
    """Return the state of one parameter; the tensors are not copied."""
    return {
        key: leaf[name]
        for leaf, key in zip(leaves, keys, strict=True)
        if isinstance(leaf, dict) and name in leaf
    }


def global_entries_of(leaves: list[Leaf], keys: list[str]) -> dict[str, Any]:
    """Return the state of the transform as a whole; the tensors are not copied."""
    entries: dict[str, Any] = {}
    for leaf, key in zip(leaves, keys, strict=True):
        if isinstance(leaf, Static):
            # As text: torch.distributed takes no lists that grow.
            is_tuple = isinstance(leaf.value, tuple)
            entries[key] = json.dumps(leaf.value) if is_tuple else leaf.value
        elif isinstance(leaf, Tensor):
            entries[key] = leaf.detach()
    return entries


# -- loading -----------------------------------------------------------------------


def load_leaves(
    leaves: list[Leaf],
    keys: list[str],
    per_name: Mapping[str, Mapping[str, Any]],
    saved: Mapping[str, Any],
    names: Iterable[str],
) -> list[Leaf]:
    """Return leaves with the values of a state dict, after validating all of them."""
    for name, entries in per_name.items():
        own = entries_of(leaves, keys, name)
        check_same_keys(own, entries, f"state of {name!r}")
        for key, like in own.items():
            check_like(like, entries[key], f"{key} of {name!r}")
    loaded = load_global_leaves(leaves, keys, saved, names)
    return [
        {name: _widened(per_name[name][key], like) for name, like in leaf.items()}
        if isinstance(leaf, dict)
        else leaf
        for leaf, key in zip(loaded, keys, strict=True)
    ]


def load_global_leaves(
    leaves: list[Leaf], keys: list[str], saved: Mapping[str, Any], names: Iterable[str]
) -> list[Leaf]:
    """Return leaves with the values of a state dict for the transform as a whole."""
    check_same_keys(global_entries_of(leaves, keys), saved, "transform_state")
    loaded: list[Leaf] = []
    for leaf, key in zip(leaves, keys, strict=True):
        place = f"transform_state[{key!r}]"
        if isinstance(leaf, Static):
            value = _loaded_value(leaf.value, saved[key], place, names)
            loaded.append(Static(value))
        elif isinstance(leaf, Tensor):
            check_like(leaf, saved[key], place)
            loaded.append(saved[key].detach().to(leaf))
        else:
            loaded.append(leaf)
    return loaded


def _loaded_value(like: Any, value: Any, place: str, names: Iterable[str]) -> Any:
    """Return the saved value of a `Static`, in which names are those of parameters."""
    if isinstance(like, tuple) and isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            value = as_tuples(json.loads(value))
    if type(value) is not type(like):
        raise ValueError(
            f"{place} must be a {type(like).__name__}, got {value!r}; the checkpoint "
            "is damaged"
        )
    if not isinstance(value, tuple):
        return value
    # Strings are names of parameters, unless those here are others: a user's words.
    own = {strip_wrapper_prefix(name): name for name in names}
    if any(isinstance(n, str) and strip_wrapper_prefix(n) not in own for n in like):
        return value
    known = tuple(
        own.get(strip_wrapper_prefix(part)) if isinstance(part, str) else part
        for part in value
    )
    if None in known:
        raise ValueError(
            f"{place} must be names of parameters, got {value!r}; the checkpoint is of "
            "another model"
        )
    return known


def _widened(value: Tensor, like: Tensor, device: torch.device | None = None) -> Tensor:
    """Return a stored tensor, with no fewer bits than it had and a fresh one has."""
    dtype = torch.promote_types(value.dtype, like.dtype)
    own = value.detach() if value.requires_grad else value
    return own.to(device or value.device, dtype)


# -- building ----------------------------------------------------------------------


class StateTemplate:
    """The keys, shapes and dtypes of the state of all parameters, without memory."""

    def __init__(self, transform: Transform, state: Any, params: TensorMap) -> None:
        self.keys = _keys_of(flatten(state), leaf_infos(transform, state, params))
        self.state = tree_map(
            state, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta")
        )
        self.leaves = flatten(self.state)
        self.shapes = {name: param.shape for name, param in params.items()}

    def entries(self, name: str) -> dict[str, Tensor]:
        """Return the entries of one parameter, on the meta device."""
        return entries_of(self.leaves, self.keys, name)


class StartingState(NamedTuple):
    """A state to go on from, over the parameters that have one."""

    state: Any
    names: list[str]
    template: StateTemplate


def starting_state(
    transform: Transform,
    names: Mapping[Tensor, str],
    state: Mapping[Tensor, Any],
    *,
    before: StartingState | None = None,
    global_entries: Mapping[str, Any] | None = None,
) -> StartingState:
    """Return a state with the entries of `optimizer.state`, fresh where it has none."""
    params = {name: param.detach() for param, name in names.items()}
    check_memory(params)
    entries = {name: entries_at(state, param, name) for param, name in names.items()}
    frozen = {n for p, n in names.items() if not p.requires_grad and p.grad is None}
    fresh: Any = None
    ready: set[str] = set()
    shapes = {name: param.shape for name, param in params.items()}
    if before is not None and before.template.shapes == shapes:
        template = before.template
    else:
        ready = {n for n in params if n not in frozen and not entries[n]}
        fresh = fresh_state(transform, params, ready)
        template = StateTemplate(transform, fresh, params)
    wanted = {name: template.entries(name) for name in params}
    kept = {n for n in params if not wanted[n].keys().isdisjoint(entries[n])}
    for name in kept:
        check_entries(name, entries[name], wanted[name])
    served = [name for name in params if name in kept or name not in frozen]
    new = {name for name in served if wanted[name]} - kept
    if not new <= ready:
        fresh = fresh_state(transform, params, new)
    if fresh is None:
        fresh = template.state  # Nothing of it is needed.
    leaves: list[Leaf] = [
        {
            name: _widened(entries[name][key], like[name], params[name].device)
            if name in kept
            else own[name]
            for name in served
            if name in like
        }
        if isinstance(like, dict) and isinstance(own, dict)
        else own
        for key, like, own in zip(
            template.keys, template.leaves, flatten(fresh), strict=True
        )
    ]
    if before is not None:
        gone = new | {*before.names} - {*served}
        leaves = _with_globals(leaves, flatten(before.state), gone, params)
    if global_entries is not None:
        leaves = load_global_leaves(leaves, template.keys, global_entries, params)
    return StartingState(unflatten(template.state, leaves), served, template)


def _with_globals(
    leaves: list[Leaf], before: list[Leaf], gone: Set[str], params: TensorMap
) -> list[Leaf]:
    """Return leaves with the former state of the transform as a whole."""
    result: list[Leaf] = []
    for leaf, old in zip(leaves, before, strict=True):
        if isinstance(old, Static) and isinstance(old.value, tuple):
            result.append(Static(tuple(n for n in old.value if n not in gone)))
        elif isinstance(old, Tensor):
            result.append(old.to(next(iter(params.values()), old).device))
        else:
            result.append(old if isinstance(old, Static) else leaf)
    return result


def fresh_state(transform: Transform, params: TensorMap, names: Collection[str]) -> Any:
    """Return a fresh state over all parameters; only that of some names has memory."""
    others = params.keys() - set(names)
    if others and transform.scope is not Scope.GLOBAL:
        # init sees all parameters, or a mask of frozen ones alone would match nothing;
        # these are fake, because their state may be as large as the model.
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with contextlib.suppress(Exception):  # A user's transform may read values here.
            fakes = {n: mode.from_tensor(p) for n, p in params.items() if n in others}
            state = transform.init({**params, **fakes})
            if _has_memory(state, others):
                return state
    try:
        return transform.init(params)
    except ValueError as error:
        if all(name.isdecimal() for name in params):
            raise ValueError(
                f"{error}. These parameters have no names: pass "
                "model.named_parameters() instead of model.parameters()"
            ) from None
        raise


def _has_memory(state: Any, others: Set[str]) -> bool:
    """Whether all but the entries of some names has memory."""
    return not any(
        isinstance(entry, FakeTensor)
        for leaf in flatten(state)
        for name, entry in (leaf if isinstance(leaf, dict) else {"": leaf}).items()
        if name not in others
    )


# -- entries written by users ------------------------------------------------------


def entries_at(
    state: Mapping[Tensor, Any], param: Tensor, name: str
) -> Mapping[str, Any]:
    """Return the entries of a parameter in `optimizer.state`."""
    entries = state.get(param, {})
    if not isinstance(entries, Mapping):
        raise ValueError(
            f"state of {name!r} must be a dict, got {entries!r}; delete "
            "optimizer.state[parameter] to begin afresh"
        )
    return entries


def check_entries(
    name: str, entries: Mapping[str, Any], wanted: Mapping[str, Tensor]
) -> None:
    """Refuse entries that cannot be the state of a parameter."""
    missing = wanted.keys() - entries.keys()
    if missing:
        raise ValueError(
            f"state of {name!r} has "
            f"{format_names(sorted(wanted.keys() & entries.keys()))} and lacks "
            f"{format_names(sorted(missing))}; move all of its entries, or none: "
            "without any it begins afresh"
        )
    for key, like in wanted.items():
        entry = entries[key]
        is_tensor = isinstance(entry, Tensor)
        if not is_tensor or entry.shape != like.shape:
            got = f"one of {tuple(entry.shape)}" if is_tensor else repr(entry)
            raise ValueError(
                f"state of {name!r}: {key} must be a tensor of shape "
                f"{tuple(like.shape)}, as the parameter is now, got {got}; give it "
                "that shape, or delete optimizer.state[parameter] to begin afresh"
            )

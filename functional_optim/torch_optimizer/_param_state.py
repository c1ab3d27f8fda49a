"""The state of a transform as `torch.optim` keeps it: a flat dict for each parameter.

What belongs to one parameter stands under its key, with torch's names where torch has
them; what belongs to the transform as a whole is plain data beside.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.core._transform import Static
from functional_optim.torch_optimizer._params import bare

if TYPE_CHECKING:
    from functional_optim.execution._state_tree import Field, Node

_TORCH = {
    "ScaleByAdam": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "Trace": {"momentum_buffer"},
}


def keys_of(nodes: list[Node], fields: list[Field]) -> list[str]:
    """Return the key of every node, different for all that a parameter may have."""
    keys = []
    for field in fields:
        full = ".".join(filter(None, [field.owner, field.name]))
        known = field.name in _TORCH.get(field.owner, ())
        keys.append(field.name if known else full)
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    for key, indices in groups.items():
        if not _collide([nodes[i] for i in indices]):
            continue
        for count, index in enumerate(indices):
            field = fields[index]
            keys[index] = f"{count}.{field.owner}.{field.name or key}"
    return keys


def _collide(nodes: list[Node]) -> bool:
    if not all(isinstance(node, dict) for node in nodes):
        return len(nodes) > 1
    names = Counter(name for node in nodes if isinstance(node, dict) for name in node)
    return any(count > 1 for count in names.values())


def entries_of(nodes: list[Node], keys: list[str], name: str) -> dict[str, Tensor]:
    """Return the state of one parameter; the tensors are not copied."""
    return {
        key: node[name]
        for node, key in zip(nodes, keys, strict=True)
        if isinstance(node, dict) and name in node
    }


def rest_of(nodes: list[Node], keys: list[str]) -> dict[str, Any]:
    """Return what belongs to the transform as a whole; tensors are not copied."""
    plain: dict[str, Any] = {}
    for node, key in zip(nodes, keys, strict=True):
        if isinstance(node, Static):
            plain[key] = _written(node.value)
        elif isinstance(node, Tensor):
            plain[key] = node.detach()
    return plain


def _written(value: Any) -> Any:
    """Return a value for a checkpoint: torch.distributed wants no lists that grow."""
    return json.dumps(value) if isinstance(value, tuple) else value


def _read(value: Any, like: Any) -> Any:
    """Return the value that was written, as far as it can be read."""
    if not (isinstance(like, tuple) and isinstance(value, str)):
        return value
    try:
        return _tuples(json.loads(value))
    except json.JSONDecodeError:
        return value


def _tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(part) for part in value)
    return value


def loaded_nodes(
    nodes: list[Node],
    keys: list[str],
    per_name: Mapping[str, Mapping[str, Any]],
    rest: Mapping[str, Any],
    names: Iterable[str],
) -> list[Node]:
    """Return nodes with the numbers of a checkpoint; nothing is changed."""
    for name, saved in per_name.items():
        _check_keys(f"state of {name!r}", saved, entries_of(nodes, keys, name))
    return [
        {
            name: _fitting(f"{key} of {name!r}", per_name[name][key], entry)
            for name, entry in node.items()
        }
        if isinstance(node, dict)
        else node
        for node, key in zip(loaded_rest(nodes, keys, rest, names), keys, strict=True)
    ]


def loaded_rest(
    nodes: list[Node], keys: list[str], rest: Mapping[str, Any], names: Iterable[str]
) -> list[Node]:
    """Return nodes with what a checkpoint has of the transform as a whole."""
    _check_keys("transform_state", rest, rest_of(nodes, keys))
    loaded: list[Node] = []
    for node, key in zip(nodes, keys, strict=True):
        if isinstance(node, Static):
            loaded.append(_fitting_static(key, rest[key], node, names))
        elif isinstance(node, Tensor):
            found = _fitting(f"transform_state[{key!r}]", rest[key], node)
            loaded.append(found.to(node))
        else:
            loaded.append(node)
    return loaded


def _fitting_static(
    key: str, value: Any, like: Static[Any], names: Iterable[str]
) -> Static[Any]:
    value = _read(value, like.value)
    if type(value) is not type(like.value):
        raise ValueError(
            f"transform_state[{key!r}] must be a {type(like.value).__name__}, got "
            f"{value!r}; the checkpoint is damaged"
        )
    if not isinstance(value, tuple):
        return Static(value)
    # Strings are names of parameters, unless those here are others: a user's words.
    own = {bare(name): name for name in names}
    if any(isinstance(t, str) and bare(t) not in own for t in like.value):
        return Static(value)
    told = [own.get(bare(t)) if isinstance(t, str) else t for t in value]
    if None in told:
        raise ValueError(
            f"transform_state[{key!r}] must be names of parameters, got {value!r}; the "
            "checkpoint is of another model"
        )
    return Static(tuple(told))


def _check_keys(place: str, saved: Any, own: Mapping[str, Any]) -> None:
    if not isinstance(saved, Mapping):
        raise ValueError(f"{place} must be a dict, got {type(saved).__name__}")
    if saved.keys() != own.keys():
        raise ValueError(
            f"{place} has {format_names(saved)} in the checkpoint and "
            f"{format_names(own)} here; the checkpoint is of another transform"
        )


def _fitting(place: str, value: Any, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{place} must be a tensor, got {value!r}")
    if value.shape != like.shape:
        raise ValueError(
            f"{place} has shape {tuple(value.shape)} in the checkpoint, "
            f"{tuple(like.shape)} here; the checkpoint is of another model or transform"
        )
    if value.is_floating_point() != like.is_floating_point():
        raise ValueError(
            f"{place} has dtype {value.dtype} in the checkpoint, {like.dtype} here; "
            "the checkpoint is of another transform"
        )
    # No bit is lost: float32 moments of what are bfloat16 parameters now stay.
    return value.detach().to(torch.promote_types(value.dtype, like.dtype))

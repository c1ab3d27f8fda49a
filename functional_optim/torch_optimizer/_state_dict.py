"""Pack the state of an optimizer into a state dict, and validate one before loading."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from functional_optim.core._transform import Transform
from functional_optim.torch_optimizer._engine import Engine
from functional_optim.torch_optimizer._group_keys import TRANSFORM_STATE, group_value
from functional_optim.torch_optimizer._param_groups import ParamGroups
from functional_optim.torch_optimizer._param_state import entries_at
from functional_optim.torch_optimizer._params import strip_wrapper_prefix

# -- saving ------------------------------------------------------------------------


def pack_state(
    state: Mapping[Any, Any], groups: ParamGroups, engine: Engine
) -> dict[Any, Any]:
    """Return a copy of `optimizer.state` with indices in the place of parameters."""
    packed: dict[Any, Any] = {}
    for index, (param, name) in enumerate(groups.names.items()):
        entries = entries_at(state, param, name)
        # One without state says so by an empty dict: else it could have been lost.
        if entries or engine.template.entries(name):
            packed[index] = {
                key: value.detach().clone()
                if isinstance(value, Tensor)
                else copy.deepcopy(value)
                for key, value in entries.items()
            }
    others = {key: v for key, v in state.items() if not isinstance(key, Tensor)}
    return packed | copy.deepcopy(others)


def pack_groups(
    param_groups: list[dict[str, Any]], groups: ParamGroups
) -> list[dict[str, Any]]:
    """Return the groups with indices in the place of parameters."""
    packed: list[dict[str, Any]] = []
    start = 0
    for group, record in zip(param_groups, groups.records, strict=True):
        end = start + len(record.params)
        own = {**group, "params": list(range(start, end))}
        # The next step writes into these, and loading must not.
        for each in record.scheduled:
            own[each.option.key] = group_value(group[each.option.key])
        if TRANSFORM_STATE in group:
            own[TRANSFORM_STATE] = copy.deepcopy(group[TRANSFORM_STATE])
        packed.append(plain(own))
        start = end
    return packed


def plain(value: Any) -> Any:
    """Return saved data with Python's numbers in the place of numpy's.

    Hooks write what `np.interp` returns into groups; `torch.load(weights_only=True)`
    takes no such number.
    """
    if type(value) is dict:
        return {plain(key): plain(inner) for key, inner in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(map(plain, value))
    is_number = not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0
    return value.item() if is_number else value


# -- loading -----------------------------------------------------------------------


class SavedState(NamedTuple):
    """A state dict by parameter, of groups that fit those of the optimizer."""

    groups: list[dict[str, Any]]
    per_name: dict[str, Any]
    """Entries of the transform."""
    global_entries: Mapping[str, Any]
    """The state of the transform as a whole."""
    notes: dict[Tensor, dict[str, Any]]
    """Entries of a user's own."""
    others: dict[Any, Any]
    """State of no parameter."""


def unpack(
    data: Any,
    param_groups: list[dict[str, Any]],
    groups: ParamGroups,
    state: Mapping[Tensor, Any],
    engine: Engine,
) -> SavedState:
    """Return a state dict by parameter, after validating its groups."""
    saved = saved_groups(data, param_groups)
    for index, (theirs, ours) in enumerate(zip(saved, param_groups, strict=True)):
        _check_saved_names(index, theirs.get("param_names"), ours.get("param_names"))
    groups.check_saved(saved)
    indices = [index for group in saved for index in group["params"]]
    per_name: dict[str, Any] = {}
    notes: dict[Tensor, dict[str, Any]] = {}
    for (param, name), index in zip(groups.names.items(), indices, strict=True):
        own = data["state"].get(index, {})
        known = engine.template.entries(name).keys()
        extra = entries_at(state, param, name).keys() - known
        if extra and isinstance(own, dict):
            notes[param] = copy.deepcopy({key: own[key] for key in extra & own.keys()})
            own = {key: value for key, value in own.items() if key not in extra}
        # torch.distributed has names, and says itself what is missing.
        may_lack = isinstance(index, str) or not param.requires_grad
        if own != {} or (index not in data["state"] and not may_lack):
            per_name[name] = own
    taken = {*indices, *range(len(indices))}
    others = {key: own for key, own in data["state"].items() if key not in taken}
    rest = saved[0].get(TRANSFORM_STATE, {})
    return SavedState(saved, per_name, rest, notes, copy.deepcopy(others))


def saved_groups(data: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of a state dict if there are as many, of as many parameters."""
    entries = data if isinstance(data, Mapping) else {}
    state, saved = entries.get("state"), entries.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(saved, (list, tuple)):
        got = {key: type(value).__name__ for key, value in entries.items()} or data
        raise ValueError(
            f"a state dict has 'state' and 'param_groups', a dict and a list, got {got}"
        )
    if len(saved) != len(groups):
        raise ValueError(
            f"the state dict has {len(saved)} groups, the optimizer {len(groups)}; "
            "build it with the groups (or paramwise_cfg) and the transform that it was "
            "saved with"
        )
    for index, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        place = f"param_groups[{index}]"
        if "params" not in theirs:
            raise ValueError(f"{place} of the state dict lacks 'params'")
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"{place} has {len(theirs['params'])} parameters in the state dict, "
                f"{len(ours['params'])} here; the state dict is of another model or "
                "another layout of groups"
            )
    return list(saved)


def _check_saved_names(index: int, theirs: Any, ours: Any) -> None:
    if theirs is None or ours is None:
        return
    for a, b in zip(theirs, ours, strict=True):
        if strip_wrapper_prefix(a) != strip_wrapper_prefix(b):
            raise ValueError(
                f"param_groups[{index}] has the parameter {a!r} in the state dict "
                f"where {b!r} stands here; the state dict is of another model, or of "
                "parameters in another order"
            )


# -- transforms among the defaults -------------------------------------------------

_living: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def text_of(transform: Transform) -> str:
    """Return a text that names a transform as long as it lives, in this process."""
    text = f"<{type(transform).__name__} at {id(transform):#x}>"
    _living[text] = transform
    return text


def transform_of(given: Any) -> Any:
    """Return the transform that a text names, or the argument if it is no text."""
    if not isinstance(given, str):
        return given
    transform = _living.get(given)
    if transform is None:
        raise TypeError(
            f"transform must be a transform, got the text {given!r}, which names none "
            "that lives in this process; pass one, such as functional_optim.adamw()"
        )
    return transform

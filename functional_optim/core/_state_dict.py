"""Convert states to plain data and back.

Plain data is dicts, lists, tensors, numbers and strings: `torch.save` writes it and
`torch.load(weights_only=True)` reads it. It carries the names of parameters, fields and
state types, so that a checkpoint of another chain or model is refused with the place
where it differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._transform import Static
from functional_optim.core._validation import check_same_names

S = TypeVar("S")

_FORMAT = 1


def state_dict(state: Any) -> dict[str, Any]:
    """Return a state as plain data that shares no memory with it.

    Args:
        state: The state of a chain or of any transform.

    Returns:
        `{"format": 1, "state": ...}`, readable by `torch.load(weights_only=True)`.

    Raises:
        TypeError: the state holds something that is no tensor, dict, tuple or `Static`.

    Example:
        >>> from functional_optim.transforms import Trace
        >>> state = Trace(0.9).init({"w": torch.zeros(1)})
        >>> state_dict(state)["state"]["fields"]["momentum_buffer"]
        {'w': tensor([0.])}
    """
    return {"format": _FORMAT, "state": _as_plain(state, "state")}


def _as_plain(state: Any, place: str) -> Any:
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Static):
        return {"type": "Static", "value": _lists(state.value)}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        fields = {
            name: _as_plain(getattr(state, name), f"{place}.{name}")
            for name in state._fields
        }
        return {"type": type(state).__name__, "fields": fields}
    if isinstance(state, tuple):
        return [_as_plain(part, f"{place}[{i}]") for i, part in enumerate(state)]
    if isinstance(state, Mapping):
        return {
            name: _as_plain(part, f"{place}[{name!r}]") for name, part in state.items()
        }
    raise TypeError(
        f"{place} must be a tensor, dict, tuple, NamedTuple or Static, got {state!r}; "
        "wrap what the host must know in Static(...)"
    )


def _lists(value: Any) -> Any:
    return [_lists(part) for part in value] if isinstance(value, tuple) else value


def as_tuples(value: Any) -> Any:
    """Return plain data with tuples in the place of lists."""
    return (
        tuple(as_tuples(part) for part in value) if isinstance(value, list) else value
    )


def load_state_dict(state: S, data: Mapping[str, Any]) -> S:
    """Return the state that is stored as plain data, in the structure of another.

    Pure: neither argument changes, and the result shares no memory with them. Tensors
    are moved to the devices of `state`.

    Args:
        state: A state of the same transform over the same parameters, as `init` makes.
        data: What `state_dict` returned.

    Returns:
        The loaded state, of the type of `state`.

    Raises:
        ValueError: names, fields, shapes or dtypes differ; the message says where.
        TypeError: `data` is not what `state_dict` returns.

    Example:
        >>> from functional_optim.transforms import Trace
        >>> trace = Trace(0.9)
        >>> old = trace.init({"w": torch.ones(1)})
        >>> load_state_dict(trace.init({"w": torch.ones(1)}), state_dict(old)) == old
        True
    """
    if not isinstance(data, Mapping) or "state" not in data:
        raise TypeError(
            f"data must be what state_dict returns, got {type(data).__name__}"
        )
    if data.get("format") != _FORMAT:
        raise ValueError(
            f"data has format {data.get('format')!r}, this version reads {_FORMAT}; "
            "load it with the version that wrote it"
        )
    loaded: S = _loaded(state, data["state"], "state")
    return loaded


def _loaded(template: Any, data: Any, place: str) -> Any:
    """Validate and rebuild one part of a state."""
    if isinstance(template, Tensor):
        check_like(template, data, place, exact=True)
        loaded: Tensor = data.detach().to(template.device, copy=True)
        return loaded
    if isinstance(template, Static):
        _check_type(data, "Static", place)
        value = as_tuples(data.get("value"))
        if type(value) is not type(template.value):
            wanted = type(template.value).__name__
            raise ValueError(
                f"{place} must hold a {wanted}, got {value!r}; the data is damaged"
            )
        return Static(value)
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        kind = type(template)
        data = _with_scheduled(template, data)
        _check_type(data, kind.__name__, place)
        data = data.get("fields")
        if not isinstance(data, Mapping):
            raise ValueError(
                f"{place} must have fields, got {data!r}; the data is damaged"
            )
        check_same_names(place, data, kind._fields, "field")
        parts = [
            _loaded(getattr(template, n), data[n], f"{place}.{n}") for n in kind._fields
        ]
        return kind(*parts)
    if isinstance(template, tuple):
        if not isinstance(data, (list, tuple)) or len(data) != len(template):
            raise ValueError(
                f"{place} must be a list of {len(template)} states, got "
                f"{_described(data)}; the checkpoint is of another chain"
            )
        return tuple(
            _loaded(part, value, f"{place}[{i}]")
            for i, (part, value) in enumerate(zip(template, data, strict=True))
        )
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{place} must be a dict by parameter name, got {_described(data)}"
        )
    check_same_names(place, data, template)
    return _shared(
        {
            name: _loaded(part, data[name], f"{place}[{name!r}]")
            for name, part in template.items()
        }
    )


def _with_scheduled(template: Any, data: Any) -> Any:
    """Return data with the count of schedules around a state; once it was in it."""
    if not isinstance(data, Mapping) or not isinstance(data.get("fields"), Mapping):
        return data
    inner: Any = ()
    fields, schedule = dict(data["fields"]), data
    if data.get("type") != "ScheduleState":
        if "schedule" not in fields or "schedule" in template._fields:
            return data
        schedule = fields.pop("schedule")
        inner = {**data, "fields": fields}
    if not schedule:
        return inner
    return {"type": "Scheduled", "fields": {"state": inner, **schedule["fields"]}}


def _shared(column: TensorMap) -> TensorMap:
    """Let names with the same count share one tensor again, as `init` does."""
    tensors = list(column.values())
    if not tensors or any(t.ndim or t.dtype != tensors[0].dtype for t in tensors):
        return column
    distinct: dict[tuple[float, float], Tensor] = {}
    # The sign tells -0.0 from 0.0; NaN equals nothing and stays by itself.
    keys = [
        (value, math.copysign(1.0, value)) for value in torch.stack(tensors).tolist()
    ]
    return {
        name: distinct.setdefault(key, tensor)
        for (name, tensor), key in zip(column.items(), keys, strict=True)
    }


def check_same_keys(template: Mapping[str, Any], data: Any, place: str) -> None:
    """Refuse saved data that has not the keys of a template."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{place} must be a dict, got {type(data).__name__}")
    if data.keys() != template.keys():
        raise ValueError(
            f"{place} has {format_names(data)} in the checkpoint and "
            f"{format_names(template)} here; the checkpoint is of another transform"
        )


def check_like(template: Tensor, data: Any, place: str, *, exact: bool = False) -> None:
    """Refuse saved data that is no tensor like a template: of its shape and dtype.

    Of its kind of dtype unless exact: moments in float32 fit bfloat16 parameters.
    """
    if not isinstance(data, Tensor):
        raise ValueError(f"{place} must be a tensor, got {_described(data)}")
    if data.is_meta and not template.is_meta:
        raise ValueError(f"{place} is a meta tensor, without numbers; save real ones")
    if exact and (data.shape, data.dtype) != (template.shape, template.dtype):
        raise ValueError(
            f"{place} must have shape {tuple(template.shape)} and dtype "
            f"{template.dtype}, got {tuple(data.shape)} and {data.dtype}; the "
            "checkpoint is of another model"
        )
    if data.shape != template.shape:
        raise ValueError(
            f"{place} has shape {tuple(data.shape)} in the checkpoint, "
            f"{tuple(template.shape)} here; the checkpoint is of another model or "
            "transform"
        )
    if data.is_floating_point() != template.is_floating_point():
        raise ValueError(
            f"{place} has dtype {data.dtype} in the checkpoint, {template.dtype} here; "
            "the checkpoint is of another transform"
        )


def _check_type(data: Any, kind: str, place: str) -> None:
    if not isinstance(data, Mapping) or data.get("type") != kind:
        raise ValueError(
            f"{place} must be a {kind}, got {_described(data)}; the checkpoint is of "
            "another chain"
        )


def _described(data: Any) -> str:
    if isinstance(data, Mapping):
        kind = data.get("type")
        return (
            f"a {kind}" if isinstance(kind, str) else f"a dict of {format_names(data)}"
        )
    if isinstance(data, (list, tuple)):
        return f"a list of {len(data)}"
    return "a tensor" if isinstance(data, Tensor) else repr(data)

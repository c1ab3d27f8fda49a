"""Validate parameters, updates and states: names, layout, dtype, shape, device.

Values are never looked at: that would wait for the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._tensor_map import TensorMap, subset

V = TypeVar("V")


def check_parameters(params: Any) -> None:
    """Validate a map of parameters."""
    _check_map(params, "params", "parameters(model)")
    devices: dict[torch.device, str] = {}
    for name, param in params.items():
        _check_tensor("parameter", name, param)
        devices.setdefault(param.device, name)
    if len(devices) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(
            f"parameters lie on several devices: {places}; move them to one, or run "
            "one chain for each device"
        )


def check_updates(updates: Any, params: TensorMap) -> None:
    """Validate updates against the parameters."""
    if isinstance(updates, (list, tuple)) and any(map(torch.is_tensor, updates)):
        kind = type(updates).__name__
        raise TypeError(
            f"updates must be a dict from parameter name to tensor, got a {kind} of "
            "tensors; write dict(zip(params, torch.autograd.grad(...))), if that is "
            "where they come from"
        )
    if isinstance(updates, tuple):
        raise TypeError(
            "updates must be a dict, got a tuple; write updates, state = x.update(...)"
        )
    _check_map(updates, "updates", "gradients(model)")
    _check_map(params, "params", "parameters(model)")
    for name, update in updates.items():
        param = params.get(name)
        # One cheap look at each; only what fails it is looked at closely.
        if (
            not isinstance(param, Tensor)
            or not isinstance(update, Tensor)
            or not param.is_floating_point()
            or update.shape != param.shape
            or not update.is_floating_point()
            or update.layout != torch.strided
            or update.device != param.device
        ):
            _refuse(name, update, updates, params)


def check_names(updates: TensorMap, params: TensorMap) -> None:
    """Refuse updates for unknown names; `check_updates` checks the rest."""
    if not updates.keys() <= params.keys():
        check_updates(updates, params)


def check_state(transform: object, state: object, kind: type) -> None:
    """Validate the type of a state."""
    if not isinstance(state, kind):
        raise ValueError(
            f"{transform!r} needs a {kind.__name__}, got {describe_state(state)}; make "
            "it with this transform's init"
        )


def check_states(state: object, count: int, part: str) -> None:
    """Validate a tuple of the states of children."""
    if not isinstance(state, tuple) or len(state) != count:
        raise ValueError(
            f"state must be a tuple of {count} states, one for each {part}, got "
            f"{describe_state(state)}; make it with this transform's init"
        )


def describe_state(state: object) -> str:
    """Format the type of a state for an error message."""
    if isinstance(state, tuple):
        return f"{type(state).__name__} of length {len(state)}"
    return type(state).__name__


def _refuse(name: Any, update: Any, updates: TensorMap, params: TensorMap) -> None:
    """Raise the error of an update that does not fit its parameter."""
    if name not in params:
        unknown = [n for n in updates if n not in params]
        raise ValueError(
            f"updates for names that no parameter has: {format_names(unknown)}; the "
            f"parameters are {format_names(params)}"
        )
    param = params[name]
    _check_tensor("parameter", name, param)
    _check_tensor("update", name, update)
    if update.shape != param.shape:
        raise ValueError(
            f"update of {name!r} has shape {tuple(update.shape)}, its parameter "
            f"{tuple(param.shape)}; they must be equal"
        )
    raise ValueError(
        f"update of {name!r} lies on {update.device}, its parameter on "
        f"{param.device}; move one with .to(device)"
    )


def _check_map(tensors: Any, name: str, remedy: str) -> None:
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"{name} must be a dict from parameter name to tensor, got "
            f"{type(tensors).__name__}; make one with {remedy}"
        )


def _kind(value: Any) -> str:
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value) if plain else f"a {type(value).__name__}"


def _check_tensor(kind: str, name: Any, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        remedy = "; omit names without a gradient" if tensor is None else ""
        raise TypeError(
            f"{kind} of {name!r} must be a tensor, got {_kind(tensor)}{remedy}"
        )
    if not isinstance(name, str):
        raise TypeError(f"{kind} names must be strings, got {name!r}")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{kind} of {name!r} is sparse ({tensor.layout}); only dense tensors are "
            "optimized: use sparse=False in the embedding, or .to_dense()"
        )
    if not tensor.is_floating_point():
        remedy = (
            "pass torch.view_as_real(tensor)"
            if tensor.is_complex()
            else "leave it out, or convert it with .float()"
        )
        raise TypeError(
            f"{kind} of {name!r} has dtype {tensor.dtype}; only real floating-point "
            f"tensors are optimized: {remedy}"
        )


def check_same_names(
    what: str, given: Iterable[str], wanted: Iterable[str], kind: str = "parameter"
) -> None:
    """Refuse a map with missing or unknown names."""
    given, wanted = dict.fromkeys(given), dict.fromkeys(wanted)
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    if missing or unknown:
        raise ValueError(
            f"{what} must have a value for every {kind} and no other: missing "
            f"{format_names(missing)}, unknown {format_names(unknown)}"
        )


def validate_name(what: str, name: Any) -> str:
    """Validate the name of a part of a pipeline."""
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a string, got {name!r}")
    if not name or "." in name:
        raise ValueError(
            f'{what} must not be empty and not contain ".", which joins names, got '
            f"{name!r}"
        )
    return name


class _Model(threading.local):
    params: Mapping[str, Any] | None = None


_model = _Model()


@contextlib.contextmanager
def within_model(params: Mapping[str, Any]) -> Iterator[None]:
    """Check maps by name against all parameters of a model inside the block.

    So one map by name, or one mask, serves all parts of a pipeline.
    """
    before = _model.params
    _model.params = params if before is None else before
    try:
        yield
    finally:
        _model.params = before


def model_parameters(params: Mapping[str, V]) -> dict[str, V]:
    """Return the parameters of the model, of which `params` may be a subset."""
    return {**(_model.params or {}), **params}


def check_by_name(what: str, given: Mapping[str, Any], params: Mapping[str, V]) -> None:
    """Refuse a map that lacks one of `params`, or has a name that the model lacks."""
    check_same_names(what, given, {**params, **subset(model_parameters(params), given)})

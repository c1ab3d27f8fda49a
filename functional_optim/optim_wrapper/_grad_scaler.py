"""Build the `GradScaler` of `loss_scale=`, and share one between wrappers."""

from __future__ import annotations

import importlib
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from functional_optim.algebra._torch_modes import untraced
from functional_optim.optim_wrapper._errors import ConfigTypeError, ConfigValueError

_RANGES = {
    "init_scale": (0.0, math.inf),
    "scale": (0.0, math.inf),
    "growth_factor": (1.0, math.inf),
    "backoff_factor": (0.0, 1.0),
    "growth_interval": (0, 2**31),
    "_growth_tracker": (-1, 2**31),
}
"""The open ranges of the numbers of a scaler."""

_OPTIONS = {"init_scale", "growth_factor", "backoff_factor", "growth_interval"}


def checked_dtype(dtype: Any, valid: Sequence[str]) -> torch.dtype | None:
    """Return the dtype of autocast, None for the default of the device."""
    if isinstance(dtype, str) and dtype in valid:
        dtype = getattr(torch, dtype)
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    raise (ConfigValueError if isinstance(dtype, str) else ConfigTypeError)(
        f"dtype must be None, a torch.dtype, or one of {', '.join(valid)}, got "
        f"{dtype!r}"
    )


def scaler_of(
    loss_scale: Any, device: str, *, enabled: bool, use_fsdp: bool
) -> tuple[torch.amp.GradScaler, float | None]:
    """Return a scaler, and the scale that it keeps if it is static."""
    static: float | None = None
    options: dict[str, Any] = {"device": device, "enabled": enabled}
    if isinstance(loss_scale, Mapping):
        _check_options(loss_scale)
        options |= loss_scale
    elif isinstance(loss_scale, (int, float)) and not isinstance(loss_scale, bool):
        check_number("loss_scale", "init_scale", loss_scale)
        options["init_scale"] = static = float(loss_scale)
    elif loss_scale != "dynamic":
        raise ConfigTypeError(
            "loss_scale must be 'dynamic', a number, or a dict of arguments of "
            f"torch.amp.GradScaler, got {loss_scale!r}"
        )
    kind: Any = torch.amp.GradScaler
    if use_fsdp:
        module = importlib.import_module("torch.distributed.fsdp.sharded_grad_scaler")
        kind = module.ShardedGradScaler
    return kind(**options), static


def _check_options(options: Mapping[str, Any]) -> None:
    known = {*_OPTIONS, "enabled", "device"}
    for key, value in options.items():
        if key not in known:
            raise ConfigValueError(
                f"loss_scale may have the keys {', '.join(sorted(known))}, got {key!r}"
            )
        if key in _OPTIONS:
            check_number(f"loss_scale[{key!r}]", key, value)
        if key == "enabled" and not isinstance(value, bool):
            raise ConfigTypeError(
                f"loss_scale['enabled'] must be a bool, got {value!r}"
            )


def check_scaler_state(data: Any, needed: Iterable[str]) -> None:
    """Validate a saved scaler."""
    place = "state_dict['loss_scaler']"
    if not isinstance(data, Mapping):
        raise ConfigTypeError(f"{place} must be a dict, got {data!r}")
    for key in needed:
        if key not in data:
            raise ConfigValueError(
                f"{place} lacks {key!r}, it has {', '.join(map(str, data))}"
            )
        check_number(f"{place}[{key!r}]", key, data[key])


def check_number(place: str, key: str, value: Any) -> None:
    """Validate the number that a scaler has under a key."""
    least, most = _RANGES[key]
    kinds = (int,) if isinstance(least, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "an int" if isinstance(least, int) else "a number"
        raise ConfigTypeError(f"{place} must be {kind}, got {value!r}")
    if not least < value < most:
        limit = "finite" if most == math.inf else f"< {most:g}"
        raise ConfigValueError(f"{place} must be > {least:g} and {limit}, got {value}")


# -- a scaler of several wrappers ------------------------------------------------------

# torch's scaler is for one loop that unscales all, steps all, and updates the scale.
# Here wrappers step when their windows end; the scale stays while one of them has
# gradients that were multiplied by it.
_holding: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]]
_holding = weakref.WeakKeyDictionary()


@untraced
def hold_scale(scaler: Any, wrapper: Any) -> None:
    """Keep the scale until a wrapper steps: it ran a backward."""
    if scaler not in _holding:
        _holding[scaler] = weakref.WeakSet()
    _holding[scaler].add(wrapper)


@untraced
def release_scale(scaler: Any, wrapper: Any) -> None:
    """Let the scale change: a wrapper steps, or its gradients are gone."""
    if scaler in _holding:
        _holding[scaler].discard(wrapper)


def is_unscaled(scaler: Any, optimizer: Any) -> bool:
    """Return whether gradients were unscaled since the last step of an optimizer."""
    state = _states(scaler).get(id(optimizer))  # None yet, or no scaling.
    return state is not None and state["stage"] is OptState.UNSCALED


def found_infs(scaler: Any, optimizer: Any) -> list[Tensor]:
    """Return for each device what is nonzero if gradients were not finite."""
    found = _states(scaler)[id(optimizer)]["found_inf_per_device"].values()
    # `update` adds up the findings of all optimizers in one of these.
    return [tensor.clone() for tensor in found]


def reopen(scaler: Any, optimizer: Any, param: Tensor) -> None:
    """Let an optimizer step again although the scale was not updated meanwhile."""
    if scaler._scale is None:  # Gradients were loaded, and no loss was scaled yet.
        scaler.scale(param.detach().new_zeros(()))
    states = _states(scaler)
    if states[id(optimizer)]["stage"] is OptState.STEPPED:
        # The overflows of its last step count in the next update: under another key.
        states[object()] = states.pop(id(optimizer))


def forget_unscaled(scaler: Any, optimizer: Any) -> None:
    """Forget that gradients were unscaled: they are gone, their step failed."""
    if is_unscaled(scaler, optimizer):
        _states(scaler).pop(id(optimizer))


def update_scale(scaler: Any, new_scale: float | None) -> None:
    """Update the scale unless a wrapper holds it."""
    states = _states(scaler).values()
    if not _holding.get(scaler) and any(s["found_inf_per_device"] for s in states):
        scaler.update(new_scale)


def _states(scaler: Any) -> dict[Any, dict[str, Any]]:
    states: dict[Any, dict[str, Any]] = getattr(scaler, "_per_optimizer_states", {})
    return states

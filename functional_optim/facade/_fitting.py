"""Whether a saved state is of this optimizer, and the way back if it was not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from functional_optim.optim_wrapper._errors import MistakenValueError
from functional_optim.torch_optimizer._optimizer import TransformOptimizer

_LIKE_PARAMETERS = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "acc_delta",
    "sum",
    "exp_inf",
    "prev",
    "step_size",
    "ax",
}
"""What torch's optimizers keep in the shape of a parameter."""


def is_of_torch(optimizer: object) -> bool:
    """Whether an optimizer is one of torch's own classes."""
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")


def undo_of(optimizer: Any) -> Callable[[], None]:
    """Return what brings an optimizer back to where it is now, after a load.

    Args:
        optimizer: The optimizer. torch's make new state and groups when they load.
    """
    if isinstance(optimizer, TransformOptimizer):
        before = copy.deepcopy(optimizer.state_dict())
        return lambda: optimizer.load_state_dict(before)
    state, groups = optimizer.state, optimizer.param_groups

    def undo() -> None:
        optimizer.state, optimizer.param_groups = state, groups

    return undo


def check_fits(data: Mapping[str, Any], optimizer: Any) -> None:
    """Refuse a state of another model or optimizer: torch loads some, and fails later.

    Args:
        data: The state.
        optimizer: The optimizer.

    Raises:
        MistakenValueError: saying what differs.
    """
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if key not in data:
            msg = f"state_dict lacks {key!r}, it has {sorted(map(str, data))}"
            raise MistakenValueError(msg)
        if not isinstance(data[key], kind):
            msg = f"state_dict[{key!r}] must be a {kind.__name__}, got {data[key]!r}"
            raise MistakenValueError(msg)
    saved, groups = data["param_groups"], optimizer.param_groups
    if len(saved) != len(groups):
        msg = (
            f"state_dict has {len(saved)} parameter groups, the optimizer "
            f"{len(groups)}; it is of another model or paramwise_cfg"
        )
        raise MistakenValueError(msg)
    needed = _settings(optimizer) if is_of_torch(optimizer) else []
    for index, (theirs, own) in enumerate(zip(saved, groups, strict=True)):
        place = f"param_groups[{index}] of state_dict"
        for key in ("params", *needed):
            if key not in theirs:
                kind_ = type(optimizer).__name__
                msg = f"{place} lacks {key!r}; it is not of {kind_}"
                raise MistakenValueError(msg)
        if len(theirs["params"]) != len(own["params"]):
            msg = (
                f"{place} has {len(theirs['params'])} parameters, the optimizer's "
                f"{len(own['params'])}"
            )
            raise MistakenValueError(msg)
        if is_of_torch(optimizer):
            for key, param in zip(theirs["params"], own["params"], strict=True):
                _check_entry(data["state"].get(key), key, param)


def _settings(optimizer: Any) -> list[str]:
    """Return the settings that every version of torch's class has: its numbers."""
    kinds = (float, int, tuple, Tensor)
    return [
        key
        for key, value in optimizer.defaults.items()
        if isinstance(value, kinds) and not isinstance(value, bool)
    ]


def _check_entry(entry: Any, key: Any, param: Tensor) -> None:
    if entry is None:
        return
    if not isinstance(entry, Mapping):
        msg = f"state[{key!r}] of state_dict must be a dict, got {entry!r}"
        raise MistakenValueError(msg)
    for name, value in entry.items():
        if name not in _LIKE_PARAMETERS or value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != param.shape:
            told = repr(value)
            if isinstance(value, Tensor):
                told = f"shape {tuple(value.shape)}"
            msg = (
                f"{name!r} of parameter {key} has {told} in state_dict, the parameter "
                f"{tuple(param.shape)}; it is of another model"
            )
            raise MistakenValueError(msg)
        if value.is_meta and not param.is_meta:
            msg = f"{name!r} of parameter {key} is on meta in state_dict: it is empty"
            raise MistakenValueError(msg)

"""Loss scaling: what `loss_scale` and `dtype` may be, and a saved scaler."""

from __future__ import annotations

import importlib
import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.amp.grad_scaler import OptState

from functional_optim.algebra._torch_modes import untraced
from functional_optim.optim_wrapper._errors import ConfigTypeError, ConfigValueError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

_ABOVE = {"init_scale": 0.0, "growth_factor": 1.0, "backoff_factor": 0.0}


_SCALER_KEYS = {*_ABOVE, "growth_interval", "enabled", "device"}


_LEAST = {
    "scale": 0.0,
    "growth_factor": 1.0,
    "backoff_factor": 0.0,
    "growth_interval": 0,
    "_growth_tracker": -1,
}


_MOST = {
    "scale": math.inf,
    "growth_factor": math.inf,
    "backoff_factor": 1.0,
    "growth_interval": 2**31,
    "_growth_tracker": 2**31,
}


def checked_dtype(dtype: Any, valid: Sequence[str]) -> torch.dtype | None:
    """Return the dtype of autocast; None stands for the device's default.

    Example:
        >>> checked_dtype("float16", ["float16"])
        torch.float16
    """
    if isinstance(dtype, str):
        if dtype not in valid:
            raise ConfigValueError(
                f"dtype must be one of {', '.join(valid)}, got {dtype!r}"
            )
        found: torch.dtype = getattr(torch, dtype)
        return found
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    raise ConfigTypeError(
        f"dtype must be a torch.dtype, its name, or None, got {dtype!r}"
    )


def scaler_of(
    loss_scale: Any, device: str, *, enabled: bool, use_fsdp: bool
) -> tuple[torch.amp.GradScaler, float | None]:
    """Return a scaler, and the scale that it keeps if it is static."""
    static: float | None = None
    options: dict[str, Any] = {"enabled": enabled}
    if isinstance(loss_scale, Mapping):
        options |= _checked_options(loss_scale)
    elif isinstance(loss_scale, (int, float)) and not isinstance(loss_scale, bool):
        options["init_scale"] = static = float(loss_scale)
        _check_above("loss_scale", loss_scale, 0.0)
    elif loss_scale != "dynamic":
        raise ConfigTypeError(
            "loss_scale must be 'dynamic', a number, or a dict of arguments of "
            f"torch.amp.GradScaler, got {loss_scale!r}"
        )
    kind: Any = torch.amp.GradScaler
    if use_fsdp:
        module = importlib.import_module("torch.distributed.fsdp.sharded_grad_scaler")
        kind = module.ShardedGradScaler
    return kind(**{"device": device, **options}), static


def _checked_options(given: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in given.items():
        if key not in _SCALER_KEYS:
            known = ", ".join(sorted(_SCALER_KEYS))
            raise ConfigValueError(f"loss_scale may have the keys {known}, got {key!r}")
        if key in _ABOVE:
            _check_above(f"loss_scale[{key!r}]", value, _ABOVE[key])
    if not isinstance(given.get("enabled", True), bool):
        raise ConfigTypeError(
            f"loss_scale['enabled'] must be a bool, got {given['enabled']!r}"
        )
    interval = given.get("growth_interval", 1)
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ConfigValueError(
            f"loss_scale['growth_interval'] must be an int >= 1, got {interval!r}"
        )
    if given.get("backoff_factor", 0.5) >= 1.0:
        raise ConfigValueError(
            f"loss_scale['backoff_factor'] must be < 1, got {given['backoff_factor']}"
        )
    return dict(given)


def check_scaler_state(data: Any, needed: Iterable[str]) -> None:
    """Refuse what no scaler saved."""
    place = "state_dict['loss_scaler']"
    if not isinstance(data, Mapping):
        raise ConfigTypeError(f"{place} must be a dict, got {data!r}")
    for key in needed:
        if key not in data:
            raise ConfigValueError(
                f"{place} lacks {key!r}, it has {', '.join(map(str, data))}"
            )
        if isinstance(data[key], bool) or not isinstance(data[key], (int, float)):
            raise ConfigTypeError(
                f"{place}[{key!r}] must be a number, got {data[key]!r}"
            )
    for key, most in _MOST.items():
        if key in data and not _LEAST[key] < data[key] < most:
            raise ConfigValueError(
                f"{place}[{key!r}] must be > {_LEAST[key]:g} and < {most:g}, got "
                f"{data[key]}"
            )
    for key in {"growth_interval", "_growth_tracker"} & data.keys():
        if not isinstance(data[key], int):
            raise ConfigTypeError(f"{place}[{key!r}] must be an int, got {data[key]!r}")


def _check_above(name: str, value: Any, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigTypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > least):
        raise ConfigValueError(f"{name} must be finite and > {least:g}, got {value}")


class SharedScaler:
    """A scaler, and the wrappers of it that are between a backward and their step.

    torch's scaler is for one loop that unscales all, steps all, and updates the scale.
    Here wrappers step when their windows end; the scale stays while one of them has
    gradients that were multiplied by it.
    """

    _known: ClassVar[Any] = weakref.WeakKeyDictionary()

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler = weakref.ref(scaler)
        self._wrappers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._earlier = 0

    @classmethod
    @untraced
    def of(cls, scaler: torch.amp.GradScaler) -> SharedScaler:
        """Return those of a scaler."""
        found: SharedScaler | None = cls._known.get(scaler)
        if found is None:
            found = cls._known[scaler] = cls(scaler)
        return found

    @untraced
    def add(self, wrapper: Any) -> None:
        """Note that a wrapper ran a backward."""
        self._wrappers.add(wrapper)

    @untraced
    def remove(self, wrapper: Any) -> None:
        """Note that it steps."""
        self._wrappers.discard(wrapper)

    def is_unscaled(self, optimizer: Any) -> bool:
        """Whether the gradients of an optimizer were unscaled since its last step."""
        state = self._states().get(id(optimizer))  # None yet, or no scaling.
        return state is not None and state["stage"] is OptState.UNSCALED

    def found_inf(self, optimizer: Any) -> list[Tensor]:
        """Return what tells whether gradients were not finite, for each device."""
        found = self._states()[id(optimizer)]["found_inf_per_device"].values()
        # `update` adds up the findings of all optimizers in one of these.
        return [tensor.clone() for tensor in found]

    def reopen(self, optimizer: Any, param: Tensor) -> None:
        """Let an optimizer step again although the scale was not updated meanwhile.

        What its last step found still counts when it is: under a key of its own.
        """
        scaler: Any = self._scaler()
        if scaler._scale is None:  # Gradients were loaded, and no loss was scaled yet.
            scaler.scale(param.detach().new_zeros(()))
        states = self._states()
        if states[id(optimizer)]["stage"] is OptState.STEPPED:
            self._earlier += 1
            states[-self._earlier] = states.pop(id(optimizer))

    def forget(self, optimizer: Any) -> None:
        """Forget that gradients were unscaled: they are gone, their step failed."""
        if self.is_unscaled(optimizer):
            self._states().pop(id(optimizer))

    def update(self, new_scale: float | None) -> None:
        """Update the scale if no wrapper waits for it to stay."""
        scaler = self._scaler()
        if scaler is None or self._wrappers:
            return
        if any(state["found_inf_per_device"] for state in self._states().values()):
            scaler.update(new_scale)

    def _states(self) -> dict[int, dict[str, Any]]:
        scaler: Any = self._scaler()
        states: dict[int, dict[str, Any]]
        states = getattr(scaler, "_per_optimizer_states", {})
        return states

"""The state of a wrapper: its optimizer's, and what else a resume needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functional_optim.algebra._torch_modes import untraced
from functional_optim.optim_wrapper._accumulation import Windowed, check_counts
from functional_optim.optim_wrapper._errors import ConfigTypeError, ConfigValueError
from functional_optim.optim_wrapper._settings import ShownSettings
from functional_optim.torch_optimizer._optimizer import TransformOptimizer
from functional_optim.torch_optimizer._state_dict import plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from functional_optim.optim_wrapper._no_sync import Suppression

Take: TypeAlias = Callable[[], None]
"""Takes over what was checked before; it cannot fail."""


_COUNTS = {"inner_count": 0, "max_counts": -1}


class Prepared(NamedTuple):
    """A state that was checked, and is not loaded yet."""

    optimizer: dict[str, Any]
    takes: list[Take]


class WrapperState(Windowed, ShownSettings):
    """Saves and loads a wrapper."""

    _suppression: Suppression

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, and beside it what the wrapper adds.

        Gradients that wait for a step are those of this process: with several, save
        where a window ends, or on each of them.
        """
        found = dict(self.optimizer.state_dict())
        if self.base_param_settings is not None:
            found["base_param_settings"] = copy.deepcopy(self.base_param_settings)
        if self._on_gradients is not None and not self._on_gradients.is_clip:
            given = self._parameters(), self._named
            found["transform"] = self._on_gradients.saved(*given)
        accumulation = self._saved_accumulation()
        if accumulation is not None:
            found["accumulation"] = accumulation
        return {key: plain(value) for key, value in found.items()}

    @untraced
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, of this class or of MMEngine's.

        Without counts in it, as MMEngine saves it, a window that is open is given up,
        and counting begins where it began before.
        """
        prepared = self.prepared(state_dict)
        optimizer = self.optimizer
        with torch.inference_mode(mode=False):
            # Ours checks before it changes anything.
            own = isinstance(optimizer, TransformOptimizer)
            undo = None if own else undo_of(optimizer)
            try:
                optimizer.load_state_dict(prepared.optimizer)
            except Exception:
                if undo is not None:
                    undo()
                raise
            for take in prepared.takes:
                take()

    def prepared(self, state_dict: Mapping[str, Any]) -> Prepared:
        """Check a saved state, and return what there is to load; nothing changes."""
        if not isinstance(state_dict, Mapping):
            raise ConfigTypeError(
                f"state_dict must be a dict, got a {type(state_dict).__name__}"
            )
        given = dict(state_dict)
        with torch.inference_mode(mode=False):
            takes = list(self._checked(given))
        given.pop("loss_scaler", None)  # Of mixed precision, which may be off now.
        check_fits(given, self.optimizer)
        return Prepared(given, takes)

    def _checked(self, given: dict[str, Any]) -> Iterator[Take]:
        """Check what the wrapper adds, and take it out of a dict of the caller's."""
        base = given.pop("base_param_settings", None)
        if base is not None:
            yield self._checked_base_settings(base)
        data = given.pop("transform", None)
        own = self._on_gradients
        if data is not None:
            if own is None or own.is_clip:
                raise ConfigValueError(
                    "state_dict has the state of a transform, this wrapper has none; "
                    "build it with the same transform=..."
                )
            state = own.loaded(data, self._parameters(), self._named)
            yield lambda: own.take(state)
        accumulation = given.pop("accumulation", None)
        yield (
            self._give_up_window
            if accumulation is None
            else self._checked_accumulation(accumulation)
        )

    def _checked_base_settings(self, base: Any) -> Take:
        own = self.base_param_settings
        if not isinstance(base, Mapping):
            kind = type(base).__name__
            raise ConfigTypeError(f"base_param_settings must be a dict, got a {kind}")
        if own is not None and "lr" in own and "lr" not in base:
            raise ConfigValueError(
                f"base_param_settings lacks 'lr', it has {sorted(map(str, base))}"
            )

        def take() -> None:
            if self.base_param_settings is not None:
                self.base_param_settings = copy.deepcopy(dict(base))

        return take

    # -- windows ---------------------------------------------------------------------

    def _loss_scale(self) -> float:
        """Return what gradients that wait for a step are multiplied by."""
        return 1.0

    def _took_gradients(self) -> None:
        """Note that there are gradients that wait for a step."""
        self._unspent = True

    def _saved_accumulation(self) -> dict[str, Any] | None:
        counts = {key: getattr(self, f"_{key}") for key in _COUNTS}
        grads = {
            index: param.grad
            for index, param in enumerate(self._parameters())
            if param.grad is not None
        }
        # Outside a window there may be some of other wrappers' backwards.
        unspent = self._unspent or any(g.is_sparse or g.any() for g in grads.values())
        if counts == _COUNTS and not (grads and unspent):
            return None
        found: dict[str, Any] = dict(counts)
        if unspent:
            self._suppression.check_gradients_are_here(self._parameters())
            self._warn_of_other_processes()
            found["gradients"] = {i: g.detach().clone() for i, g in grads.items()}
            found["loss_scale"] = self._loss_scale()
        elif grads:
            # zero_grad(set_to_none=False): a zero is not the same as no gradient.
            found["zeros"] = list(grads)
        return found

    def _warn_of_other_processes(self) -> None:
        several = (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        )
        if several and torch.distributed.get_world_size() > 1:
            self._warn_once(
                "The state is saved while gradients wait for a step; they are those of "
                "this process. Save where a window ends, or on each process."
            )

    def _give_up_window(self) -> None:
        if self._inner_count != self._began_at or self._unspent:
            self._inner_count, self._unspent = self._began_at, False
            for param in self._parameters():
                param.grad = None

    def _checked_accumulation(self, data: Any) -> Take:
        place = "state_dict['accumulation']"
        if not isinstance(data, Mapping) or not _COUNTS.keys() <= data.keys():
            raise ConfigValueError(
                f"{place} must have {', '.join(_COUNTS)}, got {data!r}"
            )
        for key, least in _COUNTS.items():
            check_counts(f"{place}[{key!r}]", data[key], least)
        scale = data.get("loss_scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale <= 0:
            raise ConfigValueError(
                f"{place}['loss_scale'] must be a number above 0, got {scale!r}"
            )
        params = self._parameters()
        grads, zeros = data.get("gradients", {}), data.get("zeros", [])
        if not isinstance(grads, Mapping) or not isinstance(zeros, list):
            raise ConfigTypeError(
                f"{place} must have gradients by index and zeros as a list of them"
            )
        for index in [*grads, *zeros]:
            if not isinstance(index, int) or not 0 <= index < len(params):
                raise ConfigValueError(
                    f"{place} has a gradient for parameter {index!r}, the optimizer "
                    f"has {len(params)} parameters; it is of another model"
                )
        new = {i: _checked_gradient(place, i, g, params[i]) for i, g in grads.items()}
        new |= {i: torch.zeros_like(params[i]) for i in zeros}

        def take() -> None:
            self._inner_count = data["inner_count"]
            self._set_end(data["max_counts"])
            self._unspent = False
            factor = self._loss_scale() / scale if grads else 1.0
            for index, param in enumerate(params):
                grad = new.get(index)
                if grad is not None and factor != 1.0:
                    grad = grad * factor
                _set_gradient(param, grad)
            if "gradients" in data:
                self._took_gradients()

        return take


def _checked_gradient(place: str, index: int, grad: Any, param: Tensor) -> Tensor:
    fits = (
        isinstance(grad, Tensor)
        and grad.shape == param.shape
        and grad.is_complex() == param.is_complex()
        and grad.is_meta == param.is_meta
    )
    if not fits:
        told = repr(grad)
        if isinstance(grad, Tensor):
            told = f"{tuple(grad.shape)}, {grad.dtype} on {grad.device}"
        raise ConfigValueError(
            f"{place}['gradients'][{index}] must be like its parameter, "
            f"{tuple(param.shape)}, {param.dtype}, got {told}; it is of another model"
        )
    own: Tensor = grad.detach().to(param.device, copy=True)
    return own


def _set_gradient(param: Tensor, grad: Tensor | None) -> None:
    """Put a gradient where the old one lies, so that views of it stay valid."""
    old = param.grad
    in_place = (
        old is not None
        and grad is not None
        and old.layout is grad.layout is torch.strided
        and old.dtype is grad.dtype
        and not old.is_inference()
        and 0 not in old.stride()
    )
    if in_place and old is not None and grad is not None:
        old.detach().copy_(grad)
    else:
        param.grad = grad


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
    """Return what brings an optimizer back to where it is now, after a load."""
    if isinstance(optimizer, TransformOptimizer):
        before = copy.deepcopy(optimizer.state_dict())
        return lambda: optimizer.load_state_dict(before)
    state, groups = optimizer.state, optimizer.param_groups

    def undo() -> None:
        optimizer.state, optimizer.param_groups = state, groups

    return undo


def check_fits(data: Mapping[str, Any], optimizer: Any) -> None:
    """Refuse a state of another model: torch loads some, and fails later."""
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if key not in data:
            raise ConfigValueError(
                f"state_dict lacks {key!r}, it has {sorted(map(str, data))}"
            )
        if not isinstance(data[key], kind):
            raise ConfigValueError(
                f"state_dict[{key!r}] must be a {kind.__name__}, got {data[key]!r}"
            )
    saved, groups = data["param_groups"], optimizer.param_groups
    if len(saved) != len(groups):
        raise ConfigValueError(
            f"state_dict has {len(saved)} parameter groups, the optimizer "
            f"{len(groups)}; it is of another model or paramwise_cfg"
        )
    needed = _settings(optimizer) if is_of_torch(optimizer) else []
    for index, (theirs, own) in enumerate(zip(saved, groups, strict=True)):
        place = f"param_groups[{index}] of state_dict"
        for key in ("params", *needed):
            if key not in theirs:
                kind_ = type(optimizer).__name__
                raise ConfigValueError(f"{place} lacks {key!r}; it is not of {kind_}")
        if len(theirs["params"]) != len(own["params"]):
            raise ConfigValueError(
                f"{place} has {len(theirs['params'])} parameters, the optimizer's "
                f"{len(own['params'])}"
            )
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
        raise ConfigValueError(
            f"state[{key!r}] of state_dict must be a dict, got {entry!r}"
        )
    for name, value in entry.items():
        if name not in _LIKE_PARAMETERS or value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != param.shape:
            told = repr(value)
            if isinstance(value, Tensor):
                told = f"shape {tuple(value.shape)}"
            raise ConfigValueError(
                f"{name!r} of parameter {key} has {told} in state_dict, the parameter "
                f"{tuple(param.shape)}; it is of another model"
            )
        if value.is_meta and not param.is_meta:
            raise ConfigValueError(
                f"{name!r} of parameter {key} is on meta in state_dict: it is empty"
            )

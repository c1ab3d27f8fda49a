"""The state of a wrapper: its optimizer's, and what else a resume needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from functional_optim.facade._mistakes import MistakenTypeError, MistakenValueError
from functional_optim.facade._shown_settings import ShownSettings
from functional_optim.facade._windowed import Windowed, check_counts

if TYPE_CHECKING:
    from collections.abc import Iterator

Take: TypeAlias = Callable[[], None]
"""Takes over what was checked before; it cannot fail."""

_COUNTS = {"inner_count": 0, "max_counts": -1, "remainder_counts": -1}
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


class WrapperState(Windowed, ShownSettings):
    """Saves and loads a wrapper."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, and beside it what the wrapper adds.

        Returns:
            What the optimizer returns, with `base_param_settings` if there are several
            groups, `transform` if one was given, and `accumulation` once a micro-batch
            was counted: the counts, and inside a window the gradients so far.
        """
        found = dict(self.optimizer.state_dict())
        if self.base_param_settings is not None:
            found["base_param_settings"] = copy.deepcopy(self.base_param_settings)
        if self._between is not None and self._between.has_state:
            given = self._parameters(), self._named
            found["transform"] = self._between.saved(*given)
        accumulation = self._saved_accumulation()
        if accumulation is not None:
            found["accumulation"] = accumulation
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, of this class or of MMEngine's.

        Args:
            state_dict: What `state_dict` returned; it does not change.

        Raises:
            ValueError, TypeError: it does not fit; nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            msg = f"state_dict must be a dict, got a {type(state_dict).__name__}"
            raise MistakenTypeError(msg)
        given = dict(state_dict)
        takes = list(self._checked(given))
        given.pop("loss_scaler", None)  # Of mixed precision, which may be off now.
        _check_fits(given, self.optimizer.param_groups)
        self.optimizer.load_state_dict(given)
        for take in takes:
            take()

    def _checked(self, given: dict[str, Any]) -> Iterator[Take]:
        """Check what the wrapper adds, and take it out of a dict of the caller's."""
        base = given.pop("base_param_settings", None)
        if base is not None:
            yield self._checked_base_settings(base)
        data = given.pop("transform", None)
        between = self._between
        if data is not None:
            if between is None or not between.has_state:
                msg = (
                    "state_dict has the state of a transform, this wrapper has none; "
                    "build it with the same transform=..."
                )
                raise MistakenValueError(msg)
            state = between.loaded(data, self._parameters(), self._named)
            yield lambda: between.take(state)
        accumulation = given.pop("accumulation", None)
        if accumulation is not None:
            yield self._checked_accumulation(accumulation)

    def _checked_base_settings(self, base: Any) -> Take:
        if not isinstance(base, Mapping):
            kind = type(base).__name__
            msg = f"base_param_settings must be a dict, got a {kind}"
            raise MistakenTypeError(msg)

        def take() -> None:
            if self.base_param_settings is not None:
                self.base_param_settings = copy.deepcopy(dict(base))

        return take

    # -- windows ---------------------------------------------------------------------

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
            found["gradients"] = {i: g.detach().clone() for i, g in grads.items()}
        elif grads:
            # zero_grad(set_to_none=False): a zero is not the same as no gradient.
            found["zeros"] = list(grads)
        return found

    def _checked_accumulation(self, data: Any) -> Take:
        place = "state_dict['accumulation']"
        if not isinstance(data, Mapping) or not _COUNTS.keys() <= data.keys():
            msg = f"{place} must have {', '.join(_COUNTS)}, got {data!r}"
            raise MistakenValueError(msg)
        for key, least in _COUNTS.items():
            check_counts(f"{place}[{key!r}]", data[key], least)
        params = self._parameters()
        grads, zeros = data.get("gradients", {}), data.get("zeros", [])
        if not isinstance(grads, Mapping) or not isinstance(zeros, list):
            msg = f"{place} must have gradients by index and zeros as a list of them"
            raise MistakenTypeError(msg)
        for index in [*grads, *zeros]:
            if not isinstance(index, int) or not 0 <= index < len(params):
                msg = (
                    f"{place} has a gradient for parameter {index!r}, the optimizer "
                    f"has {len(params)} parameters; it is of another model"
                )
                raise MistakenValueError(msg)
        for index, grad in grads.items():
            shape = tuple(params[index].shape)
            if not isinstance(grad, Tensor) or grad.shape != shape:
                told = tuple(grad.shape) if isinstance(grad, Tensor) else repr(grad)
                msg = (
                    f"{place}['gradients'][{index}] must have the shape of its "
                    f"parameter, {shape}, got {told}; it is of another model"
                )
                raise MistakenValueError(msg)

        def take() -> None:
            for key in _COUNTS:
                setattr(self, f"_{key}", data[key])
            self._unspent = "gradients" in data
            for index, param in enumerate(params):
                _set_gradient(param, grads.get(index), zero=index in zeros)

        return take


def _set_gradient(param: Tensor, grad: Tensor | None, *, zero: bool) -> None:
    if grad is None and not zero:
        param.grad = None
        return
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    if grad is None:
        param.grad.zero_()
    else:
        param.grad.copy_(grad)


def _check_fits(data: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse a state of another model: torch loads some of them, and fails later.

    Raises:
        MistakenValueError: saying what differs.
    """
    for key in ("state", "param_groups"):
        if key not in data:
            msg = f"state_dict lacks {key!r}, it has {sorted(map(str, data))}"
            raise MistakenValueError(msg)
    saved = data["param_groups"]
    if len(saved) != len(groups):
        msg = (
            f"state_dict has {len(saved)} parameter groups, the optimizer "
            f"{len(groups)}; it is of another model or paramwise_cfg"
        )
        raise MistakenValueError(msg)
    for index, (theirs, own) in enumerate(zip(saved, groups, strict=True)):
        if len(theirs["params"]) != len(own["params"]):
            msg = (
                f"param_groups[{index}] of state_dict has {len(theirs['params'])} "
                f"parameters, the optimizer's {len(own['params'])}"
            )
            raise MistakenValueError(msg)
        for key, param in zip(theirs["params"], own["params"], strict=True):
            _check_entry(data["state"].get(key), key, param)


def _check_entry(entry: Any, key: Any, param: Tensor) -> None:
    if not isinstance(entry, Mapping):
        return
    for name, value in entry.items():
        if name not in _LIKE_PARAMETERS or not isinstance(value, Tensor):
            continue
        if value.ndim and value.shape != param.shape:
            msg = (
                f"{name!r} of parameter {key} has shape {tuple(value.shape)} in "
                f"state_dict, the parameter {tuple(param.shape)}; it is of another "
                "model"
            )
            raise MistakenValueError(msg)

"""Checkpoints of a wrapper: validate everything, then load, and undo what fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from functional_optim.core._state_dict import check_like
from functional_optim.optim_wrapper._accumulation import AccumulationWindow, check_count
from functional_optim.optim_wrapper._errors import ConfigTypeError, ConfigValueError
from functional_optim.optim_wrapper._grad_scaler import check_number
from functional_optim.optim_wrapper._gradient_transform import GradientTransform
from functional_optim.optim_wrapper._no_sync import NoSync
from functional_optim.optim_wrapper._settings import is_torch_optimizer
from functional_optim.torch_optimizer._optimizer import TransformOptimizer
from functional_optim.torch_optimizer._state_dict import plain, saved_groups

ApplyState: TypeAlias = Callable[[], None]
"""Loads what was validated before; it cannot fail."""


class Checkpointed(Protocol):
    """The parts of a wrapper that its state dict has."""

    optimizer: Any
    base_param_settings: dict[str, Any] | None
    _window: AccumulationWindow
    _transform: GradientTransform | None
    _names: dict[Tensor, str]
    _no_sync: NoSync

    def _parameters(self) -> list[Tensor]: ...

    def _loss_scale(self) -> float: ...


class CheckedState(NamedTuple):
    """The state of a wrapper, validated and not loaded yet."""

    optimizer: Any
    load_optimizer: Callable[[], Any]
    entries: Sequence[ApplyState] = ()


def save(wrapper: Checkpointed) -> dict[str, Any]:
    """Return the state of the optimizer, and beside it that of the wrapper."""
    saved = dict(wrapper.optimizer.state_dict())
    if wrapper.base_param_settings is not None:
        saved["base_param_settings"] = copy.deepcopy(wrapper.base_param_settings)
    if wrapper._transform is not None:
        wrapper._transform.prepare(wrapper._parameters(), wrapper._names)
        saved["transform"] = wrapper._transform.save()
    window = _saved_window(wrapper)
    if window is not None:
        saved["accumulation"] = window
    return {key: plain(value) for key, value in saved.items()}


def check(wrapper: Checkpointed, state_dict: Any) -> CheckedState:
    """Validate a state dict, of a wrapper or of its optimizer."""
    check_mapping("state_dict", state_dict)
    rest = dict(state_dict)
    with torch.inference_mode(mode=False):
        entries = list(_checked_entries(wrapper, rest))
    _check_optimizer_state(rest, wrapper.optimizer)
    load_optimizer = partial(wrapper.optimizer.load_state_dict, rest)
    return CheckedState(wrapper.optimizer, load_optimizer, entries)


def load(states: Sequence[CheckedState]) -> None:
    """Load the states of all wrappers, or of none."""
    with torch.inference_mode(mode=False):
        undo = [_undo_of(state.optimizer, alone=len(states) == 1) for state in states]
        try:
            for state in states:
                state.load_optimizer()
        except Exception:
            for restore in undo:
                restore()
            raise
        for state in states:
            for apply in state.entries:
                apply()


def _undo_of(optimizer: Any, *, alone: bool) -> Callable[[], Any]:
    if isinstance(optimizer, TransformOptimizer):
        if alone:  # It validates before it changes anything.
            return lambda: None
        before = optimizer.state_dict()
        return lambda: optimizer.load_state_dict(before)
    state, groups = optimizer.state, optimizer.param_groups

    def undo() -> None:
        optimizer.state, optimizer.param_groups = state, groups

    return undo


def check_mapping(name: str, value: Any) -> None:
    """Refuse what is not a dict."""
    if not isinstance(value, Mapping):
        raise ConfigTypeError(f"{name} must be a dict, got a {type(value).__name__}")


def _checked_entries(
    wrapper: Checkpointed, rest: dict[str, Any]
) -> Iterator[ApplyState]:
    """Take the entries of a wrapper out of a state dict, and validate them."""
    rest.pop("loss_scaler", None)  # Of mixed precision, which may be off now.
    base, own = rest.pop("base_param_settings", None), wrapper.base_param_settings
    if base is not None:
        check_mapping("base_param_settings", base)
    if base is not None and own is not None:
        if "lr" in own and "lr" not in base:
            raise ConfigValueError(
                f"base_param_settings lacks 'lr', it has {sorted(map(str, base))}"
            )
        new = copy.deepcopy(dict(base))
        yield lambda: setattr(wrapper, "base_param_settings", new)
    data, transform = rest.pop("transform", None), wrapper._transform
    if data is not None:
        if transform is None:
            raise ConfigValueError(
                "state_dict has the state of a transform, this wrapper has none; "
                "build it with the same transform=..."
            )
        transform.prepare(wrapper._parameters(), wrapper._names)
        yield transform.check(data)
    yield _checked_window(wrapper, rest.pop("accumulation", None))


# -- an open window --------------------------------------------------------------------

_COUNTS = {"inner_count": 0, "max_counts": -1}


def _saved_window(wrapper: Checkpointed) -> dict[str, Any] | None:
    """Return the counts and the gradients that wait for a step; None without any."""
    window, params = wrapper._window, wrapper._parameters()
    saved: dict[str, Any] = {key: getattr(window, key) for key in _COUNTS}
    grads = {i: p.grad for i, p in enumerate(params) if p.grad is not None}
    # Outside a window there may be some of other wrappers' backwards.
    wait = window.has_gradients or any(g.is_sparse or g.any() for g in grads.values())
    if saved == _COUNTS and not (grads and wait):
        return None
    if wait:
        wrapper._no_sync.check_gradients_are_here(params)
        several = (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        )
        if several and torch.distributed.get_world_size() > 1:
            window.warn_once(
                "The state is saved while gradients wait for a step; they are those of "
                "this process. Save where a window ends, or on each process."
            )
        saved["gradients"] = {i: g.detach().clone() for i, g in grads.items()}
        saved["loss_scale"] = wrapper._loss_scale()
    elif grads:
        # zero_grad(set_to_none=False): a zero is not the same as no gradient.
        saved["zeros"] = list(grads)
    return saved


def _give_up_window(wrapper: Checkpointed) -> None:
    window = wrapper._window
    if window.inner_count != window.init_counts or window.has_gradients:
        window.inner_count, window.has_gradients = window.init_counts, False
        for param in wrapper._parameters():
            param.grad = None


def _checked_window(wrapper: Checkpointed, data: Any) -> ApplyState:
    if data is None:
        return partial(_give_up_window, wrapper)
    place = "state_dict['accumulation']"
    if not isinstance(data, Mapping) or not _COUNTS.keys() <= data.keys():
        raise ConfigValueError(f"{place} must have {', '.join(_COUNTS)}, got {data!r}")
    for key, least in _COUNTS.items():
        check_count(f"{place}[{key!r}]", data[key], least)
    scale = data.get("loss_scale", 1.0)
    check_number(f"{place}['loss_scale']", "scale", scale)
    window, params = wrapper._window, wrapper._parameters()
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
    for index, grad in grads.items():
        check_like(params[index], grad, f"{place}['gradients'][{index}]")
    new = {i: g.detach().to(params[i].device, copy=True) for i, g in grads.items()}
    new |= {i: torch.zeros_like(params[i]) for i in zeros}

    def apply() -> None:
        window.inner_count = data["inner_count"]
        window.set_end(data["max_counts"])
        window.has_gradients = "gradients" in data
        factor = wrapper._loss_scale() / scale if grads else 1.0
        for index, param in enumerate(params):
            grad = new.get(index)
            if grad is not None and factor != 1.0:
                grad = grad * factor
            _set_gradient(param, grad)

    return apply


def _set_gradient(param: Tensor, grad: Tensor | None) -> None:
    """Write a gradient into the old one where possible, so that its views see it."""
    old = param.grad
    if (
        old is not None
        and grad is not None
        and old.layout is grad.layout is torch.strided
        and old.dtype is grad.dtype
        and not old.is_inference()
        and 0 not in old.stride()
    ):
        old.detach().copy_(grad)
    else:
        param.grad = grad


# -- the optimizer ---------------------------------------------------------------------

# The state of torch's optimizers that has the shape of its parameter.
_LIKE_PARAMETERS = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),  # Adam and its variants
    *("momentum_buffer", "square_avg", "grad_avg", "acc_delta"),  # SGD, RMSprop
    *("sum", "prev", "step_size", "ax"),  # Adagrad, Rprop, ASGD
}


def _check_optimizer_state(data: Mapping[str, Any], optimizer: Any) -> None:
    """Refuse a state of another model: torch loads some, and fails later."""
    saved = saved_groups(data, optimizer.param_groups)
    if not is_torch_optimizer(optimizer):
        return
    # Every version of torch's class has its numbers; flags were added later.
    numbers = [
        key
        for key, value in optimizer.defaults.items()
        if isinstance(value, (float, int, tuple, Tensor))
        and not isinstance(value, bool)
    ]
    for index, (theirs, own) in enumerate(
        zip(saved, optimizer.param_groups, strict=True)
    ):
        for key in numbers:
            if key not in theirs:
                raise ConfigValueError(
                    f"param_groups[{index}] of state_dict lacks {key!r}; it is not of "
                    f"{type(optimizer).__name__}"
                )
        for key, param in zip(theirs["params"], own["params"], strict=True):
            state = data["state"].get(key)
            if state is not None:
                _check_param_state(state, key, param)


def _check_param_state(state: Any, key: Any, param: Tensor) -> None:
    check_mapping(f"state[{key!r}] of state_dict", state)
    for name, value in state.items():
        if name in _LIKE_PARAMETERS and value is not None:
            check_like(param, value, f"{name!r} of parameter {key}")

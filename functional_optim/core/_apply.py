"""Read parameters and gradients of a model, and add updates to parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._lifting import lifted
from functional_optim.algebra._tensor_map import TensorMap, subset
from functional_optim.algebra._torch_modes import is_differentiated
from functional_optim.core._validation import check_updates


def recording(*, differentiable: bool) -> torch.set_grad_enabled:
    """Return a context manager that turns grad mode off unless a graph is wanted.

    Grad mode stays as it is if `differentiable`, or where torch.func differentiates,
    which would silently get zeros otherwise; else it is off, because the usual loop
    would keep the graph of every step alive. `vmap` alone records nothing.
    """
    return torch.set_grad_enabled(is_recorded(differentiable=differentiable))


def is_recorded(*, differentiable: bool) -> bool:
    """Return whether `recording` records the graph."""
    wanted = differentiable or is_differentiated()
    return wanted and torch.is_grad_enabled()


def _named_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got a {type(model).__name__}"
        )
    return model.named_parameters()


def parameters(model: torch.nn.Module) -> TensorMap:
    """Return the parameters of a model by name, detached.

    The tensors share their memory with the model: when it changes, so do they. Clone
    what you want to keep.
    Frozen parameters are left out; tied ones come once, as in `named_parameters()`.

    Args:
        model: The model.

    Example:
        >>> list(parameters(torch.nn.Linear(3, 2)))
        ['weight', 'bias']
    """
    return {
        name: param.detach()
        for name, param in _named_parameters(model)
        if param.requires_grad
    }


def gradients(model: torch.nn.Module) -> TensorMap:
    """Return the gradients of a model by parameter name, detached.

    The tensors share their memory with `.grad`. Parameters without a gradient are left
    out, so that they and their state stay as they are; so are frozen ones. `backward`
    adds to `.grad`: call `model.zero_grad()` before each, also between micro-batches of
    `Accumulate`, which does the adding itself.

    Args:
        model: The model, after a backward.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> model(torch.ones(1, 1)).sum().backward()
        >>> gradients(model)
        {'weight': tensor([[1.]]), 'bias': tensor([1.])}
    """
    return {
        name: param.grad.detach()
        for name, param in _named_parameters(model)
        if param.requires_grad and param.grad is not None
    }


def load_parameters(model: torch.nn.Module, params: TensorMap) -> None:
    """Copy parameters into a model: the inverse of `parameters`, in place.

    Buffers, frozen parameters and names that `params` lacks keep their values.

    Args:
        model: The model to change.
        params: Parameters by name, such as `apply_updates` returns.

    Raises:
        ValueError: a name that the model does not have, or another shape.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> load_parameters(model, {"bias": torch.tensor([2.0])})
        >>> model.bias.item()
        2.0
    """
    own = dict(_named_parameters(model))
    for name, param in params.items():
        if name not in own:
            raise ValueError(
                f"the model has no parameter {name!r}, only {format_names(own)}; "
                "make the map with parameters(model)"
            )
        if param.shape != own[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(param.shape)}, the model's has "
                f"{tuple(own[name].shape)}; make the map with parameters(model)"
            )
    model.load_state_dict(params, strict=False)


def apply_updates(
    params: TensorMap, updates: TensorMap, *, differentiable: bool = False
) -> TensorMap:
    """Add updates to parameters: p + u, in the wider dtype of the two, cast once.

    Args:
        params: Parameters by name; they do not change.
        updates: What a chain returned; a name that is missing keeps its parameter.
        differentiable: Whether to record the autograd graph.

    Returns:
        A new map with the names and dtypes of `params`. Without updates it holds the
        very same tensors.

    Raises:
        ValueError: a name, shape or device that no parameter has.
        TypeError: not a map from name to tensor; integer, complex or sparse tensors.

    Example:
        >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([0.5, -0.5])})
        {'w': tensor([1.5000, 0.5000])}
    """
    check_updates(updates, params)
    with recording(differentiable=differentiable):
        return {**params, **added(subset(params, updates), updates)}


@lifted
def added(p: Tensor, u: Tensor) -> Tensor:
    """Return p + u."""
    return p + u

"""A transform run in place on gradients: what stands between backward and step.

Gradients stay where they are, tensor by tensor, and become what the transform makes of
them. So whoever holds views of them (DDP's buckets do) sees the new numbers, and what a
step reads next is what a chain in front of it would have handed on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._buffers import Donated, Workspace
from functional_optim.algebra._tensor_map import can_use_foreach
from functional_optim.execution._grad_scaling import scaled, wrapped_state
from functional_optim.execution._state_tree import mapped, tensors_of
from functional_optim.execution._tensor_memory import storage_ptr

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._context import Context
    from functional_optim.core._transform import Transform


class GradientExecutor:
    """Runs a transform in place on gradients."""

    def __init__(self, transform: Transform, params: TensorMap) -> None:
        self._transform = transform
        self._consumes = _consumes(transform)
        # Members may take over what those before them made; nothing is used again.
        self._workspace = Workspace(most=-1)
        self.state: Any = _kept(transform.init(params), params)

    def run(
        self,
        grads: TensorMap,
        params: TensorMap,
        *,
        context: Context,
        found_inf: Tensor | None = None,
    ) -> None:
        """Let gradients become what the transform makes of them, in no-grad mode."""
        transform, state = self._transform, self.state
        given = Donated(grads) if self._consumes and found_inf is None else grads
        if found_inf is not None:
            transform = scaled(transform, None, found_inf)
            state = wrapped_state(state, None)
        with self._workspace:
            moved, new = transform.update(given, state, params, context=context)
            _check_all_moved(self._transform, moved, grads)
            if found_inf is not None:
                new = new[-1]
            self.state = _kept(new, grads, params)
            _write(moved, grads)


def _consumes(transform: Transform) -> bool:
    """Whether the first to see the gradients may overwrite them."""
    while hasattr(transform, "stands_for"):
        if not transform.stands_for:
            return False
        transform = transform.stands_for[0]
    return getattr(type(transform), "consumes_updates", False) is True


def _check_all_moved(transform: Transform, moved: TensorMap, grads: TensorMap) -> None:
    if moved.keys() == grads.keys():
        for name, update in moved.items():
            if update is not grads[name]:
                _check_alike(transform, name, update, grads[name])
        return
    missing = [name for name in grads if name not in moved]
    raise ValueError(
        f"{transform!r} returned no update for {format_names(missing)}; between "
        "backward and step every gradient must come out again"
    )


def _check_alike(transform: Transform, name: str, update: Tensor, grad: Tensor) -> None:
    if update.shape == grad.shape and update.is_floating_point():
        return
    raise ValueError(
        f"{transform!r} returned shape {tuple(update.shape)} and dtype {update.dtype} "
        f"for {name!r}, whose gradient has {tuple(grad.shape)} and {grad.dtype}; a "
        "transform must keep the shapes of its updates"
    )


def _kept(state: Any, *maps: TensorMap) -> Any:
    """Return a state that shares no memory with what others overwrite."""
    if not any(tensor.ndim for tensor in tensors_of(state)):
        return state
    taken = {storage_ptr(t) for tensors in maps for t in tensors.values() if t.numel()}
    return mapped(state, lambda t: t.clone() if storage_ptr(t) in taken else t)


def _write(moved: TensorMap, grads: TensorMap) -> None:
    pairs = [(grads[name], new) for name, new in moved.items()]
    pairs = [(old, new) for old, new in pairs if new is not old]
    if not pairs:
        return
    targets, sources = map(list, zip(*pairs, strict=True))
    taken = {storage_ptr(target) for target in targets if target.numel()}
    # What is written first may be what is read after.
    sources = [s.clone() if storage_ptr(s) in taken else s for s in sources]
    if can_use_foreach(targets) and can_use_foreach(sources):
        torch._foreach_copy_(targets, sources)
    else:
        for old, new in pairs:
            old.copy_(new)

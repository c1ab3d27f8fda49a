"""Run a transform in place on gradients, between backward and step.

Gradients keep their memory, so that views of them, such as DDP's buckets, see the new
numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._buffers import Donated
from functional_optim.algebra._tensor_map import can_use_foreach
from functional_optim.core._rule import Rule
from functional_optim.execution._grad_scaling import with_grad_scaling, wrap_state
from functional_optim.execution._state_tree import tensors_of, tree_map
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
        self.state: Any = _unaliased(transform.init(params), params)

    def run(
        self,
        grads: TensorMap,
        params: TensorMap,
        *,
        context: Context,
        found_inf: Tensor | None = None,
    ) -> None:
        """Overwrite gradients by their updates, in no-grad mode."""
        transform, state = self._transform, self.state
        given = Donated(grads) if self._consumes and found_inf is None else grads
        if found_inf is not None:
            transform = with_grad_scaling(transform, None, found_inf)
            state = wrap_state(state, None)
        moved, new = transform.update(given, state, params, context=context)
        _check_updates(self._transform, moved, grads)
        if found_inf is not None:
            new = new[-1]
        self.state = _unaliased(new, grads, params)
        _write_grads(moved, grads)


def _consumes(transform: Transform) -> bool:
    """Whether the first member may overwrite the gradients."""
    while hasattr(transform, "stands_for"):
        if not transform.stands_for:
            return False
        transform = transform.stands_for[0]
    return isinstance(transform, Rule)


def _check_updates(transform: Transform, moved: TensorMap, grads: TensorMap) -> None:
    if moved.keys() != grads.keys():
        missing = [name for name in grads if name not in moved]
        raise ValueError(
            f"{transform!r} returned no update for {format_names(missing)}; between "
            "backward and step every gradient must come out again"
        )
    for name, update in moved.items():
        grad = grads[name]
        if update is grad or (
            update.shape == grad.shape and update.is_floating_point()
        ):
            continue
        raise ValueError(
            f"{transform!r} returned shape {tuple(update.shape)} and dtype "
            f"{update.dtype} for {name!r}, whose gradient has {tuple(grad.shape)} and "
            f"{grad.dtype}; a transform must keep the shapes of its updates"
        )


def _unaliased(state: Any, *maps: TensorMap) -> Any:
    """Return a state that shares no memory with tensors that are overwritten."""
    if not any(tensor.ndim for tensor in tensors_of(state)):
        return state
    taken = {storage_ptr(t) for tensors in maps for t in tensors.values() if t.numel()}
    return tree_map(state, lambda t: t.clone() if storage_ptr(t) in taken else t)


def _write_grads(moved: TensorMap, grads: TensorMap) -> None:
    pairs = [(grads[name], new) for name, new in moved.items()]
    pairs = [(old, new) for old, new in pairs if new is not old]
    if not pairs:
        return
    targets, sources = map(list, zip(*pairs, strict=True))
    taken = {storage_ptr(target) for target in targets if target.numel()}
    # A tensor written first may be one read after.
    sources = [s.clone() if storage_ptr(s) in taken else s for s in sources]
    if can_use_foreach(targets) and can_use_foreach(sources):
        torch._foreach_copy_(targets, sources)
    else:
        for old, new in zip(targets, sources, strict=True):
            old.copy_(new)

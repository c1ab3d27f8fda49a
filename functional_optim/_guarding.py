"""Running a transform so that a flag on the device can take its step back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree

from functional_optim._hoisting import once
from functional_optim.core._apply import is_recorded

if TYPE_CHECKING:
    from functional_optim.core._context import Context
    from functional_optim.core._transform import TensorMap, Transform


def guarded(
    ok: Tensor,
    inner: Transform,
    updates: TensorMap,
    state: Any,
    params: TensorMap,
    *,
    context: Context,
) -> tuple[TensorMap, Any]:
    """Return what a transform returns if ok, else -0.0 and the old state.

    Args:
        ok: Whether to take the step. Tensor, shape (), bool.
        inner: The transform.
        updates: Its updates; it gets zeros or ones in their place if not ok.
        state: Its state.
        params: Its parameters.
        context: Its context.
    """
    # Zeros: the norm of many ones is infinite in float16, and some clips raise then.
    # Ones for a derivative: a user's rule in plain torch has sqrt(0), whose infinite
    # derivative times the 0 of a skipped step is NaN.
    other = 1.0 if is_recorded(differentiable=context.differentiable) else 0.0
    safe = {name: torch.where(ok, u, other) for name, u in updates.items()}
    moved, new = inner.update(safe, state, params, context=context)
    # p + (-0.0) is p for every p; p + 0.0 would turn -0.0 into 0.0.
    moved = {name: torch.where(ok, u, -0.0) for name, u in moved.items()}
    return moved, _selected(ok, new, state)


def _selected(ok: Tensor, new: Any, old: Any) -> Any:
    """Return the new state where ok, else the old one."""
    leaves, spec = _pytree.tree_flatten(new)
    before = _pytree.tree_leaves(old)
    chosen: list[Tensor] = []
    last: tuple[Tensor, Tensor] | None = None
    for n, o in zip(leaves, before, strict=True):
        # Names that share a count go on sharing it; they stand side by side.
        shared = last is not None and n is last[0] and o is last[1]
        if n is o:  # It was not touched, and shall not look as if it was.
            chosen.append(o)
        else:
            chosen.append(chosen[-1] if shared else _either(ok, n, o))
        last = n, o
    return _pytree.tree_unflatten(chosen, spec)


def _either(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    if new.ndim == 0:
        return once(_where, ok, new, old)
    return _where(ok, new, old)


def _where(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(ok, new, old)

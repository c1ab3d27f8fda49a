"""Refuse what needs whole parameters where a process has a shard."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from functional_optim.core._context import Context
from functional_optim.core._transform import Scope

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_TOTAL = (
    "what looks at all gradients (context.reduce: ClipByGlobalNorm, SkipNonfinite, "
    "Observe, DynamicLossScale) would get another number in each process"
)


def check_no_dtensor(params: TensorMap) -> None:
    """Refuse DTensors, which are not updated in place."""
    for name, param in params.items():
        if hasattr(param, "_local_tensor") and hasattr(param, "placements"):
            raise ValueError(
                f"parameter {name!r} is a DTensor ({param.placements}), and in place "
                "only plain tensors are updated; use the pure way, updates, state = "
                "transform.update(grads, state, parameters(model)) and "
                "load_parameters(model, apply_updates(...)), which runs on DTensors, "
                "or an optimizer of torch.optim"
            )


class ShardCheck:
    """Knows whether the parameters here are all that a total is over."""

    def __init__(self, names: Mapping[Tensor, str], transform: Transform) -> None:
        self._first = next(iter(names.values()), "")
        self._cut = _cut_parameter(names)
        if self._cut is not None and transform.scope is not Scope.ELEMENTWISE:
            raise ValueError(
                f"{transform!r} looks at whole tensors ({transform.scope}), and of "
                f"{self._cut!r} only a piece is here: FullyShardedDataParallel has cut "
                "it; use elementwise transforms, or fully_shard and the pure way"
            )

    def check_totals(self) -> None:
        """Refuse totals if others have parameters, or pieces of them, too."""
        if self._cut is not None:
            self._refuse()
        if _in_zero():
            raise ValueError(
                "ZeroRedundancyOptimizer gives a part of the parameters to each "
                f"process, {self._first!r} and others to this one: {_TOTAL}; leave it "
                "out of the transform, and clip before the step by torch.nn.utils."
                "clip_grad_norm_, or by OptimWrapper(zero, clip_grad=...)"
            )

    def context(self) -> Context:
        """Return a context that refuses totals over a parameter that FSDP1 has cut."""
        return Context(reducer=None if self._cut is None else self._refuse)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"FullyShardedDataParallel has cut {self._cut!r}, and only a piece of its "
            f"gradient is here: {_TOTAL}; leave it out of the transform, and clip "
            "before the step by the model's own clip_grad_norm_"
        )


def _cut_parameter(names: Mapping[Tensor, str]) -> str | None:
    """Return a parameter that FSDP1 has cut, None if all are whole."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several or torch.distributed.get_world_size() == 1:
        return None
    flattened: dict[Any, str] = {
        param: name
        for param, name in names.items()
        if getattr(param, "_fsdp_flattened", False)
    }
    views = []
    for param, name in flattened.items():
        if not getattr(param, "_is_flat_param", False):
            views.append((param, name))
        elif param._sharded_size != param._unpadded_unsharded_size:
            return name
    # With use_orig_params: pieces have one dimension, whole ones their own shapes.
    if views and all(param.ndim == 1 for param, _ in views):
        return views[0][1]
    return None


def _in_zero() -> bool:
    """Whether a ZeroRedundancyOptimizer of several processes makes this step.

    It leaves no trace in the optimizer that it holds, so its callers are looked at.
    """
    module = sys.modules.get(_ZERO)
    frame = None if module is None else sys._getframe(1)
    while module is not None and frame is not None:
        if frame.f_code.co_filename == module.__file__:
            owner = frame.f_locals.get("self")
            if isinstance(owner, module.ZeroRedundancyOptimizer):
                return bool(owner.world_size > 1)
        frame = frame.f_back
    return False

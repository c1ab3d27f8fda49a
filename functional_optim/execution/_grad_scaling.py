"""Unscale gradients and skip steps that overflowed, for `torch.amp.GradScaler`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from functional_optim.core._chain import chain
from functional_optim.core._context import Context
from functional_optim.core._transform import Scope, Transform
from functional_optim.core._value_class import replace_fields
from functional_optim.transforms import Unscale
from functional_optim.transforms._nonfinite import guarded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._traversal import Label


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The attributes that a gradient scaler sets for a step."""

    grad_scale: Tensor | None
    found_inf: Tensor


@final
@dataclasses.dataclass(frozen=True, eq=False)
class SkipOnOverflow:
    """Skip the step if a scaler has found an infinity, without reading its flag."""

    inner: Transform
    found_inf: Tensor

    @property
    def scope(self) -> Scope:
        return self.inner.scope

    def init(self, params: TensorMap) -> Any:
        return self.inner.init(params)

    def update(
        self,
        updates: TensorMap,
        state: Any,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, Any]:
        ok = self.found_inf.reshape(()) == 0
        context = (context or Context()).child(0)
        return guarded(ok, self.inner, updates, state, params, context=context)

    def children(self) -> dict[Label, Transform]:
        return {0: self.inner}

    def with_children(self, children: Mapping[Label, Transform]) -> SkipOnOverflow:
        return SkipOnOverflow(children[0], self.found_inf)

    def split_state(self, state: Any) -> dict[Label, Any]:
        return {0: state}


def with_grad_scaling(
    transform: Transform, grad_scale: Tensor | None, found_inf: Tensor
) -> Transform:
    """Return a transform under a gradient scaler; its state is that of `wrap_state`."""
    skip = SkipOnOverflow(transform, found_inf)
    if grad_scale is None:
        return chain(skip)
    scale = torch.as_tensor(grad_scale).reshape(())
    # Its value is not checked: the scaler, and no user, has set it.
    return chain(replace_fields(Unscale(1.0), scale=scale), skip)


def wrap_state(state: Any, grad_scale: Tensor | None) -> Any:
    """Return a state as the transform of `with_grad_scaling` takes it."""
    return (state,) if grad_scale is None else ((), state)

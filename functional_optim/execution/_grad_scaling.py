"""What a gradient scaler asks of a step: to unscale, and to skip if it overflowed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from functional_optim.core._chain import chain, validate_transform
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import checked, resolve, value_class
from functional_optim.core._transform import Scope, Transform
from functional_optim.core._validation import check_parameters
from functional_optim.core._value_class import replace_fields
from functional_optim.transforms import Unscale
from functional_optim.transforms._nonfinite import guarded

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap


@final
@value_class
class SkipOn:
    """Skip the step if a scaler found an infinity, without a look at its flag."""

    inner: Transform = checked(check=validate_transform, resolve=resolve)
    found_inf: Tensor

    @property
    def scope(self) -> Scope:
        """The scope of the inner transform."""
        return self.inner.scope

    def init(self, params: TensorMap) -> Any:
        """Return the inner state."""
        check_parameters(params)
        return self.inner.init(params)

    def update(
        self,
        updates: TensorMap,
        state: Any,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, Any]:
        """Return inner(u), or -0.0 and the old state."""
        ok = self.found_inf.reshape(()) == 0
        context = (context or Context()).child("inner")
        return guarded(ok, self.inner, updates, state, params, context=context)


def scaled(
    transform: Transform, grad_scale: Tensor | None, found_inf: Tensor
) -> Transform:
    """Return what a transform does under a gradient scaler.

    Its state is that of `transform` inside `wrapped_state`.
    """
    skip = SkipOn(transform, found_inf)
    if grad_scale is None:
        return chain(skip)
    scale = torch.as_tensor(grad_scale).reshape(())
    # Whatever it is: the scaler, and no user, has set it.
    return chain(replace_fields(Unscale(1.0), scale=scale), skip)


def wrapped_state(state: Any, grad_scale: Tensor | None) -> Any:
    """Return a state in the form that `scaled` wants."""
    return (state,) if grad_scale is None else ((), state)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What a gradient scaler asks of a step."""

    grad_scale: Tensor | None
    found_inf: Tensor

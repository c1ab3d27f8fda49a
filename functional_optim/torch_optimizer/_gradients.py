"""What a step finds: gradients, and the wishes of a gradient scaler."""

from __future__ import annotations

import operator
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.core._validation import check_updates
from functional_optim.execution._unit_update import Scaling

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from functional_optim.core._transform import TensorMap


def gradients_of(names: Mapping[Tensor, str]) -> TensorMap:
    """Return the gradients that there are, by name.

    Args:
        names: The names of the parameters.

    Raises:
        TypeError: one is sparse.
    """
    found: list[Any] = [param.grad for param in names]
    given: Iterable[Tensor] = names
    grads: TensorMap = dict(zip(names.values(), found, strict=True))
    # At every step, for every parameter: by functions in C.
    if type(None) in set(map(type, found)):
        given = [p for p, g in zip(names, found, strict=True) if g is not None]
        grads = {name: grad for name, grad in grads.items() if grad is not None}
    alike = list(map(_dtype, given)) == list(map(_dtype, grads.values()))
    if not alike or not set(map(_layout, grads.values())) <= {torch.strided}:
        check_updates(grads, {name: param.detach() for param, name in names.items()})
    return grads


_dtype, _layout = operator.attrgetter("dtype"), operator.attrgetter("layout")


def warn_of_no_gradient() -> None:
    """Warn that a step did nothing."""
    warnings.warn(
        "no parameter of this optimizer has a gradient, so step() did nothing; if the "
        "model's parameters were replaced after it was built, by "
        "load_state_dict(assign=True) or a new model, build the optimizer anew",
        stacklevel=4,
    )


def scaling_of(optimizer: object) -> Scaling | None:
    """Return what a gradient scaler asks of this step; it sets two attributes."""
    found_inf = getattr(optimizer, "found_inf", None)
    grad_scale = getattr(optimizer, "grad_scale", None)
    if found_inf is None:
        if grad_scale is None:
            return None
        found_inf = torch.zeros_like(grad_scale)
    return Scaling(grad_scale, found_inf)

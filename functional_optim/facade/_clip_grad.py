"""`clip_grad`, as configs write it, and the transform that it stands for."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from functional_optim.core._context import Norm
from functional_optim.optim_wrapper._errors import MistakenTypeError, MistakenValueError
from functional_optim.transforms import ClipByGlobalNorm, ClipByValue, Observe

if TYPE_CHECKING:
    from functional_optim.core._transform import Transform

_KEYS = {
    "norm": {"max_norm", "norm_type", "error_if_nonfinite", "foreach"},
    "value": {"clip_value", "foreach"},
}
_NEEDED = {"norm": "max_norm", "value": "clip_value"}


class ClipGrad(NamedTuple):
    """How gradients are clipped.

    Attributes:
        kwargs: The arguments of the function of torch that does the same.
        func: That function.
        name: What the number is called that is logged.
        transform: The transform; None if the keys are those of another function.
    """

    kwargs: dict[str, Any]
    func: Callable[..., Any]
    name: str
    transform: Transform | None


def clip_grad_of(config: Any, *, strict: bool = True) -> ClipGrad:
    """Return what `clip_grad` asks for; the config itself does not change.

    Args:
        config: `dict(max_norm=..., norm_type=2, error_if_nonfinite=False)` or
            `dict(type="value", clip_value=...)`.
        strict: Whether keys that mean nothing to torch's functions are refused.

    Raises:
        MistakenTypeError, MistakenValueError: it is neither.

    Example:
        >>> clip_grad_of({"max_norm": 1, "norm_type": "inf"}).transform
        ClipByGlobalNorm(1.0, norm_type=inf)
    """
    if not isinstance(config, Mapping) or not config:
        kind = "an empty one" if isinstance(config, Mapping) else repr(config)
        msg = (
            "If `clip_grad` is not None, it must be a dict such as dict(max_norm=1.0) "
            f"or dict(type='value', clip_value=0.5), got {kind}"
        )
        raise MistakenTypeError(msg)
    kwargs = dict(config)
    kind = kwargs.pop("type", "norm")
    if not isinstance(kind, str) or kind not in _KEYS:
        msg = (
            "If `clip_grad` is not None, its type must be 'norm' or 'value', got "
            f"{kind!r}"
        )
        raise MistakenValueError(msg)
    func: Callable[..., Any] = torch.nn.utils.clip_grad_norm_
    if kind == "value":
        func = torch.nn.utils.clip_grad_value_
    if not strict and not _NEEDED[kind] in kwargs.keys() <= _KEYS[kind]:
        return ClipGrad(kwargs, func, f"grad_{kind}", None)
    _check_keys(kind, kwargs)
    try:
        transform = _transform_of(kind, kwargs)
    except (TypeError, ValueError) as error:
        mistake = (
            MistakenTypeError if isinstance(error, TypeError) else MistakenValueError
        )
        msg = f"If `clip_grad` is not None, its numbers must be legal: {error}"
        raise mistake(msg) from None
    return ClipGrad(kwargs, func, f"grad_{kind}", transform)


def _check_keys(kind: str, kwargs: dict[str, Any]) -> None:
    unknown = [key for key in kwargs if key not in _KEYS[kind]]
    if unknown:
        other = next((k for k, keys in _KEYS.items() if unknown[0] in keys), None)
        hint = f"; add type={other!r}" if other else ""
        msg = (
            f"If `clip_grad` is not None, its keys with type={kind!r} may be "
            f"{', '.join(sorted(_KEYS[kind]))}, got {unknown[0]!r}{hint}"
        )
        raise MistakenValueError(msg)
    if _NEEDED[kind] not in kwargs:
        msg = (
            f"If `clip_grad` is not None, it must say {_NEEDED[kind]} with type="
            f"{kind!r}, such as dict(type={kind!r}, {_NEEDED[kind]}=1.0)"
        )
        raise MistakenValueError(msg)


def _transform_of(kind: str, kwargs: dict[str, Any]) -> Transform:
    limit = kwargs[_NEEDED[kind]]
    # A transform takes schedules and maps by name as well; a config does not.
    if isinstance(limit, bool) or not isinstance(limit, numbers.Real):
        msg = f"{_NEEDED[kind]} must be a number, got {limit!r}"
        raise TypeError(msg)
    if kind == "value":
        return ClipByValue(kwargs["clip_value"])
    order = kwargs.get("norm_type", 2.0)
    if isinstance(order, str):  # torch takes "inf", from configs that are text.
        if order != "inf":
            msg = f"norm_type must be a number or 'inf', got {order!r}"
            raise ValueError(msg)
        order = math.inf
    if kwargs["max_norm"] == math.inf:  # A way to have the norm logged, and no more.
        return Observe("norm", op=Norm(order))
    return ClipByGlobalNorm(
        kwargs["max_norm"],
        norm_type=order,
        error_if_nonfinite=kwargs.get("error_if_nonfinite", False),
    )

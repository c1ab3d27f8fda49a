"""Replace the hyperparameters of a transform by inputs of compiled code.

Compiled code is made once for a kind of transform. Numbers in hyperparameters and all
tensors may change from step to step; the rest, the kind, is compared by value.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from functional_optim.core._hyperparameters import after_init, is_zero
from functional_optim.core._value_class import replace_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Number: TypeAlias = float | Tensor

_PLACE = object()
"""Stands in a kind where a number goes."""


def split_constants(transform: Any) -> tuple[Any, list[Number]]:
    """Return the kind of a transform, and the numbers in it.

    Example:
        >>> from functional_optim import ScaleByAdam, sgd
        >>> split_constants(sgd(0.1))[1], split_constants(ScaleByAdam())[1]
        ([0.1], [0.9, 0.999, 1e-08])
    """
    numbers: list[Number] = []

    def take(number: Number) -> Any:
        numbers.append(number)
        if isinstance(number, Tensor):
            return _PLACE, number.dtype, number.device, number.shape
        return _PLACE

    return _mapped(transform, take, _as_kind), numbers


def with_constants(transform: Any, put: Callable[[Number], Number]) -> Any:
    """Return a transform with other numbers in the same places."""
    return _mapped(transform, put, replace_fields)


def as_tensors(numbers: Iterable[Number], like: Tensor) -> list[Tensor]:
    """Return numbers as inputs of compiled code: Python's are float64."""
    return [
        number
        if isinstance(number, Tensor)
        else torch.tensor(number, dtype=torch.float64, device=like.device)
        for number in numbers
    ]


def is_frozen(value: Any) -> bool:
    """Whether a transform cannot be written into.

    Frozen dataclasses and tuples of such are; so is a value without an update, such as
    a schedule: its closure is no part of the kind.
    """
    if isinstance(value, tuple):
        return all(map(is_frozen, value))
    if isinstance(value, (dict, list, set)):
        return False
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # A subclass that is no dataclass itself may have an attribute of its own.
        made = vars(type(value)).get("__dataclass_params__")
        frozen = made is not None and bool(made.frozen)
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return frozen and all(map(is_frozen, parts))
    return not _has_attributes(value)


def _has_attributes(value: Any) -> bool:
    """Whether a value is a transform with attributes that may be written."""
    return hasattr(value, "update") and hasattr(value, "__dict__")


def _as_kind(value: Any, /, **fields: Any) -> Any:
    return type(value), *fields.items()


def _mapped(
    value: Any,
    change: Callable[[Number], Any],
    build: Callable[..., Any],
    *,
    is_number: bool = False,
) -> Any:
    """Return a value with its numbers changed, its dataclasses built anew."""
    if isinstance(value, Tensor) or (is_number and isinstance(value, float)):
        return change(value)
    if isinstance(value, tuple):
        parts = [_mapped(part, change, build, is_number=is_number) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, dict):
        return {
            key: _mapped(part, change, build, is_number=is_number)
            for key, part in value.items()
        }
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        if build is _as_kind and _has_attributes(value):
            return value, dict(vars(value))  # It may be written into.
        return value
    changes = {
        field.name: _mapped(
            getattr(value, field.name),
            change,
            build,
            is_number=_is_input(value, field),
        )
        for field in dataclasses.fields(value)
    }
    return build(value, **changes)


def _is_input(value: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether a number in a field is an input; a plain 0 may make another kind."""
    own = getattr(type(value), "__post_init__", None)
    if own is not None and own is not after_init:
        return False  # What it made of the number cannot be known.
    declared = getattr(type(value), "hyperparameters", ())
    if "hyperparameter" not in field.metadata and field.name not in declared:
        return False
    zero_differs = field.metadata.get("zero_differs", False)
    return not (zero_differs and is_zero(getattr(value, field.name)))

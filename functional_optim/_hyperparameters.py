"""Hyperparameters: kinds, checks, and what a transform is for one parameter.

A transform is a frozen dataclass whose fields say what they are. From those fields
follows, for every transform alike: what is checked at construction, when two are equal,
how one prints, where schedules stand, and what it becomes for one parameter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from torch import Tensor
from typing_extensions import dataclass_transform

from functional_optim._names import lookup
from functional_optim._value import equal, hash_of, repr_of

Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""A pure function from a 0-dim float64 step count to a 0-dim value."""

Hyperparameter: TypeAlias = float | Tensor | Schedule | Mapping[str, float | Tensor]
"""A number, a 0-dim tensor, a schedule, or a map from parameter name to one."""

C = TypeVar("C", bound=type)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The legal finite numbers of a hyperparameter."""

    ge: float | None = None
    gt: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        bounds = [("ge", ">="), ("gt", ">"), ("lt", "<")]
        parts = [
            f"{sign} {getattr(self, name):g}"
            for name, sign in bounds
            if getattr(self, name) is not None
        ]
        return " and ".join(["finite", *parts])


def hyperparameter(
    *,
    default: Any = dataclasses.MISSING,
    ge: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    per_parameter: bool = True,
    pair: bool = False,
) -> Any:
    """Declare a field of a transform as a hyperparameter.

    Args:
        default: Its default; none if left out.
        ge: Smallest legal number.
        gt: Number it must exceed.
        lt: Number it must stay below.
        per_parameter: Whether a map from parameter name to value is allowed.
        pair: Whether it is a tuple of two hyperparameters, like `betas`.
    """
    kind = _Kind(Range(ge=ge, gt=gt, lt=lt), per_parameter=per_parameter, pair=pair)
    return dataclasses.field(
        default=default,
        metadata={
            "hyperparameter": True,
            "check": functools.partial(_normalized, kind=kind),
            "resolve": _resolve_number,
        },
    )


def resolvable(
    *,
    check: Callable[[str, Any], Any],
    resolve: Callable[[Any, str, Tensor], Any],
    default: Any = dataclasses.MISSING,
) -> Any:
    """Declare a field whose value depends on the parameter: a mask, rules, labels.

    Args:
        check: Function of (name of the field, value) that returns the checked value,
            safe from later changes by the caller.
        resolve: Function of (value, name, param) that returns the constant to use for
            this parameter.
        default: Its default; none if left out.
    """
    return dataclasses.field(
        default=default, metadata={"check": check, "resolve": resolve}
    )


@dataclasses.dataclass(frozen=True)
class _Kind:
    legal: Range
    per_parameter: bool
    pair: bool


def _normalized(name: str, value: Any, kind: _Kind) -> Any:
    """Check one hyperparameter and bring it into its canonical form."""
    if kind.pair:
        if isinstance(value, (str, Tensor)) or not hasattr(value, "__len__"):
            msg = f"{name} must be a pair of hyperparameters, got {value!r}"
            raise TypeError(msg)
        if len(value) != 2 or isinstance(value, Mapping):
            msg = f"{name} must be a pair of hyperparameters, got {value!r}"
            raise ValueError(msg)
        single = dataclasses.replace(kind, pair=False)
        return tuple(
            _normalized(f"{name}[{i}]", part, single) for i, part in enumerate(value)
        )
    if isinstance(value, Mapping):
        if not kind.per_parameter:
            msg = (
                f"{name} applies to all parameters together and cannot be a map by "
                f"name, got {value!r}; use Masked or Partition for separate ones"
            )
            raise TypeError(msg)
        single = dataclasses.replace(kind, per_parameter=False)
        for key, part in value.items():
            if not isinstance(key, str) or callable(part):
                msg = (
                    f"{name} must map parameter names to numbers or 0-dim tensors, got "
                    f"{key!r}: {part!r}"
                )
                raise TypeError(msg)
        return {
            key: _normalized(f"{name}[{key!r}]", part, single)
            for key, part in value.items()
        }
    if isinstance(value, Tensor):
        return _checked_tensor(name, value)
    if callable(value):
        return value
    return _checked_number(name, value, kind)


def _checked_tensor(name: str, value: Tensor) -> Tensor:
    if value.ndim != 0:
        msg = f"{name} must be a 0-dim tensor, got shape {tuple(value.shape)}"
        raise ValueError(msg)
    if not value.is_floating_point():
        msg = f"{name} must be a floating-point tensor, got {value.dtype}"
        raise TypeError(msg)
    return value


def _checked_number(name: str, value: Any, kind: _Kind) -> float:
    if isinstance(value, (bool, str)) or not isinstance(value, numbers.Real):
        kinds = "a number, a 0-dim tensor, a schedule"
        if kind.per_parameter:
            kinds += " or a map from parameter name to number or tensor"
        msg = f"{name} must be {kinds}, got {value!r}"
        raise TypeError(msg)
    number = float(value)
    if number not in kind.legal:
        msg = f"{name} must be {kind.legal}, got {value}"
        raise ValueError(msg)
    return number


def _resolve_number(value: Any, name: str, param: Tensor) -> Any:
    """Replace a map by its entry for this parameter."""
    if isinstance(value, tuple):
        return tuple(_resolve_number(part, name, param) for part in value)
    return lookup(value, [name])[0] if isinstance(value, Mapping) else value


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(hyperparameter, resolvable)
)
def value_class(cls: C) -> C:
    """Make a class a value: frozen, checked, printed as written, equal by value.

    Args:
        cls: A class whose annotations are its fields. At construction declared fields
            are checked one by one; then the class's own `check` runs, if it has one.
    """
    _define(
        cls,
        __post_init__=_post_init,
        __eq__=equal,
        __hash__=hash_of,
        __repr__=repr_of,
    )
    dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)
    _define(
        cls,
        field_checks=tuple(
            (f.name, f.metadata["check"]) for f in fields if "check" in f.metadata
        ),
        hyperparameters=tuple(f.name for f in fields if "hyperparameter" in f.metadata),
    )
    return cls


def _define(cls: type, **members: Any) -> None:
    """Give a class members that it does not define itself."""
    for name, member in members.items():
        if name not in vars(cls):
            setattr(cls, name, member)


def _post_init(self: Any) -> None:
    for name, check in self.field_checks:
        object.__setattr__(self, name, check(name, getattr(self, name)))
    if hasattr(self, "check"):
        self.check()


def resolve(transform: T, name: str, param: Tensor) -> T:
    """Return what a transform is for one parameter: constants instead of rules.

    Maps by name, masks, labels and rules are replaced by this parameter's value, also
    inside combinators. Two parameters whose resolved transforms are equal can be
    processed together.

    Args:
        transform: Any transform; one that is not ours is returned as it is.
        name: Name of the parameter.
        param: The parameter.

    Returns:
        A transform of the same type.

    Raises:
        ValueError: a map has no entry for this name.

    Example:
        >>> import torch
        >>> from functional_optim.transforms import AddDecayedWeights
        >>> decay = AddDecayedWeights({"w": 0.1, "b": 0.0})
        >>> resolve(decay, "b", torch.zeros(3))
        AddDecayedWeights(0.0)
    """
    if not dataclasses.is_dataclass(transform) or isinstance(transform, type):
        return transform
    changes = {
        field.name: field.metadata["resolve"](
            getattr(transform, field.name), name, param
        )
        for field in dataclasses.fields(transform)
        if "resolve" in field.metadata
    }
    return dataclasses.replace(transform, **changes) if changes else transform


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is a plain 0, so that what it scales can be left out.

    A tensor, a schedule or a map is never a plain 0: its value is not looked at.
    """
    return isinstance(value, (int, float)) and value == 0


def check_factor(name: str, value: Any) -> Any:
    """Check one factor: a finite number or a 0-dim tensor.

    Raises:
        ValueError: it is not finite, or not 0-dim.
        TypeError: it is neither.
    """
    if isinstance(value, Tensor):
        return _checked_tensor(name, value)
    return _checked_number(name, value, _Kind(Range(), per_parameter=False, pair=False))

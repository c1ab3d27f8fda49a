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

from functional_optim._resolving import resolved_never_0, resolved_number
from functional_optim.algebra._tensor_map import is_readable
from functional_optim.core._value_class import equal, hash_of, repr_of

Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""A pure function from a 0-dim float64 step count to a 0-dim value."""

Hyperparameter: TypeAlias = float | Tensor | Schedule | Mapping[str, float | Tensor]
"""A number, a 0-dim tensor, a schedule, or a map from parameter name to one."""

C = TypeVar("C", bound=type)
T = TypeVar("T")


def hyperparameter(
    *,
    default: Any = dataclasses.MISSING,
    ge: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    per_parameter: bool = True,
    pair: bool = False,
    zero_differs: bool = False,
) -> Any:
    """Declare a field of a transform as a hyperparameter.

    Args:
        default: Its default; none if left out.
        ge: Smallest legal number.
        gt: Number it must exceed.
        lt: Number it must stay below.
        per_parameter: Whether a map from parameter name to value is allowed.
        pair: Whether it is a tuple of two hyperparameters, like `betas`.
        zero_differs: Whether `update` does something else for a plain 0.
    """
    kind = _Kind(ge=ge, gt=gt, lt=lt, per_parameter=per_parameter, pair=pair)
    return dataclasses.field(
        default=default,
        metadata={
            "hyperparameter": True,
            "per_parameter": per_parameter,
            "zero_differs": zero_differs,
            "check": functools.partial(_normalized, kind=kind),
            "resolve": resolved_never_0 if zero_differs else resolved_number,
        },
    )


def flag(*, default: bool) -> Any:
    """Declare a field of a transform as a switch: True or False, nothing like it."""
    metadata = {"check": _checked_flag, "flag": True}
    return dataclasses.field(default=default, metadata=metadata)


def _checked_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        msg = f"{name} must be True or False, got {value!r}"
        raise TypeError(msg)
    return value


def checked(
    *,
    check: Callable[[str, Any], Any],
    resolve: Callable[[Any, str, Tensor], Any] | None = None,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
) -> Any:
    """Declare a field that is checked at construction: a mask, rules, a transform.

    Args:
        check: Function of (name of the field, value) that returns the checked value,
            safe from later changes by the caller.
        resolve: Function of (value, name, param) that returns the constant to use for
            one parameter; None leaves the value to the class's own `resolved`.
        default: Its default; none if left out.
        default_factory: Makes the default, if that is an object: torch.compile takes
            none that was made outside.
    """
    metadata: dict[str, Any] = {"check": check}
    if resolve is not None:
        metadata["resolve"] = resolve
    made = default_factory is not dataclasses.MISSING
    how = {"default_factory": default_factory} if made else {"default": default}
    return dataclasses.field(metadata=metadata, **how)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a hyperparameter may be."""

    ge: float | None = None
    gt: float | None = None
    lt: float | None = None
    per_parameter: bool = False
    pair: bool = False
    schedule: bool = True

    def __contains__(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.lt is None or number < self.lt)
        )

    @property
    def legal(self) -> str:
        """The legal range, in words."""
        bounds = ((">=", self.ge), (">", self.gt), ("<", self.lt))
        parts = [f"{sign} {bound:g}" for sign, bound in bounds if bound is not None]
        return " and ".join(["finite", *parts])

    @property
    def kinds(self) -> str:
        """The legal kinds, in words."""
        kinds = ["a number", "a 0-dim tensor"]
        if self.schedule:
            kinds.append("a schedule")
        if self.per_parameter:
            kinds.append("a map from parameter name to number or tensor")
        return f"{', '.join(kinds[:-1])} or {kinds[-1]}"


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
        single = dataclasses.replace(kind, per_parameter=False, schedule=False)
        for key, part in value.items():
            if not isinstance(key, str):
                msg = f"{name} must map parameter names to values, got {key!r}: {part}"
                raise TypeError(msg)
        return {
            key: _normalized(f"{name}[{key!r}]", part, single)
            for key, part in value.items()
        }
    if isinstance(value, Tensor):
        return _checked_tensor(name, value, kind)
    if isinstance(value, type):
        msg = f"{name} must be {kind.kinds}, got a class; write {value.__name__}(...)"
        raise TypeError(msg)
    if kind.schedule and callable(value):
        return value
    return _checked_number(name, value, kind)


def _checked_tensor(name: str, value: Tensor, kind: _Kind) -> Tensor:
    if value.ndim != 0:
        if value.numel() != 1:
            msg = f"{name} must be a 0-dim tensor, got shape {tuple(value.shape)}"
            raise ValueError(msg)
        value = value.reshape(())  # torch takes one element in any shape.
    if not value.is_floating_point():
        msg = f"{name} must be a floating-point tensor, got {value.dtype}"
        raise TypeError(msg)
    if is_readable(value) and value.item() not in kind:
        msg = f"{name} must be {kind.legal}, got {value.item()} in a tensor"
        raise ValueError(msg)
    return value


def _checked_number(name: str, value: Any, kind: _Kind) -> float:
    if isinstance(value, (bool, str)) or not isinstance(value, numbers.Real):
        msg = f"{name} must be {kind.kinds}, got {value!r}"
        raise TypeError(msg)
    number = float(value)
    if number not in kind:
        msg = f"{name} must be {kind.legal}, got {value}"
        raise ValueError(msg)
    return number


@dataclass_transform(
    frozen_default=True,
    eq_default=False,
    field_specifiers=(hyperparameter, checked, flag),
)
def value_class(cls: C) -> C:
    """Make a class a value: frozen, checked, printed as written, equal by value.

    Args:
        cls: A class whose annotations are its fields. At construction declared fields
            are checked one by one; then the class's own `_check` runs, if it has one.
    """
    _define(
        cls,
        __post_init__=after_init,
        __eq__=equal,
        __hash__=hash_of,
        __repr__=repr_of,
    )
    dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)
    _define(
        cls,
        _field_checks=tuple(
            (f.name, f.metadata["check"]) for f in fields if "check" in f.metadata
        ),
        _hyperparameters=tuple(
            f.name for f in fields if "hyperparameter" in f.metadata
        ),
    )
    return cls


def _define(cls: type, **members: Any) -> None:
    """Give a class members that it does not define itself."""
    for name, member in members.items():
        if name not in vars(cls):
            setattr(cls, name, member)


def after_init(self: Any) -> None:
    """`__post_init__` of a value: check its fields."""
    for name, check in self._field_checks:
        object.__setattr__(self, name, check(name, getattr(self, name)))
    if hasattr(self, "_check"):
        self._check()


def check_factor(name: str, value: Any) -> Any:
    """Check one factor: a finite number or a 0-dim tensor.

    Raises:
        ValueError: it is not finite, or not 0-dim.
        TypeError: it is neither.
    """
    return _normalized(name, value, _Kind(schedule=False))

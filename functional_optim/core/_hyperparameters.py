"""Declare, validate, resolve and evaluate the hyperparameters of a transform.

A transform is a frozen dataclass. From the declarations of its fields follow checks,
equality, repr, the schedules in it, and its constants for one parameter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from functional_optim.algebra._scalars import memoized
from functional_optim.algebra._tensor_map import (
    TensorMap,
    device_of,
    is_readable,
    lookup,
)
from functional_optim.core._traversal import children_of, map_children, routes
from functional_optim.core._validation import check_by_name, check_parameters
from functional_optim.core._value_class import (
    value_equal,
    value_hash,
    value_repr,
)

C = TypeVar("C", bound=type)

T = TypeVar("T")

Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""A pure function from a 0-dim float64 step count to a 0-dim value."""

Hyperparameter: TypeAlias = float | Tensor | Schedule | Mapping[str, float | Tensor]
"""A number, a 0-dim tensor, a schedule, or a map from parameter name to one."""


class Scalar:
    """The type of a field that is a hyperparameter.

    To a type checker it is a `Hyperparameter` where a rule is made, and a number in its
    formula.

    Example:
        >>> from functional_optim import Rule, Scope, hyperparameter
        >>> class Shrink(Rule, scope=Scope.ELEMENTWISE):
        ...     rate: Scalar = hyperparameter(ge=0.0)
        ...     def update_param(self, u, s, p):
        ...         return u * (1 - self.rate), s
        >>> Shrink(0.5)
        Shrink(0.5)
    """

    if TYPE_CHECKING:

        def __get__(self, rule: object, owner: Any = None) -> Tensor: ...

        def __set__(self, rule: object, value: Hyperparameter) -> None: ...


class Pair:
    """The type of a field that is a pair of hyperparameters; see `Scalar`.

    Example:
        >>> from functional_optim import ScaleByAdam
        >>> ScaleByAdam.__annotations__["betas"]
        'Pair'
    """

    if TYPE_CHECKING:

        def __get__(self, rule: object, owner: Any = None) -> tuple[Tensor, Tensor]: ...

        def __set__(
            self, rule: object, value: tuple[Hyperparameter, Hyperparameter]
        ) -> None: ...


def hyperparameter(
    *,
    default: Any = dataclasses.MISSING,
    ge: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    per_parameter: bool = True,
    zero_differs: bool = False,
) -> Any:
    """Declare a field of a transform as a hyperparameter.

    In the formula it is a number: that of this step and this parameter.

    Args:
        default: Its default; a tuple of two makes it a pair.
        ge: Least value.
        gt: What it must be greater than.
        lt: What it must be less than.
        per_parameter: Whether it may be a map from parameter name to value.
        zero_differs: Whether a plain 0 is another rule, which the formula asks for with
            `is_zero`.

    Example:
        >>> from functional_optim import Rule, Scalar, Scope
        >>> class Shrink(Rule, scope=Scope.ELEMENTWISE):
        ...     rate: Scalar = hyperparameter(default=0.5, ge=0.0)
        ...     def update_param(self, u, s, p):
        ...         return u * (1 - self.rate), s
        >>> Shrink(lambda step: 0.1 * step)
        Shrink(<lambda>)
    """
    pair = isinstance(default, tuple)
    kind = _Kind(ge=ge, gt=gt, lt=lt, per_parameter=per_parameter, pair=pair)
    return dataclasses.field(
        default=default,
        metadata={
            "hyperparameter": True,
            "per_parameter": per_parameter,
            "pair": pair,
            "zero_differs": zero_differs,
            "check": functools.partial(_normalized, kind=kind),
            "resolve": resolve_nonzero if zero_differs else resolve_number,
        },
    )


def flag(*, default: bool) -> Any:
    """Declare a field of a transform as a flag: True or False.

    Args:
        default: Its default.

    Example:
        >>> from functional_optim import Rule, Scope
        >>> class Sign(Rule, scope=Scope.ELEMENTWISE):
        ...     negate: bool = flag(default=False)
        ...     def update_param(self, u, s, p):
        ...         return -u.sign() if self.negate else u.sign(), s
        >>> Sign(negate=True)
        Sign(True)
    """
    metadata = {"check": _checked_flag, "flag": True}
    return dataclasses.field(default=default, metadata=metadata)


def _checked_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def checked(
    *,
    check: Callable[[str, Any], Any],
    resolve: Callable[[Any, str, Tensor], Any] | None = None,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
) -> Any:
    """Declare a field that is checked at construction: a mask, rules, a transform."""
    metadata: dict[str, Any] = {"check": check}
    if resolve is not None:
        metadata["resolve"] = resolve
    made = default_factory is not dataclasses.MISSING
    how = {"default_factory": default_factory} if made else {"default": default}
    return dataclasses.field(metadata=metadata, **how)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """The legal kinds and the legal range of a hyperparameter."""

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
    """Validate a hyperparameter and return its canonical form."""
    if kind.pair:
        if isinstance(value, (str, Tensor)) or not hasattr(value, "__len__"):
            raise TypeError(f"{name} must be a pair of hyperparameters, got {value!r}")
        if len(value) != 2 or isinstance(value, Mapping):
            raise ValueError(f"{name} must be a pair of hyperparameters, got {value!r}")
        single = dataclasses.replace(kind, pair=False)
        return tuple(
            _normalized(f"{name}[{i}]", part, single) for i, part in enumerate(value)
        )
    if isinstance(value, Mapping):
        if not kind.per_parameter:
            raise TypeError(
                f"{name} applies to all parameters together and cannot be a map by "
                f"name, got {value!r}; use Masked or Partition for separate ones"
            )
        single = dataclasses.replace(kind, per_parameter=False, schedule=False)
        for key, part in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{name} must map parameter names to values, got {key!r}: {part}"
                )
        return {
            key: _normalized(f"{name}[{key!r}]", part, single)
            for key, part in value.items()
        }
    if isinstance(value, Tensor):
        return _checked_tensor(name, value, kind)
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be {kind.kinds}, got a class; write {value.__name__}(...)"
        )
    if kind.schedule and callable(value):
        return value
    return _checked_number(name, value, kind)


def _checked_tensor(name: str, value: Tensor, kind: _Kind) -> Tensor:
    if value.ndim != 0:
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a 0-dim tensor, got shape {tuple(value.shape)}"
            )
        value = value.reshape(())  # torch takes one element in any shape.
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if is_readable(value) and value.item() not in kind:
        raise ValueError(f"{name} must be {kind.legal}, got {value.item()} in a tensor")
    return value


def _checked_number(name: str, value: Any, kind: _Kind) -> float:
    if isinstance(value, (bool, str)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {kind.kinds}, got {value!r}")
    number = float(value)
    if number not in kind:
        raise ValueError(f"{name} must be {kind.legal}, got {value}")
    return number


@dataclass_transform(
    frozen_default=True,
    eq_default=False,
    field_specifiers=(hyperparameter, checked, flag),
)
def value_class(cls: C) -> C:
    """Make a class a frozen dataclass with checked fields, compared by value."""
    _define(
        cls,
        __post_init__=after_init,
        __eq__=value_equal,
        __hash__=value_hash,
        __repr__=value_repr,
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
    """Check one factor: a finite number or a 0-dim tensor."""
    return _normalized(name, value, _Kind(schedule=False))


def resolve(transform: T, name: str, param: Tensor) -> T:
    """Return a transform with its constants for one parameter.

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
    own = getattr(transform, "resolved", None)
    if own is not None:
        chosen: T = own(name, param)
        return chosen
    transform = _resolved_children(transform, name, param)
    if not dataclasses.is_dataclass(transform) or isinstance(transform, type):
        return transform
    changes = {
        field.name: field.metadata["resolve"](
            getattr(transform, field.name), name, param
        )
        for field in dataclasses.fields(transform)
        if "resolve" in field.metadata
    }
    # The same one if nothing differs, so that parameters can share a bucket.
    differs = any(new is not getattr(transform, name) for name, new in changes.items())
    return dataclasses.replace(transform, **changes) if differs else transform


def _resolved_children(transform: T, name: str, param: Tensor) -> T:
    """Return a combinator whose children that serve a parameter are resolved."""
    combinator: Any = transform
    served = set(children_of(transform))
    if routes(transform):
        served = {combinator.route(name, param)}
    changed: Any = map_children(
        combinator,
        lambda label, child: resolve(child, name, param) if label in served else child,
    )
    resolved: T = changed
    return resolved


def resolve_number(value: Any, name: str, param: Tensor) -> Any:
    """Return a hyperparameter for one parameter: a map's entry, else the value."""
    if isinstance(value, tuple):
        return tuple(resolve_number(part, name, param) for part in value)
    return lookup(value, [name])[0] if isinstance(value, Mapping) else value


def resolve_nonzero(value: Any, name: str, param: Tensor) -> Any:
    """Resolve a number, a 0 of a map as a tensor: a map is never a plain 0."""
    found = resolve_number(value, name, param)
    if isinstance(value, Mapping) and is_zero(found):
        return _zero(param.device)
    return found


@functools.cache
def _zero(device: torch.device) -> Tensor:
    """Return one 0 per device, so that transforms that have it are equal."""
    return torch.zeros((), dtype=torch.float64, device=device)


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is a plain 0, so that its term can be left out.

    A tensor, a schedule or a map is never a plain 0: its value is not looked at. In a
    formula it may be asked of hyperparameters with `zero_differs=True`.

    Args:
        value: The hyperparameter.

    Example:
        >>> is_zero(0.0), is_zero(torch.zeros(()))
        (True, False)
    """
    return isinstance(value, (int, float)) and value == 0


class Scheduled(NamedTuple):
    """The state of a rule with a schedule among its hyperparameters.

    Attributes:
        state: State of the same rule without schedules.
        num_updates: Updates emitted so far, at which schedules are evaluated. Tensor,
            shape (), float64.

    Example:
        >>> from functional_optim import Scale
        >>> Scale(lambda step: 0.5**step).init({"w": torch.ones(2)})
        Scheduled(state=(), num_updates=tensor(0., dtype=torch.float64))
    """

    state: Any
    num_updates: Tensor


def is_schedule(value: Any) -> bool:
    """Whether a hyperparameter is a schedule."""
    # The plain kinds first: torch.compile cannot ask a dict whether it is callable.
    return not isinstance(value, (float, Tensor, dict)) and callable(value)


def scheduled(transform: Any) -> bool:
    """Whether a hyperparameter of a transform is a schedule."""
    for name in transform._hyperparameters:
        value = getattr(transform, name)
        parts = value if isinstance(value, tuple) else (value,)
        if any(is_schedule(part) for part in parts):
            return True
    return False


def init_hyperparameters(transform: Any, params: TensorMap) -> Tensor | None:
    """Validate maps by name; return the count of updates for schedules, if any."""
    check_parameters(params)
    for name in transform._hyperparameters:
        value = getattr(transform, name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, dict):
                check_by_name(name, part, params)
    if not scheduled(transform):
        return None
    return torch.zeros((), dtype=torch.float64, device=device_of(params))


def value_at(value: Any, count: Tensor) -> Any:
    """Return the value of a schedule in float64."""
    if not is_schedule(value):
        return value
    return memoized(_evaluated, value, count)


def _evaluated(value: Schedule, count: Tensor) -> Tensor:
    result = value(count)
    if not isinstance(result, (int, float, Tensor)):
        raise TypeError(
            f"schedule {value!r} must return a number or a 0-dim tensor, got {result}"
        )
    if isinstance(result, Tensor) and result.ndim != 0:
        shape = tuple(result.shape)
        raise ValueError(
            f"schedule {value!r} must return a 0-dim tensor, got shape {shape}"
        )
    return torch.as_tensor(result, dtype=torch.float64, device=count.device)

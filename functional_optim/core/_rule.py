"""`Rule`: a transform that is its formula on one parameter.

The formula is recorded as a program, once for a class and its options, and `lift` runs
it on all parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from functional_optim.algebra._lifting import lift
from functional_optim.algebra._norms import norms
from functional_optim.algebra._recording import Total
from functional_optim.algebra._scalars import memoized
from functional_optim.algebra._tensor_map import TensorMap, device_of
from functional_optim.core._context import Context, Norm
from functional_optim.core._forms import (
    Kind,
    Number,
    form_of,
    merged,
    number_dtype,
    present_fields,
)
from functional_optim.core._hyperparameters import (
    Scheduled,
    checked,
    flag,
    hyperparameter,
    init_hyperparameters,
    is_schedule,
    value_at,
    value_class,
)
from functional_optim.core._transform import Role, Scope


def number(initial: float | bool) -> Any:
    """Declare an entry of a state as a single number that follows from numbers alone.

    A count, for example. It is stored as a 0-dim float64 (or bool) tensor, which
    parameters with the same history share, and computed once for all of them.

    Args:
        initial: Its value before the first update.

    Example:
        >>> number(0.0)
        Number(initial=0.0, is_global=False)
    """
    return Number(initial)


def global_number(initial: float | bool) -> Any:
    """Declare an entry of a state as one number for the transform, not for a parameter.

    A total, for example. It is stored as one 0-dim float64 (or bool) tensor, and
    `readings` reports it under the name of its field.

    Args:
        initial: Its value before the first update.

    Example:
        >>> global_number(0.0)
        Number(initial=0.0, is_global=True)
    """
    return Number(initial, is_global=True)


@dataclass_transform(
    frozen_default=True,
    eq_default=False,
    field_specifiers=(hyperparameter, checked, flag),
)
class Rule:
    """The base class of a transform that is a formula on one parameter.

    A subclass declares hyperparameters as fields, and defines `update_param`. It is a
    frozen dataclass: compared and printed by value.

    Args:
        scope: What one number of the output may depend on: `Scope.ELEMENTWISE`, or
            `Scope.PER_TENSOR` if the formula takes norms of whole tensors.
        role: What the transform does in a chain, if the order matters.

    State:
        What `init_param` returns, with a map by name for each entry; with a schedule
        among the hyperparameters a `Scheduled` around it.

    Shapes:
        Every update keeps its shape, device and name, and takes the widest dtype of
        update and state.

    Source:
        optax.GradientTransformation; equinox.Module.

    Raises:
        TypeError: the class has no `update_param`; at the first use: its formula is not
            elementwise.

    Example:
        >>> class Sign(Rule, scope=Scope.ELEMENTWISE):
        ...     def update_param(self, u, s, p):
        ...         return u.sign(), s
        >>> Sign().update({"w": torch.tensor([-3.0, 2.0])}, (), {"w": torch.ones(2)})[0]
        {'w': tensor([-1.,  1.])}
    """

    # Of the class. Not ClassVar, which to pyright is no property of the protocol.
    scope: Scope
    role: Role | None = None
    consumes_state: ClassVar[bool] = True
    _hyperparameters: ClassVar[tuple[str, ...]]
    _options: ClassVar[list[str]]
    """The other fields."""
    _pairs: ClassVar[set[str]]
    _zeros: ClassVar[list[str]]
    """The hyperparameters of which a plain 0 is another rule."""
    _state_type: ClassVar[Any]
    _forms: ClassVar[dict[Any, str]]

    def __init_subclass__(cls, *, scope: Scope, role: Role | None = None) -> None:
        """Make a subclass a frozen dataclass."""
        super().__init_subclass__()
        if scope is Scope.GLOBAL:
            raise TypeError(
                f"{cls.__name__} must have scope=Scope.ELEMENTWISE or PER_TENSOR, got "
                f"{scope!r}; write a class with init and update, which has all tensors"
            )
        if cls.update_param is Rule.update_param:
            raise TypeError(
                f"{cls.__name__} must define update_param(self, u, s, p), its formula"
            )
        cls.scope, cls.role = scope, role
        value_class(cls)
        cls._forms = {}
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        cls._pairs = {f.name for f in fields if f.metadata.get("pair")}
        cls._zeros = [f.name for f in fields if f.metadata.get("zero_differs")]
        cls._options = [f.name for f in fields if "hyperparameter" not in f.metadata]

    def init_param(self, p: Tensor) -> Any:
        """Return the state of one parameter before its first update.

        Args:
            p: The parameter; one of shape () comes as (1,).

        Returns:
            A NamedTuple whose entries are tensors of the parameter's shape, `number()`,
            `global_number()`, or `()` for what these options do without; or `()`.
        """
        return ()

    def update_param(self, u: Tensor, s: Any, p: Tensor) -> tuple[Tensor, Any]:
        """Return the new update and the new state of one parameter.

        Args:
            u: Its update, of its shape.
            s: Its state, of the type that `init_param` returns.
            p: The parameter.
        """
        raise NotImplementedError

    @final
    def init(self, params: TensorMap) -> Any:
        """Return the state before the first update; check maps by name."""
        num_updates = init_hyperparameters(self, params)
        form = form_of(self)
        state: Any = ()
        if form.kinds:
            # A copy of the 0-dim ones: an entry must not be a view of a parameter.
            given = [p if p.ndim else p.clone().reshape(1) for p in params.values()]
            rows = [self.init_param(p) for p in given]
            columns = zip(*rows, strict=True) if rows else form.starts
            fields = [
                _field_of(kind, params, column)
                for (_, kind), column in zip(form.kinds, columns, strict=True)
            ]
            state = (type(rows[0]) if rows else type(self)._state_type)(*fields)
        return state if num_updates is None else Scheduled(state, num_updates)

    @final
    def update(
        self,
        updates: TensorMap,
        state: Any,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, Any]:
        """Return the new updates and the new state, by the formula."""
        form = form_of(self)
        hypers, inner, num_updates = self._split(state)
        fields = present_fields(form, self, inner)
        if not updates:
            return {}, state
        inputs = [
            updates,
            params if form.program.is_read[1] else None,
            *fields,
            *hypers,
        ]
        totals: dict[int, Tensor] = {}
        for total in form.program.totals:
            if total.per_tensor:
                continue
            totals[total.register] = _reduced(total, inputs, totals, context)
        apart = dict in map(type, hypers)
        moved, *new = lift(form.program, inputs, form.like, totals, apart=apart)
        if form.kinds:
            inner = inner._replace(**merged(form, inner, new))
        if num_updates is None:
            return moved, inner
        return moved, Scheduled(inner, memoized(torch.add, num_updates, 1))

    def readings(self, state: Any) -> dict[str, float | Tensor]:
        """Return global numbers, and a learning rate that is the same for all names."""
        _, inner, num_updates = self._split(state)
        form = form_of(self)
        found: dict[str, float | Tensor] = {
            name: getattr(inner, name)
            for name, kind in form.kinds
            if kind is Kind.GLOBAL
        }
        if self.role is Role.LEARNING_RATE:
            rate = getattr(self, "lr", {})
            if num_updates is not None:
                rate = value_at(rate, num_updates)
            if not isinstance(rate, dict):
                found["lr"] = rate
        return found

    def _split(self, state: Any) -> tuple[list[Any], Any, Tensor | None]:
        """Return this step's hyperparameters, the state, and the count of updates.

        The hyperparameters of a pair come one after the other; the state is that of the
        formula; the count is there if one of the hyperparameters is a schedule.
        """
        hypers: list[Any] = []
        for name in self._hyperparameters:
            value = getattr(self, name)
            hypers += value if isinstance(value, tuple) else (value,)
        if all(map(_is_constant, hypers)):
            return hypers, state, None
        if not isinstance(state, Scheduled):
            raise ValueError(
                f"{self!r} holds a schedule, but its state was made without; call init "
                "again after replacing a number by a schedule"
            )
        inner, num_updates = state
        return [value_at(value, num_updates) for value in hypers], inner, num_updates


def _is_constant(value: Any) -> bool:
    return isinstance(value, float) or not is_schedule(value)


def _field_of(kind: Kind, params: TensorMap, entries: Sequence[Any]) -> Any:
    """Return a field of a state before the first update, given that of each name."""
    if kind is Kind.ABSENT:
        return ()
    if kind is Kind.GLOBAL:
        return _initial(entries[0].initial, device_of(params))
    if kind is Kind.NUMBER:
        starts: dict[Any, Tensor] = {}
        for param, entry in zip(params.values(), entries, strict=False):
            key = entry.initial, param.device
            if key not in starts:
                starts[key] = _initial(*key)
        pairs = zip(params.items(), entries, strict=False)
        return {name: starts[e.initial, p.device] for (name, p), e in pairs}
    return {
        name: (entry.clone() if entry is param else entry).reshape(param.shape)
        for (name, param), entry in zip(params.items(), entries, strict=False)
    }


def _initial(initial: float | bool, device: torch.device | None) -> Tensor:
    return torch.full((), initial, dtype=number_dtype(Number(initial)), device=device)


def _reduced(
    total: Total,
    inputs: Sequence[Any],
    totals: dict[int, Tensor],
    context: Context | None,
) -> Tensor:
    """Return a total over all parameters."""
    context, program = context or Context(), total.program

    def partial() -> Tensor:
        if program.on_tensors or program.results != (0,):
            # Read again by the formula: none of them may be overwritten here.
            kept = [dict(x) if isinstance(x, dict) else x for x in inputs]
            (tensors,) = lift(program, kept, [[0]], totals)
        else:
            tensors = inputs[0]
        if isinstance(total.op, Norm):
            return norms(tensors.values(), total.op.p, wide=context.is_partial)
        sums = [t.sum(dtype=torch.float64) for t in tensors.values()]
        return torch.stack(sums)

    found = context.reduce(partial, total.op)
    if total.error_if_nonfinite and not found.isfinite():
        raise RuntimeError(
            f"the joint {total.op} of the updates is {found.item()}; find the source "
            "with torch.autograd.detect_anomaly, skip such steps with SkipNonfinite, "
            "or set error_if_nonfinite=False"
        )
    return found

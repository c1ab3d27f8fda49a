"""Record the formula of a class of rules: its form.

A form is what all rules of a class with the same options have in common. It is made
once, and kept with the class.
"""

from __future__ import annotations

import enum
import re
import traceback
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from functional_optim.algebra._recording import Program, record
from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.algebra._torch_modes import constant_when_compiled
from functional_optim.core._hyperparameters import is_zero
from functional_optim.core._transform import Scope
from functional_optim.core._validation import describe_state


class Number(NamedTuple):
    """The start of an entry that is a single number."""

    initial: float | bool
    is_global: bool = False


class Kind(enum.Enum):
    """The kinds of fields of a state."""

    ABSENT = "left out with these options"
    NUMBER = "a number for each parameter"
    GLOBAL = "a number for the transform"
    TENSOR = "a tensor for each parameter"


def _field_kind(entry: Any) -> Kind:
    if isinstance(entry, Number):
        return Kind.GLOBAL if entry.is_global else Kind.NUMBER
    return Kind.TENSOR if isinstance(entry, (Tensor, fx.Proxy)) else Kind.ABSENT


def number_dtype(entry: Any) -> torch.dtype | None:
    """Return the dtype of an entry that is a number, None for a tensor."""
    if isinstance(entry, Number):
        return torch.bool if isinstance(entry.initial, bool) else torch.float64
    return None


class Form(NamedTuple):
    """What all rules of a class with the same options have in common."""

    state_name: str
    """The class of its state. Not the class: to torch.compile it has no source."""
    kinds: tuple[tuple[str, Kind], ...]
    """The fields of the state, and their kinds."""
    starts: Sequence[Sequence[Any]]
    """An entry of each field before the first update."""
    program: Program
    like: Sequence[Sequence[int]]
    changed: Sequence[str]
    """The fields that the formula computes, in the order of its results."""


def present_fields(form: Form, rule: Any, state: Any) -> list[Any]:
    """Return the fields of a state that are there, after a check of all."""
    if not form.kinds:
        return []
    if type(state).__name__ != form.state_name:
        raise ValueError(
            f"{rule!r} needs a {form.state_name}, got {describe_state(state)}; make it "
            "with this transform's init"
        )
    fields = []
    for field, (name, kind) in zip(state, form.kinds, strict=True):
        if (kind is Kind.ABSENT) != isinstance(field, tuple):
            made = "with" if kind is Kind.ABSENT else "without"
            raise ValueError(
                f"{rule!r} got a state made {made} {name}; call init again after "
                "changing an option"
            )
        if kind is not Kind.ABSENT:
            fields.append(field)
    return fields


def merged(form: Form, state: Any, columns: Sequence[TensorMap]) -> dict[str, Any]:
    """Return the fields that are new, with the old entries of other names."""
    new: dict[str, Any] = {}
    for name, column in zip(form.changed, columns, strict=True):
        is_global = (name, Kind.GLOBAL) in form.kinds
        old = getattr(state, name)
        new[name] = next(iter(column.values())) if is_global else old | column
    return new


def form_of(rule: Any) -> Form:
    """Return the form of a rule, recorded at the first use."""
    cls = type(rule)
    zeros: tuple[bool, ...] = ()
    options: tuple[Any, ...] = ()
    for name in cls._zeros:
        zeros += (is_zero(getattr(rule, name)),)
    for name in cls._options:
        options += (getattr(rule, name),)
    form: Form = getattr(cls, _form_name(cls, zeros, options))
    return form


@constant_when_compiled
def _form_name(cls: Any, zeros: tuple[bool, ...], options: tuple[Any, ...]) -> str:
    """Return the attribute with the form of the rules of a class with these options.

    Each has one of its own: of a dict torch.compile would guard every entry.
    """
    names: dict[Any, str] = cls._forms
    if (zeros, options) not in names:
        name = f"_form_{len(names)}"
        setattr(cls, name, _Recorder(cls, zeros, options).form())
        names[zeros, options] = name
    return names[zeros, options]


_EXAMPLES = (3, 5, 7), (5,)
"""Shapes of parameters that show what an entry is; those of real ones deceive."""


class _Recorder:
    """Records the formula of the rules of a class with given options."""

    def __init__(self, cls: Any, zeros: Any, options: Any) -> None:
        self._cls = cls
        self._plain = {
            name for name, zero in zip(cls._zeros, zeros, strict=True) if zero
        }
        self._options = dict(zip(cls._options, options, strict=True))
        self._num_hypers = len(cls._hyperparameters) + len(cls._pairs)

    def form(self) -> Form:
        """Return the form; see `Form`."""
        rule = self._rule([0.5] * self._num_hypers)
        first, second = (
            rule.init_param(torch.empty(shape, device="meta")) for shape in _EXAMPLES
        )
        self._state_type = None if first == () else type(first)
        if self._state_type is not None:
            self._cls._state_type = self._state_type
        self._kinds: dict[str, Kind] = {}
        if self._state_type is not None:
            kinds = zip(map(_field_kind, first), map(_field_kind, second), strict=True)
            for name, (kind, other) in zip(first._fields, kinds, strict=True):
                self._kinds[name] = kind if kind is not Kind.ABSENT else other
        present = {n: k for n, k in self._kinds.items() if k is not Kind.ABSENT}
        numbers = [kind is not Kind.TENSOR for kind in present.values()]
        is_number = [False, False, *numbers, *[True] * self._num_hypers]
        per_tensor = self._cls.scope is Scope.PER_TENSOR
        try:
            program = record(self._formula, is_number, per_tensor=per_tensor)
            self._check_kinds(program)
        except Exception as error:
            raise TypeError(_located(self._cls, error)) from error
        names = list(present)
        tensors = [2 + index for index, number in enumerate(numbers) if not number]
        return Form(
            type(first).__name__,
            tuple(self._kinds.items()),
            tuple((entry,) for entry in first),
            program,
            ((0, *tensors), *((2 + names.index(name),) for name in self._changed)),
            tuple(self._changed),
        )

    def _check_kinds(self, program: Program) -> None:
        """Refuse a tensor in the place of a number, and the other way round."""
        for name, register in zip(self._changed, program.results[1:], strict=True):
            wants_tensor = self._kinds[name] is Kind.TENSOR
            if program.is_number[register] is wants_tensor:
                made = "a tensor" if wants_tensor else "a number"
                raise TypeError(f"{name} must stay {made}, as init_param made it")
        if program.is_number[program.results[0]]:
            raise TypeError("it must return a tensor as the update, got a number")

    def _rule(self, hypers: Iterable[Any]) -> Any:
        """Return a rule with these hyperparameters, but for plain zeros that differ."""
        rule = object.__new__(self._cls)
        values = iter(hypers)
        for name in self._cls._hyperparameters:
            pair = name in self._cls._pairs
            new = (next(values), next(values)) if pair else next(values)
            object.__setattr__(rule, name, 0.0 if name in self._plain else new)
        for name, option in self._options.items():
            object.__setattr__(rule, name, option)
        return rule

    def _formula(self, u: Any, p: Any, *rest: Any) -> list[Any]:
        """Return the update, and the fields of the state that change."""
        given = iter(rest)
        old = {
            name: () if kind is Kind.ABSENT else next(given)
            for name, kind in self._kinds.items()
        }
        s = () if self._state_type is None else self._state_type(**old)
        result = self._rule(given).update_param(u, s, p)
        update, state = self._checked(result)
        self._changed = [
            name
            for name, kind in self._kinds.items()
            if kind is not Kind.ABSENT and getattr(state, name) is not old[name]
        ]
        return [update, *(getattr(state, name) for name in self._changed)]

    def _checked(self, result: Any) -> tuple[Any, Any]:
        """Refuse a result that is no update and state of the kind of `init_param`."""
        if not isinstance(result, tuple) or len(result) != 2:
            kind = "one tensor" if isinstance(result, fx.Proxy) else repr(result)
            raise TypeError(f"it must return (update, state), got {kind}")
        update, state = result
        if not isinstance(update, (Tensor, fx.Proxy)):
            raise TypeError(f"it must return a tensor as the update, got {update!r}")
        if self._state_type is None:
            if state != ():
                raise TypeError(
                    f"it returned the state {state!r}, init_param none; define "
                    "init_param(self, p)"
                )
            return update, state
        if type(state) is not self._state_type:
            raise TypeError(
                f"it must return a {self._state_type.__name__} as init_param, got "
                f"{state!r}"
            )
        for name, each in self._kinds.items():
            entry = getattr(state, name)
            if isinstance(entry, Number):
                raise TypeError(f"{name} must be computed from s, got {entry!r}")
            if (each is Kind.ABSENT) != isinstance(entry, tuple):
                raise TypeError(
                    f"{name} must be () in both or in neither, got {entry!r}"
                )
        return update, state


def _located(cls: Any, error: Exception) -> str:
    """Return the message of an error in a formula, with its file and line."""
    code = cls.update_param.__code__
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == code.co_filename
    ]
    line = lines[-1] if lines else code.co_firstlineno
    reads = re.search(r"not '?Proxy\b", str(error))
    if reads or isinstance(error, fx.proxy.TraceError):
        # The symbol in the place of a tensor.
        error = TypeError(
            "it reads a value on the host, as if, and, float() and math do; select by "
            "torch.where, or ask is_zero() of a hyperparameter with zero_differs=True"
        )
    return f"{cls.__name__}.update_param ({code.co_filename}:{line}): {error}"

"""Log numbers about updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any, ClassVar, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from functional_optim.algebra._norms import norms
from functional_optim.algebra._tensor_map import TensorMap, copied, device_of
from functional_optim.core._context import Context, Norm, ReduceOp
from functional_optim.core._hyperparameters import checked, value_class
from functional_optim.core._transform import Scope
from functional_optim.core._validation import (
    check_parameters,
    check_state,
    validate_name,
)

Elementwise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A function of an update and its parameter, number by number."""


class ObserveState(NamedTuple):
    """The state of `Observe`: the last value.

    Attributes:
        value: What was observed in the last update; 0 before the first. Tensor, shape
            (), float64.

    Example:
        >>> Observe("grad_norm").init({"w": torch.ones(2)})
        ObserveState(value=tensor(0., dtype=torch.float64))
    """

    value: Tensor


def _checked_fn(name: str, fn: Any) -> Any:
    if fn is not None and (not callable(fn) or isinstance(fn, type)):
        raise TypeError(
            f"{name} must be a function of an update and its parameter, such as "
            f"lambda update, param: update.abs(), got {fn!r}"
        )
    return fn


def _checked_op(name: str, op: Any) -> Any:
    if not isinstance(op, Norm) and op not in ("sum", "max", "all"):
        raise ValueError(f"{name} must be 'sum', 'max', 'all' or Norm(p), got {op!r}")
    return op


@final
@value_class
class Observe:
    """Pass updates through, and keep one number about all of them: u <- u.

        value <- op over all numbers of all tensors of fn(u, p)

    joined within each tensor first, then across tensors. `readings` returns the value
    under the name of the observer; nothing is read on the host. Stand it where the
    question is: in front for gradients, last for steps, before a guard to see what the
    guard skips.

        Observe("grad_norm")
        Observe("param_norm", lambda u, p: p)
        Observe("largest", lambda u, p: u.abs(), op="max")
        Observe("nans", lambda u, p: u.isnan(), op="sum")

    Args:
        name: Name of the reading. Not empty, without ".".
        fn: Elementwise function of an update and its parameter that returns a real
            tensor of the update's shape, booleans included. None means the update
            itself. What it gives for one number must depend on that number of both
            alone: then the result is the same however the tensors are cut.
        op: How the numbers are joined: `"sum"`, `"max"`, `"all"` (1 if all are true,
            else 0) or `Norm(p)`. Of no numbers at all the sum and the norm are 0, the
            largest is -inf, and all are true.

    State:
        value: What was observed in the last update; 0 before the first. Tensor, shape
            (), float64.

    Shapes:
        Every update keeps its shape, dtype, device and name; it is copied.

    Raises:
        ValueError: `name` is empty or contains ".", or `op` is none of the above; at
            `update`: `fn` returned another shape than the update's.
        TypeError: `name` is no string, `fn` is no function; at `update`: `fn` returned
            no real tensor.

    Example:
        >>> largest = Observe("largest", lambda u, p: u.abs(), op="max")
        >>> updates = {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([2.0])}
        >>> largest.update(updates, largest.init(updates), updates)[1].value
        tensor(3., dtype=torch.float64)

    Source:
        optax.snapshot, reduced to one number; the default equals
        torch.nn.utils.get_total_norm bit for bit.
    """

    name: str = checked(check=validate_name)
    fn: Elementwise | None = checked(check=_checked_fn, default=None)
    _: KW_ONLY
    op: ReduceOp = checked(check=_checked_op, default_factory=lambda: Norm(2.0))

    scope: ClassVar[Scope] = Scope.ELEMENTWISE

    def init(self, params: TensorMap) -> ObserveState:
        """Return a value of zero."""
        check_parameters(params)
        zero = torch.zeros((), dtype=torch.float64, device=device_of(params))
        return ObserveState(zero)

    def update(
        self,
        updates: TensorMap,
        state: ObserveState,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, ObserveState]:
        """Return u."""
        check_state(self, state, ObserveState)
        if not updates:
            return {}, state
        numbers = self._numbers(updates, params)
        context = context or Context()
        partial = _partial(numbers, self.op, wide=context.is_partial)
        total = context.reduce(partial, self.op)
        return copied(updates), ObserveState(total.double())

    def readings(self, state: ObserveState) -> TensorMap:
        """Return the value under the name."""
        check_state(self, state, ObserveState)
        return {self.name: state.value}

    def _numbers(self, updates: TensorMap, params: TensorMap) -> TensorMap:
        """Return fn(u, p)."""
        if self.fn is None:
            return updates
        made = {name: self.fn(u, params[name]) for name, u in updates.items()}
        for name, x in made.items():
            if (
                not isinstance(x, Tensor)
                or x.is_complex()
                or x.shape != updates[name].shape
            ):
                raise self._refusal(name, x, updates[name])
        return made

    def _refusal(self, name: str, made: Any, update: Tensor) -> Exception:
        """Return the error of a wrong result of fn."""
        shape = tuple(update.shape)
        must = f"{self!r}: fn must return a real tensor of the update's shape, {shape}"
        if not isinstance(made, Tensor):
            return TypeError(f"{must} for {name!r}, got {made!r}")
        if made.is_complex():
            return TypeError(f"{must} for {name!r}, got {made.dtype}")
        return ValueError(
            f"{must} for {name!r}, got {tuple(made.shape)}: it works number by number, "
            "and op joins the numbers"
        )


def _partial(numbers: TensorMap, op: ReduceOp, *, wide: bool) -> Tensor:
    """Join the numbers of each tensor. Shape (n,)."""
    if isinstance(op, Norm):
        floats = {
            n: x if x.is_floating_point() else x.double() for n, x in numbers.items()
        }
        return norms(floats.values(), op.p, wide=wide)
    if op == "all":
        return torch.stack([x.all() for x in numbers.values()])
    if op == "sum":  # In float64: float32 cannot count beyond 2**24.
        return torch.stack([x.sum(dtype=torch.float64) for x in numbers.values()])
    return torch.stack([_largest(x) for x in numbers.values()])


def _largest(x: Tensor) -> Tensor:
    """Return the largest number in float64: -inf if there is none, NaN if one is."""
    if x.numel() == 0:
        return torch.full((), -math.inf, dtype=torch.float64, device=x.device)
    return x.amax().double()

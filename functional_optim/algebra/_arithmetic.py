"""Lazy arithmetic on tensor maps, run by `torch._foreach_*` or by plain operations.

`over(v).mul(b2).addcmul(g, g, 1 - b2).to_map()` reads like the formula and makes one
new map: the first operation allocates, those after it reuse what the first one made. On
plain tensors that record no graph it runs as `torch._foreach_*`; under `torch.func`,
`torch.compile`, autograd and for tensor subclasses, which foreach does not serve, as
ordinary operations out of place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functional_optim.algebra._buffers import Donated, current
from functional_optim.algebra._scalars import Factor, memoized
from functional_optim.algebra._tensor_map import (
    TensorMap,
    can_use_foreach,
    is_16_bit,
    lookup,
)
from functional_optim.algebra._torch_modes import has_derivative


def promote(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor in the wider dtype of two."""
    return tensor.to(torch.promote_types(tensor.dtype, other.dtype))


def add(x: Tensor, other: Tensor, alpha: float | Tensor) -> Tensor:
    """Return x + alpha * other, rounded as torch does for numbers or for tensors."""
    if not isinstance(alpha, Tensor):
        return torch.add(x, other, alpha=alpha)
    # A 0-dim factor does not promote: round the product in the wider dtype.
    return torch.add(x, promote(other, x) * alpha)


def addcmul(x: Tensor, first: Tensor, second: Tensor, value: float | Tensor) -> Tensor:
    """Return x + value * first * second, rounded as in `add`."""
    if not isinstance(value, Tensor):
        return torch.addcmul(x, first, second, value=value)
    return torch.addcmul(x, promote(first, x) * value, second)


def lerp(x: Tensor, end: Tensor, weight: float | Tensor) -> Tensor:
    """Return x + weight * (end - x); a tensor rounds as a number does."""
    if not isinstance(weight, Tensor):
        return torch.lerp(x, end, weight)
    # torch.lerp wants one dtype; a 16-bit weight would round 1 - beta to 3 digits.
    wide = torch.float32 if is_16_bit(x) else x.dtype
    return torch.lerp(x.to(wide), end.to(wide), weight.to(wide)).to(x.dtype)


def over(values: TensorMap, at: TensorMap | None = None) -> Expression:
    """Return an expression that starts with the tensors of a map.

    Example:
        >>> over({"w": torch.tensor([1.0, 2.0])}).mul(3.0).add(1.0).to_map()
        {'w': tensor([4., 7.])}
    """
    return Expression(values, at)


class Expression:
    """A tensor map under construction.

    Every operation changes the expression and returns it. Operands are numbers, 0-dim
    tensors, maps from name to one of these, tensor maps, or other expressions.
    """

    __slots__ = (
        "_dtypes",
        "_foreach",
        "_names",
        "_own",
        "_scalars",
        "_shapes",
        "_values",
    )

    def __init__(self, values: TensorMap, at: TensorMap | None = None) -> None:
        if at is None:
            self._names, found = list(values), list(values.values())
        else:
            self._names = list(at)
            found = lookup(values, self._names)
        self._dtypes = [v.dtype for v in found]
        if at is not None and self._dtypes != [a.dtype for a in at.values()]:
            wide = [promote(v, a) for v, a in zip(found, at.values(), strict=True)]
            found, self._dtypes = wide, [v.dtype for v in wide]
        # torch promotes a 0-dim tensor by a 0-dim number, and rounds it differently.
        self._scalars = 0 in map(Tensor.dim, found)
        if self._scalars:
            self._shapes = [v.shape for v in found]
            found = [v if v.ndim else v.reshape(1) for v in found]
        self._values = found
        self._foreach = can_use_foreach(found)
        self._own = self._foreach and type(values) is Donated

    def to_map(self, like: TensorMap | None = None) -> TensorMap:
        """Return the result as a new map, in the dtype of the first operand."""
        if not self._own:
            self._values = [_cloned(v) for v in self._values]
        dtypes = self._dtypes
        if like is not None:
            dtypes = [v.dtype for v in lookup(like, self._names)]
        values = self._values
        if [v.dtype for v in values] != dtypes:
            values = [v.to(d) for v, d in zip(values, dtypes, strict=True)]
        if self._scalars:
            shaped = zip(values, self._shapes, strict=True)
            values = [v if shape else v.reshape(()) for v, shape in shaped]
        self._own = False  # They belong to the map now.
        return dict(zip(self._names, values, strict=True))

    def mul(self, factor: Operand) -> Expression:
        """Multiply: x * factor."""
        return self._run("mul", self._column(factor))

    def div(self, divisor: Operand) -> Expression:
        """Divide: x / divisor."""
        return self._run("div", self._column(divisor))

    def add(self, other: Operand, *, alpha: Factor = 1.0) -> Expression:
        """Add: x + alpha * other."""
        column = self._column(other)
        if isinstance(alpha, (int, float)):
            if alpha == 1.0:
                return self._run("add", column)
            return self._run("add", column, alpha=alpha)
        return self._run_each(add, self._rows(column, self._each(alpha)))

    def addcmul(self, first: Operand, second: Operand, value: Factor) -> Expression:
        """Add a product: x + value * first * second."""
        one, two = self._column(first), self._column(second)
        if isinstance(value, (int, float)):
            return self._run("addcmul", one, two, value=value)
        return self._run_each(addcmul, self._rows(one, two, self._each(value)))

    def lerp(self, end: TensorMap, weight: Factor) -> Expression:
        """Move towards: x + weight * (end - x), with torch.lerp's rounding."""
        ends = self._matched(lookup(end, self._names))
        if [e.dtype for e in ends] != self._dtypes:
            ends = [e.to(d) for e, d in zip(ends, self._dtypes, strict=True)]
        if isinstance(weight, (int, float)):
            return self._run("lerp", ends, weight)
        return self._run_each(lerp, self._rows(ends, self._each(weight)))

    def sqrt(self) -> Expression:
        """Take the square root of x; its derivative is 0 where x is 0."""
        if not self._foreach and has_derivative():
            return self._run_each(_root, self._rows())
        return self._run("sqrt")

    def maximum(self, other: Operand) -> Expression:
        """Take the larger of x and other; NaN if either is."""
        return self._run("maximum", self._column(other))

    def clamp(self, low: Factor, high: Factor) -> Expression:
        """Limit: min(max(x, low), high); NaN stays."""
        return self._run("clamp_min", self._bound(low))._run(
            "clamp_max", self._bound(high)
        )

    def _run(self, name: str, *columns: Operands, **options: float) -> Expression:
        """Apply `torch.<name>` to every tensor, in place on what is already ours."""
        if self._foreach and len(self._values) == 1:
            self._run_single(name, columns, options)
        elif not self._foreach:
            function = getattr(torch, name)
            self._values = [
                function(x, *row, **options)
                for x, row in zip(self._values, self._rows(*columns), strict=True)
            ]
        elif not self._values:
            pass
        elif self._own:
            getattr(torch, f"_foreach_{name}_")(self._values, *columns, **options)
        else:
            out = getattr(torch, f"_foreach_{name}")(self._values, *columns, **options)
            self._values = list(out)
        self._own = True
        return self

    def _run_single(
        self, name: str, columns: tuple[Operands, ...], options: dict[str, Any]
    ) -> None:
        """Apply `torch.<name>` to the only tensor, without lists."""
        x = self._values[0]
        row = [c[0] if isinstance(c, list) else c for c in columns]
        memory = current.memory
        if self._own:
            options = {**options, "out": x}
        elif memory is not None and not any(_widens(c, x) for c in row):
            options = {**options, "out": memory.like(x)}
        self._values = [getattr(torch, name)(x, *row, **options)]

    def _run_each(
        self, function: Callable[..., Tensor], rows: Iterable[tuple[Any, ...]]
    ) -> Expression:
        """Apply a function to every tensor and its operands."""
        pairs = zip(self._values, rows, strict=True)
        self._values = [function(x, *row) for x, row in pairs]
        self._own = True
        return self

    def _each(self, factor: Tensor | Mapping[str, float | Tensor]) -> Operands:
        """Return one factor, or one for each tensor; numbers stay Python numbers.

        torch rounds x + alpha * y once if alpha is a number, and twice if it is a
        tensor: what a name has must not depend on what others have.
        """
        if isinstance(factor, Tensor):
            return self._column(factor)
        values: list[Any] = lookup(factor, self._names)
        return [
            v.to(x.device) if isinstance(v, Tensor) else v
            for v, x in zip(values, self._values, strict=True)
        ]

    def _rows(self, *columns: Operands) -> Iterable[tuple[Any, ...]]:
        """Return the operands of each tensor."""
        count = len(self._values)
        each = [
            c if isinstance(c, list) else itertools.repeat(c, count) for c in columns
        ]
        if not each:
            return itertools.repeat((), count)
        return zip(*each, strict=True)

    def _column(self, operand: Operand) -> Operands:
        """Return an operand as one number for all tensors, or as a list by name."""
        if isinstance(operand, Expression):
            return operand._values
        if isinstance(operand, (int, float)):
            return self._as_tensor(operand)
        if isinstance(operand, Tensor):
            if self._elsewhere(operand):
                return [operand] * len(self._values)
            return memoized(Tensor.float, operand) if self._is_float32() else operand
        values: list[Any] = lookup(operand, self._names)
        kinds = set(map(type, values))
        if kinds <= {float, int}:
            return values
        if kinds & {float, int} or 0 in map(Tensor.dim, values):
            values = [
                v.to(x.device)
                if isinstance(v, Tensor)
                else torch.tensor(v, dtype=torch.float64, device=x.device)
                for v, x in zip(values, self._values, strict=True)
            ]
        return self._matched(values)

    def _bound(self, bound: Factor) -> Operands:
        """Return a bound as a number or as a list; foreach takes no single tensor."""
        if isinstance(bound, Tensor):
            return [bound] * len(self._values)
        return bound if isinstance(bound, (int, float)) else self._column(bound)

    def _as_tensor(self, number: float) -> float | Tensor:
        """Return a number in the form that foreach takes fastest, with the same bits.

        On the CPU foreach makes a tensor of a number for every tensor in the list.
        """
        if not self._foreach or len(self._values) < 2 or not self._values[0].is_cpu:
            return number
        if not self._is_float32():
            return number
        return torch.tensor(number, dtype=torch.float32, device="cpu")

    def _is_float32(self) -> bool:
        """Whether rounding a factor to float32 first changes no bit of the result."""
        return set(self._dtypes) == {torch.float32}

    def _elsewhere(self, factor: Tensor) -> bool:
        """Whether a 0-dim tensor is on another device, which foreach refuses."""
        return bool(self._values) and factor.device != self._values[0].device

    def _matched(self, column: list[Tensor]) -> list[Tensor]:
        """Reshape 0-dim tensors to the shape (1,) of ours; factors stay 0-dim."""
        if not self._scalars:
            return column
        return [
            c.reshape(1) if not (shape or c.ndim) and c.dtype == x.dtype else c
            for c, shape, x in zip(column, self._shapes, self._values, strict=True)
        ]


Operand: TypeAlias = Factor | Expression

Operands: TypeAlias = float | Tensor | list[Any]


def _widens(operand: Any, x: Tensor) -> bool:
    """Whether an operation with this operand may have a wider result."""
    return isinstance(operand, Tensor) and operand.ndim > 0 and operand.dtype != x.dtype


def _root(x: Tensor) -> Tensor:
    """Return the square root, with the derivative 0 at 0.

    A second moment is 0 as long as all gradients were, and does not depend on anything
    there; its derivative of 0, times the infinite one of the root, would be NaN.
    """
    is_zero = x == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, x).sqrt())


def _cloned(tensor: Tensor) -> Tensor:
    memory = current.memory
    return tensor.clone() if memory is None else memory.like(tensor).copy_(tensor)

"""Run a program on numbers and on lists of tensors.

A number is a Python float, a 0-dim tensor, or has one row for each of several: a list
of floats or a tensor. Tensors run through `torch._foreach_*`, a single one through
`out=`, and under torch.func, `torch.compile`, autograd and for subclasses through
ordinary operations, with the same rounding.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_optim.algebra import _recording
from functional_optim.algebra._buffers import current
from functional_optim.algebra._recording import FACTORS, Program
from functional_optim.algebra._tensor_map import is_16_bit
from functional_optim.algebra._torch_modes import has_derivative

# -- numbers ---------------------------------------------------------------------------

_ON_FLOATS: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "abs": abs,
    "sqrt": math.sqrt,
    "mul": operator.mul,
    "add": operator.add,
    "sub": operator.sub,
    "div": operator.truediv,
    "pow": math.pow,
    "reciprocal": lambda x: 1 / x,
    "float": lambda x: torch.tensor(x, dtype=torch.float32, device="cpu").item(),
}

_ON_MIXED: dict[str, Callable[..., Any]] = {
    "mul": operator.mul,
    "add": operator.add,
    "sub": operator.sub,
    "div": operator.truediv,
    "pow": operator.pow,
    "maximum": lambda x, y: _clamped("clamp_min", x, y),
    "minimum": lambda x, y: _clamped("clamp_max", x, y),
}
"""Operations on a tensor and a Python number, which widens no dtype."""


def run_numbers(program: Program, *inputs: Any) -> tuple[Any, ...]:
    """Return the numbers that cross, given those that a program takes, in order."""
    values = dict(program.constants)
    values.update(zip(program.given, inputs, strict=True))
    has_lists = list in map(type, inputs)
    for name, args, out, *_ in program.on_numbers:
        row = list(map(values.__getitem__, args))
        values[out] = _number(name, row, has_lists=has_lists)
    return tuple(map(values.__getitem__, program.crossing))


def _number(name: str, args: list[Any], *, has_lists: bool) -> Any:
    """Run an operation on numbers."""
    first, last = args[0], args[-1]
    if len(args) <= 2 and not has_lists:
        if not isinstance(first, Tensor) and not isinstance(last, Tensor):
            return _on_floats(name, args)
        if isinstance(first, Tensor) and isinstance(last, Tensor):
            if first.dtype == last.dtype or not is_16_bit(first):
                return getattr(Tensor, name)(*args)
            # A norm in 16 bits is rounded as torch's, and rounds no other number.
            found: Tensor = getattr(Tensor, name)(first.float(), last.float())
            return found.to(first.dtype)
        if name in _ON_MIXED:
            return _ON_MIXED[name](*args)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if not tensors and has_lists:
        columns = [arg for arg in args if isinstance(arg, list)]
        count = len(columns[0]) if columns else 1
        results = [_on_floats(name, row) for row in rows(count, args)]
        return results if columns else results[0]
    if not tensors:
        return _on_floats(name, args)
    # Python numbers do not widen the dtype of tensors; nor does it round them.
    dtypes = {tensor.dtype for tensor in tensors} - {torch.bool}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float64
    wide = torch.promote_types(dtype, torch.float32)
    given = [_number_tensor(arg, wide, tensors[0].device) for arg in args]
    return getattr(torch, name)(*given).to(dtype)


def _on_floats(name: str, args: Sequence[float]) -> Any:
    """Compute with Python's floats: nothing waits for a device."""
    try:
        return _ON_FLOATS[name](*args)
    except (KeyError, ArithmeticError, ValueError):
        # Python raises where IEEE 754 says infinity or NaN, and lacks a few functions.
        tensors = [
            _number_tensor(arg, torch.float64, torch.device("cpu")) for arg in args
        ]
        return getattr(torch, name)(*tensors).item()


def _number_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    dtype = torch.bool if isinstance(value, bool) else dtype
    return torch.tensor(value, dtype=dtype, device=device)


def _clamped(name: str, x: Any, y: Any) -> Any:
    tensor, bound = (x, y) if isinstance(x, Tensor) else (y, x)
    return getattr(torch, name)(tensor, bound)


# -- tensors ---------------------------------------------------------------------------

_FOREACH: set[tuple[str, int, type | None]] = {
    *(
        (name, 1, None)
        for name in ["neg", "abs", "sign", "sqrt", "reciprocal", "exp", "log", "tanh"]
    ),
    *((name, 2, None) for name in ["mul", "div", "add", "sub", "maximum", "minimum"]),
    *((name, 3, None) for name in ["addcmul", "addcdiv", "lerp"]),
    *((name, 1, kind) for name in ("mul", "div") for kind in (float, Tensor, list)),
    *((name, 1, float) for name in ["add", "clamp_min", "clamp_max", "pow"]),
    ("add", 1, Tensor),
    ("add", 2, float),
    ("addcmul", 3, float),
    ("lerp", 2, float),
}
"""Operations that foreach and `out=` have: how many operands are tensors, and the kind
of the number after them. They keep the dtype."""


def run_tensors(
    program: Program,
    values: dict[int, Any],
    owned: set[int],
    *,
    foreach: bool,
    count: int,
) -> None:
    """Run the operations on tensors, on lists of one dtype, none of them 0-dim.

    `values` holds what the registers do, and in the end the results; tensors in the
    registers `owned` may be overwritten. `foreach` says that tensors are plain and
    record nothing, `count` how many a list has.
    """
    for name, args, out, dead, num_tensors in program.on_tensors:
        operands = list(map(values.__getitem__, args))
        number = type(operands[-1]) if num_tensors < len(args) else None
        reuses = args[0] in dead and args[0] in owned
        if name == "clone" and reuses:
            values[out] = operands[0]
        elif not foreach or (name, num_tensors, number) not in _FOREACH:
            function = _function(name, len(args))
            values[out] = [function(*row) for row in rows(count, operands)]
        else:
            run = _run_one if count == 1 else _run_foreach
            values[out] = run(name, operands, reuses=reuses)
        owned.add(out)
        for register in dead:
            del values[register]


def _function(name: str, num_args: int) -> Callable[..., Tensor]:
    """Return the function of an operation on one tensor."""
    if name == "clone":
        return _cloned
    if name == "sqrt" and has_derivative():
        return _root
    has_factor = num_args > FACTORS.get(name, num_args)
    found: Callable[..., Tensor] = getattr(_recording if has_factor else torch, name)
    return found


def _run_one(name: str, operands: list[Any], *, reuses: bool) -> list[Tensor]:
    """Run an operation on a single tensor, without lists."""
    row = [value[0] if isinstance(value, list) else value for value in operands]
    options: dict[str, Any] = {}
    if reuses:
        options["out"] = row[0]
    elif current.memory is not None:
        options["out"] = current.memory.like(row[0])
    if len(row) > FACTORS.get(name, len(row)) and name in _KEYWORDS:
        options[_KEYWORDS[name]] = row.pop()
    return [getattr(torch, name)(*row, **options)]


def _run_foreach(name: str, operands: list[Any], *, reuses: bool) -> list[Tensor]:
    """Run an operation on a list of tensors."""
    tensors: list[Tensor] = operands[0]
    others = operands[1:]
    options: dict[str, Any] = {}
    if len(operands) > FACTORS.get(name, len(operands)) and name in _KEYWORDS:
        options[_KEYWORDS[name]] = others.pop()
    elif others and not isinstance(others[-1], list) and name != "lerp":
        others[-1] = _as_operand(others[-1], tensors)
    if reuses:
        getattr(torch, f"_foreach_{name}_")(tensors, *others, **options)
        return tensors
    return list(getattr(torch, f"_foreach_{name}")(tensors, *others, **options))


_KEYWORDS = {"add": "alpha", "addcmul": "value"}
"""Names of the factors in torch."""


def _as_operand(value: Any, tensors: list[Tensor]) -> Any:
    """Return an operand in the form that foreach takes fastest, with the same bits."""
    first = tensors[0]
    if isinstance(value, float) and first.is_cpu and first.itemsize <= 4:
        # On the CPU foreach makes a tensor of a number for every tensor in the list,
        # and multiplies 16-bit tensors in place by the number in 16 bits.
        return torch.tensor(value, dtype=torch.float32, device="cpu")
    if isinstance(value, Tensor) and value.device != first.device:
        return [value] * len(tensors)
    return value


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


def rows(count: int, operands: Iterable[Any]) -> Iterable[tuple[Any, ...]]:
    """Return the operands of each of several tensors or numbers."""
    each = [
        operand if isinstance(operand, list) else itertools.repeat(operand, count)
        for operand in operands
    ]
    return zip(*each, strict=True)

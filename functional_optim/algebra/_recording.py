"""Record a formula as a program: operations on numbers, then on tensors.

The formula is called once with symbols in the place of its inputs. What it did is the
program, which `_running` runs on lists of tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

# -- operations of formulas that torch has for Python numbers only ---------------------


def add(x: Tensor, other: Tensor, alpha: float | Tensor) -> Tensor:
    """Return x + alpha * other, rounded as `torch.add` rounds it for a number.

    Args:
        x: Tensor of any shape.
        other: Tensor of the same shape.
        alpha: Number, 0-dim tensor, or hyperparameter.

    Example:
        >>> add(torch.ones(2), torch.ones(2), 0.5)
        tensor([1.5000, 1.5000])
    """
    if isinstance(x, fx.Proxy):
        return _proxy(add, x, other, alpha)
    if not isinstance(alpha, Tensor):
        return torch.add(x, other, alpha=alpha)
    # A 0-dim factor does not promote: round the product in the wider dtype.
    return torch.add(x, _as_wide(other, x) * alpha)


def addcmul(
    x: Tensor, tensor1: Tensor, tensor2: Tensor, value: float | Tensor
) -> Tensor:
    """Return x + value * tensor1 * tensor2, rounded as `torch.addcmul` rounds it.

    Args:
        x: Tensor of any shape.
        tensor1: Tensor of the same shape.
        tensor2: Tensor of the same shape.
        value: Number, 0-dim tensor, or hyperparameter.

    Example:
        >>> addcmul(torch.ones(2), torch.ones(2), torch.ones(2), 0.5)
        tensor([1.5000, 1.5000])
    """
    if isinstance(x, fx.Proxy):
        return _proxy(addcmul, x, tensor1, tensor2, value)
    if not isinstance(value, Tensor):
        return torch.addcmul(x, tensor1, tensor2, value=value)
    return torch.addcmul(x, _as_wide(tensor1, x) * value, tensor2)


def lerp(x: Tensor, end: Tensor, weight: float | Tensor) -> Tensor:
    """Return x + weight * (end - x), rounded as `torch.lerp` rounds it for a number.

    Args:
        x: Tensor of any shape.
        end: Tensor of the same shape.
        weight: Number, 0-dim tensor, or hyperparameter.

    Example:
        >>> lerp(torch.zeros(2), torch.ones(2), 0.25)
        tensor([0.2500, 0.2500])
    """
    if isinstance(x, fx.Proxy):
        return _proxy(lerp, x, end, weight)
    if not isinstance(weight, Tensor):
        return torch.lerp(x, end, weight)
    # torch.lerp wants one dtype; a 16-bit weight would round 1 - beta to 3 digits.
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.lerp(x.to(wide), end.to(wide), weight.to(wide)).to(x.dtype)


def total(x: Tensor, op: Any, *, error_if_nonfinite: bool = False) -> Tensor:
    """Return one number about a tensor of all parameters: a sum, or a norm.

    In the formula of an elementwise rule. Where the update runs on a part of the
    parameters, such as a shard, the number is still that of all.

    Args:
        x: Tensor of the parameter's shape, elementwise in update, state, parameter.
        op: `"sum"` or `Norm(p)`.
        error_if_nonfinite: Whether a NaN or infinite total raises a RuntimeError. This
            reads it on the host: it waits for the device, and breaks vmap and
            torch.compile.

    Returns:
        The total. Shape ().

    Raises:
        TypeError: the call is not in the formula of a rule.

    Example:
        >>> from functional_optim import Norm, Rule, Scope
        >>> class Normalize(Rule, scope=Scope.ELEMENTWISE):
        ...     def update_param(self, u, s, p):
        ...         return u / total(u, Norm(2.0)), s
        >>> updates = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> Normalize().update(updates, (), updates)[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    if isinstance(x, fx.Proxy):
        return _proxy(total, x, op, error_if_nonfinite)
    raise TypeError(
        "total is for the formula of a rule; a class with init and update has "
        "context.reduce"
    )


def _as_wide(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, other.dtype))


def _proxy(function: Callable[..., Tensor], x: fx.Proxy, *args: Any) -> Any:
    return x.tracer.create_proxy("call_function", function, (x, *args), {})


# -- programs --------------------------------------------------------------------------


class Operation(NamedTuple):
    """An operation on registers."""

    name: str
    args: tuple[int, ...]
    out: int
    dead: tuple[int, ...] = ()
    """The arguments that nothing reads afterwards."""
    num_tensors: int = 0
    """How many arguments are tensors; they come first."""


class Program(NamedTuple):
    """A formula; its registers are inputs, constants, totals, results of operations."""

    is_number: tuple[bool, ...]
    """For each register whether it holds a number: else it holds a tensor."""
    is_read: tuple[bool, ...]
    """For each input whether it is read."""
    given: tuple[int, ...]
    """The inputs and totals that are numbers and are read."""
    has_norms: bool
    """Whether a number differs from tensor to tensor."""
    constants: tuple[tuple[int, float | bool], ...]
    totals: tuple[Total, ...]
    on_numbers: tuple[Operation, ...]
    on_tensors: tuple[Operation, ...]
    crossing: tuple[int, ...]
    """The numbers that operations on tensors take, or that are results."""
    results: tuple[int, ...]
    counting: Program | None = None
    """What computes the results that are numbers, and nothing else."""


class Total(NamedTuple):
    """A number about a tensor: of each parameter, or of all together."""

    register: int
    program: Program
    """What computes the tensor, in the same registers."""
    op: Any
    """The order of its norm, or the `op` of `Context.reduce` if it is of all."""
    per_tensor: bool
    error_if_nonfinite: bool = False


def _inputs_read(program: Program) -> list[int]:
    return [index for index, read in enumerate(program.is_read) if read]


def record(
    formula: Callable[..., Iterable[Any]],
    is_number: Sequence[bool],
    *,
    per_tensor: bool = False,
) -> Program:
    """Return the program of a formula, given which of its inputs are numbers.

    A TypeError says that it is not elementwise, but for norms of whole tensors if
    `per_tensor`, or that it reads a value on the host.
    """
    graph = fx.Graph()
    tracer = _Tracer(graph, per_tensor=per_tensor)
    inputs = [graph.placeholder(f"x{i}") for i in range(len(is_number))]
    results = formula(*[fx.Proxy(node, tracer) for node in inputs])
    return _Writer(inputs, is_number).write(graph, results)


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Writes down what a formula does, if it may."""

    def __init__(self, graph: fx.Graph, *, per_tensor: bool) -> None:
        super().__init__(graph)
        self._per_tensor = per_tensor

    def create_arg(self, a: Any) -> Any:
        """Return an argument of a node, the `op` of a total as it is."""
        return a if dataclasses.is_dataclass(a) else super().create_arg(a)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add an operation to the graph; refuse one that no formula may have."""
        if kind != "placeholder":
            name = target if isinstance(target, str) else target.__name__
            is_norm = self._per_tensor and target is torch.linalg.vector_norm
            if target is not total and not is_norm:
                _check_elementwise(_NAMES.get(name, name), per_tensor=self._per_tensor)
        return super().create_node(kind, target, *args, **kwargs)


_ALLOWED = {"clone", "detach", "float", "full_like", "ones_like", "where", "zeros_like"}
"""Operations that treat each element by itself, though torch does not tag them so."""


def _check_elementwise(name: str, *, per_tensor: bool) -> None:
    """Refuse an operation that does not treat each element by itself."""
    if name in {"item", "tolist"}:
        raise TypeError(
            f"{name} reads a value on the host; select by torch.where instead"
        )
    if name.endswith("_") and not name.startswith("_"):
        raise TypeError(f"{name} writes into a tensor; write x.{name.rstrip('_')}(...)")
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    overloads = [getattr(packet, key) for key in packet.overloads()] if packet else []
    tags = [
        op.tags
        for op in overloads
        if not op._schema.is_mutable and str(op._schema.returns[0].type) == "Tensor"
    ]
    if any(torch.Tag.nondeterministic_seeded in each for each in tags):
        raise TypeError(f"{name} draws random numbers, which no formula may")
    if name not in _ALLOWED and not (
        tags and all(torch.Tag.pointwise in each for each in tags)
    ):
        raise TypeError(
            f"{name} is neither elementwise nor a norm of the whole tensor; write a "
            "class with init and update"
            if per_tensor
            else f"{name} is not elementwise; declare scope=Scope.PER_TENSOR"
        )


_COMMUTATIVE = {"mul", "add", "maximum", "minimum"}

FACTORS = {"add": 2, "addcmul": 3, "lerp": 2}
"""Operations whose last operand torch takes as a Python number only, and its place."""

_NAMES = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "and_": "logical_and",
    "or_": "logical_or",
    "invert": "logical_not",
}
"""Operations that have two names, and the one in programs."""

_KEYWORDS = "other", "end", "exponent", "tensor1", "tensor2", "alpha", "value", "weight"
"""Operands that may be given by name, in their order."""

_BOUNDS = {"maximum": "clamp_min", "minimum": "clamp_max"}
"""Operations with a tensor, and those with a number in its place."""


class _Writer:
    """Writes a graph as a program."""

    def __init__(self, inputs: Sequence[fx.Node], is_number: Sequence[bool]) -> None:
        self._is_number = list(is_number)
        self._num_inputs = len(inputs)
        self._registers = {node: i for i, node in enumerate(inputs)}
        self._constants: list[tuple[int, float | bool]] = []
        self._totals: list[Total] = []
        self._operations: list[Operation] = []

    def write(self, graph: fx.Graph, results: Iterable[Any]) -> Program:
        """Return the program that computes results in a graph."""
        for node in graph.nodes:
            if node.op != "placeholder":
                self._registers[node] = self._operation(node)
        registers: list[int] = []
        for result in results:
            register = self._operand(getattr(result, "node", result))
            if register < self._num_inputs or register in registers:
                # No two results may share memory, nor one with an input.
                register = self._emit("clone", register)
            registers.append(register)
        counts = [register for register in registers if self._is_number[register]]
        counting = self._program(counts) if counts else None
        return self._program(registers)._replace(counting=counting)

    def _program(self, results: Sequence[int]) -> Program:
        """Return what computes some registers, and nothing else."""
        live, kept = set(results), list[Operation]()
        for op in reversed(self._operations):
            if op.out in live:
                dead = (arg for arg in dict.fromkeys(op.args) if arg not in live)
                kept.append(self._reusing(op._replace(dead=tuple(dead))))
                live.update(op.args)
        kept.reverse()
        on_tensors = [op for op in kept if not self._is_number[op.out]]
        wanted, totals = set(live), list[Total]()
        for each in reversed(self._totals):  # One may follow from those before it.
            if each.register in wanted:
                totals.insert(0, each)
                wanted.update(each.program.given)
        read = [live, *({*_inputs_read(each.program)} for each in totals)]
        numbers = [i for i in range(self._num_inputs) if self._is_number[i]]
        needed = [*(arg for op in on_tensors for arg in op.args), *results]
        return Program(
            is_number=tuple(self._is_number),
            is_read=tuple(i in set.union(*read) for i in range(self._num_inputs)),
            given=(
                *(i for i in numbers if i in live),
                *(each.register for each in totals if each.register in live),
            ),
            has_norms=any(each.per_tensor for each in totals if each.register in live),
            constants=tuple(c for c in self._constants if c[0] in live),
            totals=tuple(totals),
            on_numbers=tuple(op for op in kept if self._is_number[op.out]),
            on_tensors=tuple(on_tensors),
            crossing=tuple(r for r in dict.fromkeys(needed) if self._is_number[r]),
            results=tuple(results),
        )

    def _operation(self, node: fx.Node) -> int:
        """Write the operation of a node; return the register of its result."""
        target: Any = node.target
        args: list[Any] = list(node.args)
        name = target if isinstance(target, str) else target.__name__
        name = _NAMES.get(name, name)
        if target is total:
            x, op, error = args
            return self._total(x, op, per_tensor=False, error_if_nonfinite=error)
        if target is torch.linalg.vector_norm:
            order: Any = [*args[1:], *node.kwargs.values(), 2.0][0]
            return self._total(args[0], float(order), per_tensor=True)
        if name == "float" and self._is_number[self._operand(args[0])]:
            return self._emit(name, self._operand(args[0]))
        if name == "clamp":
            bounds = dict(zip(("min", "max"), args[1:], strict=False)) | node.kwargs
            return self._clamp(args[0], bounds)
        kwargs = dict(node.kwargs)
        args += [kwargs.pop(key) for key in _KEYWORDS if key in kwargs]
        if kwargs:
            raise TypeError(f"{name} takes no {', '.join(kwargs)} in a formula")
        if name in {"add", "addcmul"} and args[FACTORS[name] :] == [1.0]:
            args.pop()
        return self._emit(name, *map(self._operand, args))

    def _total(self, x: Any, op: Any, **how: Any) -> int:
        """Write a total, and the program of what is reduced."""
        program = self._program([self._operand(x)])
        register = self._new(is_number=True)
        self._totals.append(Total(register, program, op, **how))
        return register

    def _clamp(self, x: Any, bounds: dict[str, Any]) -> int:
        """Write a clamp as its two halves, in which torch lets NaN pass, too."""
        register = self._operand(x)
        for key, name in (("min", "maximum"), ("max", "minimum")):
            if bounds.get(key) is not None:
                register = self._emit(name, register, self._operand(bounds[key]))
        return register

    def _operand(self, value: Any) -> int:
        if isinstance(value, fx.Node):
            return self._registers[value]
        if not isinstance(value, (bool, int, float)):
            raise TypeError(
                f"{value!r} is neither an input nor a number; a formula computes with "
                "its arguments and hyperparameters alone"
            )
        constant = value if isinstance(value, bool) else float(value)
        self._constants.append((self._new(is_number=True), constant))
        return self._constants[-1][0]

    def _new(self, *, is_number: bool) -> int:
        self._is_number.append(is_number)
        return len(self._is_number) - 1

    def _emit(self, name: str, *args: int) -> int:
        """Write an operation in the form that all ways of running have, in every bit.

        The first operand is a tensor where one is: c - x is -x + c, and c / x is
        (1 / x) * c, as torch has it.
        """
        is_number = all(self._is_number[arg] for arg in args)
        if not is_number and name != "where":
            first, *rest = args
            if self._is_number[first]:
                if name in _COMMUTATIVE and len(args) == 2:
                    args = rest[0], first
                elif name == "sub":
                    args, name = (self._emit("neg", rest[0]), first), "add"
                elif name == "div":
                    args, name = (self._emit("reciprocal", rest[0]), first), "mul"
            elif name == "sub" and self._is_number[rest[0]]:
                args, name = (first, self._emit("neg", rest[0])), "add"
            if name in _BOUNDS and self._is_number[args[1]]:
                name = _BOUNDS[name]
        out = self._new(is_number=is_number)
        tensors = sum(not self._is_number[arg] for arg in args)
        self._operations.append(Operation(name, args, out, (), tensors))
        return out

    def _reusing(self, op: Operation) -> Operation:
        """Put first the operand that may be overwritten, where the order is free."""
        if op.name in _COMMUTATIVE and op.num_tensors == len(op.args) == 2:
            first, second = op.args
            if second in op.dead and first not in op.dead:
                return op._replace(args=(second, first))
        return op

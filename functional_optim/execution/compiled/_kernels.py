"""Compiled passes over units, made once for a kind of transform."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from functional_optim.core._value_class import same_value
from functional_optim.execution.compiled._constants import as_tensors, lifted
from functional_optim.execution.compiled._tracing import example_of, traced

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from functional_optim.core._context import ReduceOp
    from functional_optim.core._transform import Transform
    from functional_optim.execution.compiled._constants import Number
    from functional_optim.execution.compiled._tracing import Graph

Compiler: TypeAlias = "Callable[[Graph], Callable[[list[Tensor]], Any]]"
"""Makes code of a graph; or raises, if it cannot."""


class Code:
    """One pass over units: first what follows from numbers, then every unit."""

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        long: list[Tensor],
        short: list[Tensor],
        compiler: Compiler,
    ) -> None:
        self._graph = graph = traced(function, long, short)
        self._prologue = compiler(graph.prologue)
        self._kernel = compiler(graph.kernel)
        self._takes_all = graph.long == list(range(len(long)))
        self._check(long, short)

    def _check(self, long: list[Tensor], short: list[Tensor]) -> None:
        """Let the code do what its graph does once, and compare."""
        examples = [example_of(x, place + 1) for place, x in enumerate(long)]
        found = [short[place] for place in self._graph.short]
        module = self._graph.prologue.module
        told = module(*found)
        others = [0.7 * x + 0.17 if x.is_floating_point() else x for x in found]
        for numbers in (found, others):  # Those of now may be zeros.
            if not all(map(_is_close, self._prologue([*numbers]), module(*numbers))):
                # Compilers keep float32 numbers in doubles: here that would be seen.
                self._prologue = lambda inputs: module(*inputs)
        inputs = [examples[place] for place in self._graph.long]
        crossing = told[: self._graph.told]
        wanted = [x.clone() for x in inputs]
        results = self._graph.kernel.module(*wanted, *crossing)
        late = self(examples, self.numbers(short)[0])
        pairs = zip([*inputs, *late], [*wanted, *results], strict=True)
        if not all(_is_close(a, b) for a, b in pairs):
            raise RuntimeError("the compiler's code computes something else")

    def numbers(self, short: list[Tensor]) -> tuple[Any, Any]:
        """Return what the kernel needs to know, and results that do not need it."""
        found = self._prologue([short[place] for place in self._graph.short])
        return found[: self._graph.told], found[self._graph.told :]

    def __call__(self, long: list[Tensor], crossing: Sequence[Tensor]) -> Any:
        """Run on a unit; returns those results that it takes the unit to know."""
        if not self._takes_all:
            long = [long[place] for place in self._graph.long]
        return self._kernel([*long, *crossing])

    def results(self, late: Sequence[Tensor], early: Sequence[Tensor]) -> list[Tensor]:
        """Return all results in order."""
        of_kernel, of_numbers = iter(late), iter(early)
        return [
            next(of_kernel) if is_late else next(of_numbers)
            for is_late in self._graph.results
        ]


def _is_close(some: Tensor, others: Tensor) -> bool:
    """Whether numbers are the same but for rounding, of the largest among them."""
    a, b = some.double(), others.double()
    size = b.abs().nan_to_num(0.0, 0.0, 0.0).amax() if b.numel() else 0.0
    bound = _BOUNDS.get(some.dtype, 0.1)
    return torch.allclose(a, b, rtol=bound, atol=float(size) * bound, equal_nan=True)


_BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-4}
"""Far more than rounding, far less than another formula."""


class Library:
    """The code of an optimizer, made when it is first needed, for all its buckets."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.kinds: list[Any] = []
        self.failures: dict[int, str] = {}
        self._codes: dict[Hashable, tuple[Code, ReduceOp]] = {}

    def code(
        self, key: Hashable, make: Callable[[], tuple[Code, ReduceOp]]
    ) -> tuple[Code, ReduceOp]:
        """Return code by its key; made if there is none."""
        with _lock:  # Tracing and compiling keep what they know in one place.
            if key not in self._codes:
                if len(self._codes) >= _MOST:
                    raise RuntimeError(
                        f"this would be the code of a step of kind {_MOST + 1}"
                    )
                self._codes[key] = make()
            return self._codes[key]


_lock = threading.RLock()

_MOST = 128
"""Where every step is of another kind, compiling takes longer than it saves."""


class Codes:
    """The code of a bucket."""

    def __init__(self, library: Library) -> None:
        self.library, self.failure = library, ""
        self._numbers: tuple[tuple[Number, ...], list[Tensor]] = ((), [])

    def kind_of(self, transform: Transform, like: Tensor) -> tuple[int, list[Tensor]]:
        """Return which kind of transform it is, and its numbers as tensors."""
        kind, found = lifted(transform)
        numbers = tuple(found)
        if not same_value(numbers, self._numbers[0], tensors="identity"):
            self._numbers = numbers, as_tensors(numbers, like)
        kinds = self.library.kinds
        for index, other in enumerate(kinds):
            if same_value(other, kind, tensors="identity"):
                self.failure = self.library.failures.get(index, "")
                return index, self._numbers[1]
        if len(kinds) >= _MOST:  # Each step would look through more of them.
            self.failure = f"it is the transform of kind {_MOST + 1}"
            return len(kinds), self._numbers[1]
        kinds.append(kind)
        return len(kinds) - 1, self._numbers[1]

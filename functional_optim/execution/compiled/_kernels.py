"""Compile the passes of an update, once for a kind of transform."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from functional_optim.core._value_class import same_value
from functional_optim.execution.compiled._constants import as_tensors, split_constants
from functional_optim.execution.compiled._tracing import example_of, traced

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from functional_optim.core._context import ReduceOp
    from functional_optim.core._transform import Transform
    from functional_optim.execution.compiled._constants import Number
    from functional_optim.execution.compiled._tracing import Graph

Compiler: TypeAlias = "Callable[[Graph], Callable[[list[Tensor]], Any]]"
"""Compiles a graph, or raises."""

_MOST = 128
"""Where every step is of another kind, compiling takes longer than it saves."""

_BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-4}
"""Far more than rounding, far less than another formula."""

_lock = threading.RLock()


class CompiledPass:
    """One pass over units: a prologue on single numbers, a kernel on every unit."""

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
        """Compare compiled code with its graph on examples."""
        examples = [example_of(x, place + 1) for place, x in enumerate(long)]
        numbers = [short[place] for place in self._graph.short]
        module = self._graph.prologue.module
        expected = module(*numbers)
        others = [0.7 * x + 0.17 if x.is_floating_point() else x for x in numbers]
        for given in (numbers, others):  # Those of now may be zeros.
            if not all(map(_is_close, self._prologue([*given]), module(*given))):
                # Compilers keep float32 numbers in doubles: here that would be seen.
                self._prologue = lambda inputs: module(*inputs)
        inputs = [examples[place] for place in self._graph.long]
        wanted = [x.clone() for x in inputs]
        results = self._graph.kernel.module(
            *wanted, *expected[: self._graph.num_crossing]
        )
        late = self(examples, self.run_prologue(short)[0])
        pairs = zip([*inputs, *late], [*wanted, *results], strict=True)
        if not all(_is_close(a, b) for a, b in pairs):
            raise RuntimeError("the compiler's code computes something else")

    def run_prologue(self, short: list[Tensor]) -> tuple[Any, Any]:
        """Return the numbers that the kernel takes, and the results that are known."""
        results = self._prologue([short[place] for place in self._graph.short])
        return results[: self._graph.num_crossing], results[self._graph.num_crossing :]

    def __call__(self, long: list[Tensor], crossing: Sequence[Tensor]) -> Any:
        """Run the kernel on a unit; return its results."""
        if not self._takes_all:
            long = [long[place] for place in self._graph.long]
        return self._kernel([*long, *crossing])

    def merge_results(
        self, late: Sequence[Tensor], early: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the results of kernel and prologue in order."""
        of_kernel, of_prologue = iter(late), iter(early)
        return [
            next(of_kernel) if is_late else next(of_prologue)
            for is_late in self._graph.is_late
        ]


def _is_close(some: Tensor, others: Tensor) -> bool:
    """Whether numbers are equal up to rounding of the largest among them."""
    a, b = some.double(), others.double()
    size = b.abs().nan_to_num(0.0, 0.0, 0.0).amax() if b.numel() else 0.0
    bound = _BOUNDS.get(some.dtype, 0.1)
    return torch.allclose(a, b, rtol=bound, atol=float(size) * bound, equal_nan=True)


class KernelCache:
    """The compiled passes of an optimizer, shared by its buckets."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.kinds: list[Any] = []
        self.failures: dict[int, str] = {}
        self._passes: dict[Hashable, tuple[CompiledPass, ReduceOp]] = {}

    def get(
        self, key: Hashable, make: Callable[[], tuple[CompiledPass, ReduceOp]]
    ) -> tuple[CompiledPass, ReduceOp]:
        """Return the pass of a key, compiled at its first use."""
        with _lock:  # Tracing and compiling keep what they know in one place.
            if key not in self._passes:
                if len(self._passes) >= _MOST:
                    raise RuntimeError(
                        f"this would be the code of a step of kind {_MOST + 1}"
                    )
                self._passes[key] = make()
            return self._passes[key]


class BucketKernels:
    """The compiled code of one bucket."""

    def __init__(self, cache: KernelCache) -> None:
        self.cache, self.failure = cache, ""
        self._numbers: tuple[tuple[Number, ...], list[Tensor]] = ((), [])

    def kind_of(self, transform: Transform, like: Tensor) -> tuple[int, list[Tensor]]:
        """Return the kind of a transform, and its numbers as tensors."""
        kind, found = split_constants(transform)
        numbers = tuple(found)
        if not same_value(numbers, self._numbers[0], tensors="identity"):
            self._numbers = numbers, as_tensors(numbers, like)
        kinds = self.cache.kinds
        same = (
            index
            for index, other in enumerate(kinds)
            if same_value(other, kind, tensors="identity")
        )
        index = next(same, len(kinds))
        if index >= _MOST:  # Each step would look through more of them.
            self.failure = f"it is the transform of kind {_MOST + 1}"
        else:
            if index == len(kinds):
                kinds.append(kind)
            self.failure = self.cache.failures.get(index, "")
        return index, self._numbers[1]

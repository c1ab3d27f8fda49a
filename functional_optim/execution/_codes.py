"""Compiled passes over units, made once for a kind of transform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from functional_optim._value import same_for_good
from functional_optim.execution._lifting import lifted
from functional_optim.execution._tracing import traced

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from functional_optim._context import ReduceOp
    from functional_optim._types import Transform
    from functional_optim.execution._lifting import Number
    from functional_optim.execution._tracing import Graph

Compiler: TypeAlias = "Callable[[Graph], Callable[[list[Tensor]], Any]]"
"""Makes code of a graph; or raises, if it cannot."""


class Code:
    """One pass over units: first what follows from numbers, then every unit.

    Args:
        function: What it does, a function of tensors.
        long: Its first inputs, for one of the units.
        short: Its other inputs.
        compiler: Makes the code.

    Raises:
        Exception: no code can be made.
    """

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
        """Return all results in order.

        Args:
            late: Those of the kernel.
            early: Those that it did not take.
        """
        of_kernel, of_numbers = iter(late), iter(early)
        return [
            next(of_kernel) if is_late else next(of_numbers)
            for is_late in self._graph.results
        ]


class Codes:
    """The code of a bucket, made when it is first needed.

    Args:
        compiler: Makes it.

    Attributes:
        compiler: Makes it.
        failure: Why this bucket runs without; empty if it does not.
    """

    def __init__(self, compiler: Compiler) -> None:
        self.compiler, self.failure = compiler, ""
        self._kinds: list[Any] = []
        self._codes: dict[Hashable, tuple[Code, ReduceOp]] = {}
        self._numbers: tuple[tuple[Number, ...], list[Tensor]] = ((), [])

    def kind_of(self, transform: Transform, like: Tensor) -> tuple[int, list[Tensor]]:
        """Return which kind of transform it is, and its numbers as tensors.

        Args:
            transform: The transform, resolved.
            like: A tensor on the device of the bucket.
        """
        kind, found = lifted(transform)
        numbers = tuple(found)
        if not same_for_good(numbers, self._numbers[0]):
            tensors = [
                number
                if isinstance(number, Tensor)
                else torch.tensor(number, dtype=torch.float64, device=like.device)
                for number in numbers
            ]
            self._numbers = numbers, tensors
        for index, other in enumerate(self._kinds):
            if same_for_good(other, kind):
                return index, self._numbers[1]
        self._kinds.append(kind)
        return len(self._kinds) - 1, self._numbers[1]

    def code(
        self, key: Hashable, make: Callable[[], tuple[Code, ReduceOp]]
    ) -> tuple[Code, ReduceOp]:
        """Return code by its key; made if there is none.

        Raises:
            Exception: it cannot be made.
        """
        if key not in self._codes:
            self._codes[key] = make()
        return self._codes[key]

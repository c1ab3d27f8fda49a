"""Many small tensors, copied to and from one piece of memory."""

from __future__ import annotations

import functools
import itertools
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functional_optim._tensors import are_plain
from functional_optim.execution._memory import carved
from functional_optim.execution._native import native

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Written:
    """Counts that tensors were written, so that autograd sees it.

    Args:
        tensors: The tensors.
        compiles: Whether to count by compiled code where that works.
    """

    def __init__(self, tensors: list[Tensor], *, compiles: bool) -> None:
        self._tensors, self._compiles = tensors, compiles
        self._objects = array("q", map(id, tensors))

    def count(self) -> None:
        """Count them once more."""
        if self._compiles:
            try:
                count = _functions()[2]
            except Exception:
                self._compiles = False
            else:
                objects, offset = self._objects.buffer_info(), native().offset
                if count(objects[0], offset, objects[1]):
                    return
        torch.autograd.graph.increment_version(self._tensors)


class Places(NamedTuple):
    """Where tensors lie.

    Attributes:
        everywhere: Addresses, of others, too.
        members: Which of them are meant, in order.
    """

    everywhere: array[int]
    members: array[int]


class Gathered:
    """One piece of memory for the elements of many tensors, one after the other.

    Args:
        memory: The memory, one-dimensional.
        shapes: The shapes of the tensors.
        compiles: Whether to copy by compiled code where that works.

    Attributes:
        memory: The memory.
    """

    def __init__(
        self, memory: Tensor, shapes: Sequence[torch.Size], *, compiles: bool
    ) -> None:
        self.memory = memory
        self._views = carved(memory, shapes)
        self._compiles = compiles and memory.is_cpu
        self._numels = [shape.numel() for shape in shapes]
        self._address = memory.data_ptr()
        sizes = [n * memory.itemsize for n in self._numels]
        self._starts = array("q", itertools.accumulate(sizes, initial=0))

    def gather(self, tensors: list[Tensor], places: Places | None = None) -> None:
        """Copy tensors to here.

        Args:
            tensors: The tensors, of the dtype of the memory.
            places: Where they lie, if that is known; see `places_of`.
        """
        if not self._numels:
            return
        if places is None and self._compiles:
            places = places_of(tensors)
            if list(map(Tensor.numel, tensors)) != self._numels:
                places = None  # torch says what is wrong, and reads nothing beyond.
        if places is None or not self.gather_from(places):
            torch._foreach_copy_(self._views, tensors)

    def gather_from(self, places: Places) -> bool:
        """Copy what lies at some places to here.

        Args:
            places: The places, of as many elements as belong here.

        Returns:
            Whether that was possible.
        """
        functions = self._functions()
        return bool(functions and functions[0](*self._arguments(places)))

    def scatter(self, tensors: list[Tensor], places: Places | None) -> bool:
        """Copy what is here to tensors.

        Args:
            tensors: The tensors, of the dtype of the memory.
            places: Where they lie; None if they cannot be written by address.

        Returns:
            Whether autograd has seen it.
        """
        if not self._numels:
            return True
        functions = self._functions()
        if functions is None or places is None:
            torch._foreach_copy_(tensors, self._views)
            return True
        functions[1](*self._arguments(places))
        return False

    def _functions(self) -> tuple[Any, Any, Any] | None:
        if self._compiles:
            try:
                return _functions()
            except Exception:
                self._compiles = False
        return None

    def _arguments(self, places: Places) -> tuple[int, ...]:
        return (
            self._address,
            places.everywhere.buffer_info()[0],
            places.members.buffer_info()[0],
            self._starts.buffer_info()[0],
            len(self._numels),
            torch.get_num_threads(),
        )


@functools.cache
def _functions() -> tuple[Any, Any, Any]:
    """Return what gathers, what scatters, and what counts as written.

    Raises:
        Exception: they cannot be compiled.
    """
    library = native()
    return (
        library.function("gather", "ppppii"),
        library.function("scatter", "ppppii"),
        library.function("count_as_written", "pii"),
    )


def places_of(tensors: Iterable[Tensor]) -> Places | None:
    """Return the addresses of tensors; None if one is not plain and contiguous."""
    found = list(tensors)
    if (
        not all(map(Tensor.is_contiguous, found))
        or any(map(Tensor.is_neg, found))
        or not are_plain(found)
    ):
        return None
    places = array("q", map(Tensor.data_ptr, found))
    if 0 in places:  # There is no memory behind torch's zeros.
        return None
    return Places(places, array("q", range(len(places))))

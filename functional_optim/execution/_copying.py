"""Many small tensors, copied to and from one piece of memory."""

from __future__ import annotations

import ctypes
import functools
import importlib
from array import array
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._tensors import are_plain
from functional_optim.execution._memory import carved

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_SOURCE = """
#include <cstdint>
#include <cstring>

extern "C" void gather(
    char* to, const int64_t* from, const int64_t* bytes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to, reinterpret_cast<const char*>(from[i]), bytes[i]);
    to += bytes[i];
  }
}

extern "C" void scatter(
    const char* from, const int64_t* to, const int64_t* bytes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(reinterpret_cast<char*>(to[i]), from, bytes[i]);
    from += bytes[i];
  }
}
"""
"""torch copies a list tensor by tensor: a microsecond each where memory is cold, five
times as much as the copy itself."""


@functools.cache
def _library() -> Any:
    """Return the functions above as code.

    Raises:
        Exception: no code can be made.
    """
    # Imported when it is needed: it takes a second.
    cache = importlib.import_module("torch._inductor.codecache").CppCodeCache
    library: Any = cache.load(_SOURCE)
    for function in (library.gather, library.scatter):
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64]
        function.restype = None
    return library


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
        self._sizes = array("q", [n * memory.itemsize for n in self._numels])

    def gather(self, tensors: list[Tensor], places: array[int] | None = None) -> None:
        """Copy tensors to here.

        Args:
            tensors: The tensors, of the dtype of the memory.
            places: Where they lie, if that is known; see `places_of`.
        """
        library = self._library()
        if library is not None and places is None:
            places = places_of(tensors)
            if list(map(Tensor.numel, tensors)) != self._numels:
                places = None  # torch says what is wrong, and reads nothing beyond.
        if library is None or places is None:
            torch._foreach_copy_(self._views, tensors)
        else:
            library.gather(*self._arguments(places))

    def scatter(self, tensors: list[Tensor], places: array[int] | None) -> None:
        """Copy what is here to tensors.

        Args:
            tensors: The tensors, of the dtype of the memory.
            places: Where they lie; None if they cannot be written by address.
        """
        library = self._library()
        if library is None or places is None:
            torch._foreach_copy_(tensors, self._views)
        else:
            library.scatter(*self._arguments(places))
            torch.autograd.graph.increment_version(tensors)

    def _library(self) -> Any:
        if self._compiles:
            try:
                return _library()
            except Exception:
                self._compiles = False
        return None

    def _arguments(self, places: array[int]) -> tuple[int, int, int, int]:
        address, count = places.buffer_info()
        return self.memory.data_ptr(), address, self._sizes.buffer_info()[0], count


def places_of(tensors: Iterable[Tensor]) -> array[int] | None:
    """Return the addresses of tensors; None if one is not plain and contiguous."""
    found = list(tensors)
    if (
        not all(map(Tensor.is_contiguous, found))
        or any(map(Tensor.is_neg, found))
        or not are_plain(found)
    ):
        return None
    places = array("q", map(Tensor.data_ptr, found))
    return None if 0 in places else places  # There is no memory behind torch's zeros.

"""The functions of `native.cpp`, compiled when they are first needed."""

from __future__ import annotations

import ctypes
import functools
import importlib
import pathlib
import sys
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from functional_optim._messages import first_line

_WORD = ctypes.sizeof(ctypes.c_void_p)


class Native:
    """The functions; what they do stands in `native.cpp`.

    Raises:
        Exception: there is no compiler, or tensors do not look as expected.

    Attributes:
        offset: Where a Python tensor keeps the address of its implementation, in bytes.
    """

    def __init__(self) -> None:
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            msg = "without the interpreter's lock others may take gradients away"
            raise RuntimeError(msg)
        # Imported when it is needed: it takes a second.
        cache = importlib.import_module("torch._inductor.codecache").CppCodeCache
        source = pathlib.Path(__file__).with_name("native.cpp").read_text("utf-8")
        path = cache.load(source, extra_flags=("-lc10",))._name
        self._library = ctypes.PyDLL(path)  # It keeps the lock during a call.
        self.offset = _offset_of_implementation()
        self.scan = self._function("scan", "piiipppp")
        self.gather = self._function("gather", "pppii")
        self.scatter = self._function("scatter", "pppii")
        self.gather_grads = self._function("gather_grads", "ppipppii")
        self.bump_versions = self._function("bump_versions", "pii")
        self.has_values = self._function("has_values", "oo")

    def _function(self, name: str, arguments: str) -> Callable[..., int]:
        """Return a function.

        Args:
            name: Its name.
            arguments: A letter for each: `p` an address, `i` an integer, `o` an object.
        """
        function = getattr(self._library, name)
        function.argtypes = [_TYPES[letter] for letter in arguments]
        function.restype = ctypes.c_int64
        found: Callable[..., int] = function
        return found


_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "o": ctypes.py_object,
}


@functools.cache
def native() -> Native | str:
    """Return the functions, or why there are none; tried once in a process."""
    try:
        return Native()
    except Exception as error:
        return first_line(error)


def address(numbers: array[int]) -> int:
    """Return where the numbers of an array lie."""
    return numbers.buffer_info()[0]


def _offset_of_implementation() -> int:
    """Return where a Python tensor keeps the address of its implementation, in bytes.

    Raises:
        RuntimeError: there is no such place, or several.
    """
    if sys.implementation.name != "cpython":
        msg = "the addresses of objects are known in CPython only"
        raise RuntimeError(msg)
    examples = [torch.zeros(()), torch.zeros(2, 3).t(), Parameter(torch.ones(5))]
    found = [
        offset
        for offset in range(0, Tensor.__basicsize__ - _WORD + 1, _WORD)
        if all(_word(id(x) + offset) == x._cdata for x in examples)
    ]
    if len(found) != 1:
        msg = f"the implementation of a tensor may lie at {found}"
        raise RuntimeError(msg)
    return found[0]


def _word(place: int) -> int | None:
    return ctypes.c_void_p.from_address(place).value

"""The functions of `native.cpp`, compiled when they are first needed."""

from __future__ import annotations

import ctypes
import functools
import importlib
import pathlib
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_WORD = ctypes.sizeof(ctypes.c_void_p)


class Native:
    """The functions, by name.

    Raises:
        Exception: there is no compiler, or tensors do not look as expected.
    """

    def __init__(self) -> None:
        # Imported when it is needed: it takes a second.
        cache = importlib.import_module("torch._inductor.codecache").CppCodeCache
        source = pathlib.Path(__file__).with_name("native.cpp").read_text("utf-8")
        path = cache.load(source, extra_flags=("-lc10",))._name
        # They read objects of Python, so none may run without its lock.
        self._library = ctypes.PyDLL(path)
        self.offset = _offset_of_implementation()

    def function(self, name: str, arguments: str) -> Any:
        """Return a function.

        Args:
            name: Its name.
            arguments: A letter for each: `p` a pointer or an address, `i` an integer,
                `o` an object.
        """
        function = getattr(self._library, name)
        function.argtypes = [_TYPES[letter] for letter in arguments]
        function.restype = ctypes.c_int64
        return function


_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "o": ctypes.py_object,
}


@functools.cache
def native() -> Native:
    """Return the functions; made once in a process.

    Raises:
        Exception: they cannot be made.
    """
    return Native()


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


def _word(address: int) -> int | None:
    return ctypes.c_void_p.from_address(address).value

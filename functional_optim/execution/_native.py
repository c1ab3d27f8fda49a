"""The functions of `native.cpp`, compiled when they are first needed."""

from __future__ import annotations

import ctypes
import functools
import importlib
import pathlib
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from functional_optim._messages import first_line

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap

_WORD = ctypes.sizeof(ctypes.c_void_p)


class Native:
    """The functions; what they do stands in `native.cpp`."""

    def __init__(self) -> None:
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            raise RuntimeError(
                "without the interpreter's lock others may take gradients away"
            )
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
        """Return a function."""
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
    """Return the offset of the address of the implementation in a Python tensor."""
    if sys.implementation.name != "cpython":
        raise RuntimeError("the addresses of objects are known in CPython only")
    examples = [torch.zeros(()), torch.zeros(2, 3).t(), Parameter(torch.ones(5))]
    found = [
        offset
        for offset in range(0, Tensor.__basicsize__ - _WORD + 1, _WORD)
        if all(_word(id(x) + offset) == x._cdata for x in examples)
    ]
    if len(found) != 1:
        raise RuntimeError(f"the implementation of a tensor may lie at {found}")
    return found[0]


def _word(place: int) -> int | None:
    return ctypes.c_void_p.from_address(place).value


# The same numbers stand in native.cpp.
_MOVED, _CHANGED, _ODD, _FAILED = 1, 2, 4, 8

_DTYPES = 128


class Gradients(Mapping[str, Tensor]):
    """The gradients of parameters by name, looked up when somebody asks."""

    __slots__ = ("_count", "_params", "dtypes", "objects", "places")

    def __init__(
        self,
        params: TensorMap,
        dtypes: Mapping[str, torch.dtype | None],
        objects: array[int],
        places: array[int],
    ) -> None:
        self._params, self.dtypes = params, dtypes
        self.objects, self.places = objects, places
        self._count = len(dtypes) - list(dtypes.values()).count(None)

    def __getitem__(self, name: str) -> Tensor:
        """Return a gradient."""
        grad = self._params[name].grad
        if grad is not None:
            return grad
        if self.dtypes[name] is not None:
            raise RuntimeError(
                f"the gradient of {name!r} was set to None during the step"
            )
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.dtypes.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return (name for name, dtype in self.dtypes.items() if dtype is not None)

    def __len__(self) -> int:
        return self._count


def dtype_of(grads: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Return the dtype of a gradient, without a look at it where that is known."""
    dtype = grads.dtypes[name] if isinstance(grads, Gradients) else None
    return grads[name].dtype if dtype is None else dtype


class GradientScan:
    """Looks at parameters and gradients."""

    def __init__(self, params: TensorMap, native: Native) -> None:
        self._native, self._params = native, params
        tensors = list(params.values())
        count = len(tensors)
        self._objects = array("q", map(id, tensors))
        self._places, self._shapes = array("q", [0] * count), array("q", [0] * count)
        self._grads, self._given = array("q", [0] * count), array("b", [0] * count)
        failed = self._told() & _FAILED
        shapes = [2 * x.numel() + x.is_contiguous() for x in tensors]
        if (
            failed
            or self._places.tolist() != list(map(Tensor.data_ptr, tensors))
            or [shape // _DTYPES for shape in self._shapes] != shapes
        ):
            raise RuntimeError("compiled code does not see the parameters")
        self._found: Gradients | None = None
        self.moved = False

    def _told(self) -> int:
        arrays = self._places, self._shapes, self._grads, self._given
        return self._native.scan(
            address(self._objects),
            self._native.offset,
            len(self._objects),
            torch.get_num_threads(),
            *map(address, arrays),
        )

    def scan(self) -> Gradients | None:
        """Return the gradients; None if one is not as its parameter, or all failed."""
        told = self._told()
        self.moved = bool(told & (_MOVED | _FAILED))
        if told & (_ODD | _FAILED):
            self._found = None
            return None
        if self._found is None or told & _CHANGED:
            pairs = zip(self._params.items(), self._given, strict=True)
            dtypes = {name: p.dtype if given else None for (name, p), given in pairs}
            self._found = Gradients(self._params, dtypes, self._objects, self._grads)
        return self._found

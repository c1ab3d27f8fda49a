"""Where parameters and their gradients lie, asked at every step by compiled code."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.execution._native import native

if TYPE_CHECKING:
    from functional_optim._types import TensorMap

_MOVED, _CHANGED, _ODD, _FAILED = 1, 2, 4, 8


class Gradients(Mapping[str, Tensor]):
    """The gradients of parameters by name, looked up when somebody asks.

    Args:
        params: The parameters by name.
        kinds: The dtype of the gradient of each, None where there is none. As long as
            nothing changes it is the same object.
        places: Where the gradients lie, in this order; 0 for what is not one piece of
            memory.
    """

    __slots__ = ("_count", "_params", "kinds", "places")

    def __init__(
        self,
        params: TensorMap,
        kinds: Mapping[str, torch.dtype | None],
        places: array[int],
    ) -> None:
        self._params, self.kinds, self.places = params, kinds, places
        self._count = len(kinds) - list(kinds.values()).count(None)

    def __getitem__(self, name: str) -> Tensor:
        """Return a gradient.

        Raises:
            KeyError: there is none.
        """
        grad = self._params[name].grad
        if grad is None:
            raise KeyError(name)
        return grad

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.kinds.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return (name for name, kind in self.kinds.items() if kind is not None)

    def __len__(self) -> int:
        return self._count


def dtype_of(grads: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Return the dtype of a gradient, without a look at it where that is known."""
    kind = grads.kinds[name] if isinstance(grads, Gradients) else None
    return grads[name].dtype if kind is None else kind


class Scan:
    """Looks at parameters and gradients.

    Args:
        params: Parameters by name. They are kept alive.

    Raises:
        Exception: it cannot be compiled, or sees something else than Python.
    """

    def __init__(self, params: TensorMap) -> None:
        library = native()
        self._scan = library.function("scan", "piiipppp")
        self._params, tensors = params, list(params.values())
        count = len(tensors)
        self._objects = array("q", map(id, tensors))
        self._places, self._shapes = array("q", [0] * count), array("q", [0] * count)
        self._grads, self._given = array("q", [0] * count), array("b", [0] * count)
        self._arguments = (
            _address(self._objects),
            library.offset,
            count,
            torch.get_num_threads(),
            *map(_address, (self._places, self._shapes, self._grads, self._given)),
        )
        failed = self._scan(*self._arguments) & _FAILED
        shapes = [2 * x.numel() + x.is_contiguous() for x in tensors]
        if (
            failed
            or self._places.tolist() != list(map(Tensor.data_ptr, tensors))
            or self._shapes.tolist() != shapes
        ):
            msg = "compiled code does not see the parameters"
            raise RuntimeError(msg)
        self._found: Gradients | None = None
        self.moved = False
        """Whether parameters lie elsewhere, or otherwise, than at the last look."""

    def look(self) -> Gradients | None:
        """Return the gradients; None if one is not as its parameter, or all failed."""
        told = self._scan(*self._arguments)
        self.moved = bool(told & (_MOVED | _FAILED))
        if told & (_ODD | _FAILED):
            self._found = None
            return None
        if self._found is None or told & _CHANGED:
            kinds = {
                name: param.dtype if given else None
                for (name, param), given in zip(
                    self._params.items(), self._given, strict=True
                )
            }
            self._found = Gradients(self._params, kinds, self._grads)
        return self._found


def has_values() -> Callable[[Any, Any], int]:
    """Return a function that tells whether dicts in a dict have these values, in order.

    Raises:
        Exception: it cannot be compiled.
    """
    function: Callable[[Any, Any], int] = native().function("has_values", "oo")
    return function


def _address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]

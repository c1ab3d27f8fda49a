"""Many small tensors, copied to and from one piece of memory."""

from __future__ import annotations

import itertools
from array import array
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from functional_optim.algebra._tensor_map import are_plain
from functional_optim.execution._native import Native, address, native
from functional_optim.execution._tensor_memory import carved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from functional_optim.execution._scanning import Gradients


def _native(*, wanted: bool) -> Native | None:
    # What follows torch's operations, as make_fx does, would not see it.
    found = native() if wanted and not is_in_torch_dispatch_mode() else None
    return found if isinstance(found, Native) else None


class Versions:
    """Counts that tensors were written, so that autograd sees it.

    Args:
        tensors: The tensors.
        compiles: Whether to count by compiled code where that works.
    """

    def __init__(self, tensors: list[Tensor], *, compiles: bool) -> None:
        self._tensors, self._compiles = tensors, compiles
        self._objects = array("q", map(id, tensors))

    def bump(self) -> None:
        """Count once more."""
        code = _native(wanted=self._compiles)
        count = len(self._tensors)
        if code is None or not code.bump_versions(
            address(self._objects), code.offset, count
        ):
            torch.autograd.graph.increment_version(self._tensors)


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
        self._place = memory.data_ptr()
        sizes = [n * memory.itemsize for n in self._numels]
        self._starts = array("q", itertools.accumulate(sizes, initial=0))

    def gather(self, tensors: list[Tensor], places: array[int] | None = None) -> None:
        """Copy tensors to here.

        Args:
            tensors: The tensors, of the dtype of the memory.
            places: Where they lie, if that is known; see `places_of`.
        """
        if not self._numels:
            return
        code = _native(wanted=self._compiles)
        if places is None and code is not None:
            places = places_of(tensors)
            if list(map(Tensor.numel, tensors)) != self._numels:
                places = None  # torch says what is wrong, and reads nothing beyond.
        if places is None or code is None:
            torch._foreach_copy_(self._views, tensors)
        else:
            code.gather(self._place, address(places), *self._sizes())

    def gather_grads(self, grads: Gradients, members: array[int]) -> bool:
        """Copy gradients to here by their addresses.

        Args:
            grads: Gradients of all parameters.
            members: The places of those that belong here among them.

        Returns:
            Whether that was possible: all lie in one piece, where they were found.
        """
        code = _native(wanted=self._compiles)
        return code is not None and bool(
            code.gather_grads(
                self._place,
                address(grads.objects),
                code.offset,
                address(grads.places),
                address(members),
                *self._sizes(),
            )
        )

    def scatter(self, tensors: list[Tensor], places: array[int] | None) -> bool:
        """Copy what is here to tensors.

        Args:
            tensors: The tensors, of the dtype of the memory.
            places: Where they lie; None if they cannot be written by address.

        Returns:
            Whether autograd has seen it.
        """
        if not self._numels:
            return True
        code = _native(wanted=self._compiles)
        if places is None or code is None:
            torch._foreach_copy_(tensors, self._views)
            return True
        code.scatter(self._place, address(places), *self._sizes())
        return False

    def _sizes(self) -> tuple[int, int, int]:
        return address(self._starts), len(self._numels), torch.get_num_threads()


def places_of(tensors: list[Tensor]) -> array[int] | None:
    """Return the addresses of tensors; None if one is not plain and contiguous."""
    if (
        not all(map(Tensor.is_contiguous, tensors))
        or any(map(Tensor.is_neg, tensors))
        or not are_plain(tensors)
    ):
        return None
    places = array("q", map(Tensor.data_ptr, tensors))
    if any(not place and x.numel() for place, x in zip(places, tensors, strict=True)):
        return None  # There is no memory behind torch's zeros.
    return places

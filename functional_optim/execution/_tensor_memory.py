"""Tensors as one-dimensional memory: views, copies, scratch."""

from __future__ import annotations

import itertools
import math
import weakref
from array import array
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from functional_optim.algebra._tensor_map import are_plain
from functional_optim.execution._native import Native, address, native

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from functional_optim.execution._native import Gradients


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order.

    Example:
        >>> is_dense(torch.zeros(2, 3).t()), is_dense(torch.zeros(4)[::2])
        (True, False)
    """
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def unalias(tensors: Sequence[Tensor], taken: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors that can be written one by one: copies of those that share memory.

    Example:
        >>> zero = torch.zeros(2)
        >>> a, b = unalias([zero, zero], [])
        >>> a is zero, b is zero
        (True, False)
    """
    seen = {storage_ptr(tensor) for tensor in taken if tensor.numel()}
    found = []
    for tensor in tensors:
        has_memory = tensor.numel() > 0 and not tensor.is_meta
        shared = has_memory and (storage_ptr(tensor) in seen or not is_dense(tensor))
        own = tensor.clone() if shared else tensor
        seen.add(storage_ptr(own))
        found.append(own)
    return found


def storage_ptr(tensor: Tensor) -> int:
    """Return what tells whether two tensors lie in the same memory."""
    own = getattr(tensor, "_local_tensor", tensor)  # A DTensor has no memory itself.
    return int(own.untyped_storage().data_ptr())


def flat(tensor: Tensor) -> Tensor:
    """Return a dense tensor as one dimension, in the order of its memory; a view."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,))


def flat_like(tensor: Tensor, model: Tensor, where: slice) -> Tensor:
    """Return a slice of a tensor as one dimension, in the order of another's memory.

    A view where both lie alike; else a copy of that slice, and at most two rows more.

    Example:
        >>> turned = torch.zeros(3, 2).t()
        >>> flat_like(torch.tensor([[0, 1, 2], [3, 4, 5]]), turned, slice(1, 4))
        tensor([3, 1, 4])
    """
    if tensor.stride() == model.stride() or (
        tensor.is_contiguous() and model.is_contiguous()
    ):
        return flat(tensor)[where]
    strides = zip(model.stride(), model.shape, range(model.ndim), strict=True)
    order = [dim for _, _, dim in sorted(strides, reverse=True)]
    long = [dim for dim in order if model.shape[dim] != 1]
    rows = tensor.permute(order).reshape([model.shape[dim] for dim in long])
    start, stop, _ = where.indices(tensor.numel())
    row = max(1, math.prod(rows.shape[1:]))
    first = start // row
    found = rows[first : -(-stop // row)].reshape(-1)
    return found[start - first * row : stop - first * row]


def split_views(memory: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return consecutive views of one-dimensional memory in the given shapes.

    Example:
        >>> [v.shape for v in split_views(torch.zeros(7), [torch.Size([2, 3])])]
        [torch.Size([2, 3])]
    """
    views, start = [], 0
    for shape in shapes:
        views.append(memory[start : start + shape.numel()].view(shape))
        start += shape.numel()
    return views


def copied_alone(view: Tensor) -> Tensor:
    """Let a view be copied and pickled by itself; torch takes all memory behind it.

    Whoever copies one entry of a state would pay for those of all others. A subclass
    would say the same, but the compiler takes none.

    Example:
        >>> import copy
        >>> first = copied_alone(torch.zeros(1000)[:2])
        >>> copy.deepcopy(first).untyped_storage().nbytes()
        8
    """
    here: Any = weakref.ref(view)
    view.__dict__.update(
        __deepcopy__=lambda memo: memo.setdefault(id(here()), here().clone()),
        __reduce_ex__=lambda protocol: here().clone().__reduce_ex__(protocol),
    )
    return view


def relayout_like(entry: Tensor, param: Tensor) -> Tensor:
    """Return an entry of the state in memory of its own that lies like a parameter."""
    if entry.stride() == param.stride() and is_alone(entry):
        return entry
    return torch.empty_like(param, dtype=entry.dtype).copy_(entry)


def is_alone(tensor: Tensor) -> bool:
    """Whether a tensor is all that lies in its memory."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


class ScratchMemory:
    """Memory for gathered tensors: own buffers up to a budget, one for the rest."""

    def __init__(self, budget: int) -> None:
        self._left = budget
        self._shared: dict[tuple[torch.dtype, torch.device, str], Tensor] = {}

    def take(
        self, numel: int, like: Tensor, dtype: torch.dtype, use: str
    ) -> tuple[Tensor, bool]:
        """Return one-dimensional memory, and whether it belongs to the caller alone."""
        size = numel * dtype.itemsize
        if size <= self._left:
            self._left -= size
            return torch.empty(numel, dtype=dtype, device=like.device), True
        key = dtype, like.device, use
        known = self._shared.get(key)
        if known is None or known.numel() < numel:
            known = torch.empty(numel, dtype=dtype, device=like.device)
            self._shared[key] = known
        return known[:numel], False


def _native(*, wanted: bool) -> Native | None:
    # What follows torch's operations, as make_fx does, would not see it.
    found = native() if wanted and not is_in_torch_dispatch_mode() else None
    return found if isinstance(found, Native) else None


class VersionCounters:
    """Counts that tensors were written, so that autograd sees it."""

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


class GatherBuffer:
    """One piece of memory for the elements of many tensors, one after the other."""

    def __init__(
        self, memory: Tensor, shapes: Sequence[torch.Size], *, compiles: bool
    ) -> None:
        self.memory = memory
        self._views = split_views(memory, shapes)
        self._compiles = compiles and memory.is_cpu
        self._numels = [shape.numel() for shape in shapes]
        self._place = memory.data_ptr()
        sizes = [n * memory.itemsize for n in self._numels]
        self._starts = array("q", itertools.accumulate(sizes, initial=0))

    def gather(self, tensors: list[Tensor], places: array[int] | None = None) -> None:
        """Copy tensors to here."""
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
        """Copy gradients to here by their addresses."""
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
        """Copy what is here to tensors."""
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

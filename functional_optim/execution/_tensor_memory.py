"""Flat views and copies of tensors, and buffers that gather many small ones."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import are_plain
from functional_optim.execution._native import (
    ParameterGradients,
    dtype_of,
    operator_slices,
    operators,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from functional_optim.algebra._tensor_map import TensorMap


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
    """Return tensors that share no memory: copies of those that do.

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
    """Return the address of the storage, equal for tensors that share memory."""
    own = getattr(tensor, "_local_tensor", tensor)  # A DTensor has no memory itself.
    return int(own.untyped_storage().data_ptr())


def flat(tensor: Tensor) -> Tensor:
    """Return a dense tensor as one dimension, in the order of its memory; a view."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,))


def flat_like(tensor: Tensor, model: Tensor, where: slice) -> Tensor:
    """Return a slice of a flat tensor, in the order of another one's memory.

    A view where the strides are equal; else a copy of at most two rows more.

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
    """Return the view, now copied and pickled without the rest of its storage.

    A copy of one entry of a state would copy all others; a subclass is not compiled.

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
    """Return an entry in memory of its own, with the strides of a parameter."""
    if entry.stride() == param.stride() and is_alone(entry):
        return entry
    return torch.empty_like(param, dtype=entry.dtype).copy_(entry)


def is_alone(tensor: Tensor) -> bool:
    """Whether a tensor shares its storage with nothing."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


class ScratchMemory:
    """Memory for gathered tensors: exclusive up to a budget, then shared."""

    def __init__(self, budget: int) -> None:
        self._left = budget
        self._shared: dict[tuple[torch.dtype, torch.device, str], Tensor] = {}

    def take(
        self, numel: int, like: Tensor, dtype: torch.dtype, use: str
    ) -> tuple[Tensor, bool]:
        """Return one-dimensional memory, and whether it is exclusive to the caller."""
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


class GatherBuffer:
    """Memory for the elements of many small parameters, and of their gradients."""

    def __init__(
        self, params: TensorMap, scratch: ScratchMemory, *, compiles: bool = False
    ) -> None:
        self._names, self._tensors = list(params), list(params.values())
        self._shapes = [tensor.shape for tensor in self._tensors]
        self._numel = sum(map(Tensor.numel, self._tensors))
        self._scratch = scratch
        self.is_exclusive = True
        """Whether no other buffer uses this memory."""
        dtype = self._tensors[0].dtype
        self.params, self._param_views = self._take(dtype, "params")
        self.grads, self._grad_views = self._take(dtype, "grads")
        self._compiles = compiles and self.params.is_cpu and are_plain(self._tensors)
        self._parts: list[_BufferPart] = []

    def _take(self, dtype: torch.dtype, use: str) -> tuple[Tensor, list[Tensor]]:
        first = self._tensors[0]
        memory, is_exclusive = self._scratch.take(self._numel, first, dtype, use)
        self.is_exclusive = self.is_exclusive and is_exclusive
        return memory, split_views(memory, self._shapes)

    def gather(self, grads: Mapping[str, Tensor]) -> None:
        """Copy the parameters and their gradients."""
        dtype = dtype_of(grads, self._names[0])
        if dtype != self.grads.dtype:
            self.grads, self._grad_views = self._take(dtype, "grads")
            self._parts = []
        if isinstance(grads, ParameterGradients) and self._gather_natively(grads):
            return
        torch._foreach_copy_(self._param_views, self._tensors)
        torch._foreach_copy_(self._grad_views, [grads[name] for name in self._names])

    def _gather_natively(self, grads: ParameterGradients) -> bool:
        native = operators() if self._compiles else None
        if native is None:
            return False
        if not self._parts:
            params = [grads.params[name] for name in self._names]
            self._parts = _buffer_parts(params, self.params, self.grads)
        return all(native.gather(*part) for part in self._parts)

    def scatter(self) -> None:
        """Copy the gathered parameters back, and count the write."""
        native = operators() if self._parts else None
        parts = (part[:3] for part in self._parts)
        if native is None or not all(itertools.starmap(native.scatter, parts)):
            torch._foreach_copy_(self._tensors, self._param_views)


class _BufferPart(NamedTuple):
    """Some parameters of a buffer, and their part of its memory."""

    params: list[Tensor]
    starts: Tensor
    """The places of their first elements in this part, and its end."""
    memory: Tensor
    grad_memory: Tensor


def _buffer_parts(
    params: list[Tensor], memory: Tensor, grad_memory: Tensor
) -> list[_BufferPart]:
    """Return the parameters of a buffer in parts that operators take."""
    parts, start = [], 0
    for part in operator_slices(len(params)):
        some = params[part]
        starts = [0, *itertools.accumulate(map(Tensor.numel, some))]
        own = slice(start, start + starts[-1])
        places = torch.tensor(starts, device="cpu")
        parts.append(_BufferPart(some, places, memory[own], grad_memory[own]))
        start = own.stop
    return parts

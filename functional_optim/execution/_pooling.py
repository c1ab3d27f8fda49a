"""Small tensors updated as one: gathered before an update, and put back after it."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from functional_optim.execution._copying import Gathered, Versions, places_of
from functional_optim.execution._scanning import Gradients, dtype_of
from functional_optim.execution._state_tree import Kind
from functional_optim.execution._tensor_memory import carved, copied_alone
from functional_optim.execution._units import Unit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from functional_optim.core._transform import TensorMap
    from functional_optim.execution._state_tree import Node
    from functional_optim.execution._tensor_memory import Scratch
    from functional_optim.execution._units import Source


class Pooled(Unit):
    """Small parameters with equal histories, gathered into one flat tensor.

    Args:
        params: The parameters, detached.
        source: Where their state comes from. Entries are replaced by views.
        scratch: Where to gather.
        memory: Memory of which the first parameters are the first pieces; None if they
            lie elsewhere, and are gathered.
        compiles: Whether to copy by compiled code where that works.

    Attributes:
        laid: How many of them, from the first, need not be gathered.
    """

    kind: ClassVar[str] = "pool"
    pooled: ClassVar[bool] = True

    def __init__(
        self,
        params: TensorMap,
        source: Source,
        scratch: Scratch,
        memory: Tensor | None = None,
        *,
        compiles: bool = False,
    ) -> None:
        super().__init__(list(params), source)
        self._tensors = list(params.values())
        self._shapes = [param.shape for param in self._tensors]
        self._numel = sum(param.numel() for param in self._tensors)
        self._key, self._scratch, self._compiles = self.names[0], scratch, compiles
        first = self._tensors[0]
        self._own = True
        if memory is None:
            memory, self._own = scratch.take(self._numel, first, first.dtype, "params")
        self.laid, start = _laid_in(memory, self._tensors)
        laid = self.laid
        self._loose = self._tensors[laid:]
        self._all = Versions(self._tensors, compiles=compiles)
        self._laid = Versions(self._tensors[:laid], compiles=compiles)
        self._params = Gathered(memory[start:], self._shapes[laid:], compiles=compiles)
        self._places = places_of(self._loose) if memory.is_cpu else None
        self.params = {self._key: memory}
        self._grads = self._room(first.dtype)
        self._members: array[int] | None = None
        self._last: TensorMap | None = None
        own: list[Node] = []
        for node, field in zip(source.nodes, source.fields, strict=True):
            if not isinstance(node, dict):
                own.append(node)
            elif self._key not in node:
                own.append({})
            elif field.kind is Kind.ELEMENTWISE:
                own.append({self._key: self._joined(node)})
            else:
                own.append({self._key: node[self._key]})
        self._keep(source.template, own)

    def _joined(self, node: TensorMap) -> Tensor:
        """Bring the entries of all members into one flat tensor."""
        entries = [node[name] for name in self.names]
        memory = entries[0].new_empty(self._numel)
        views = carved(memory, self._shapes)
        torch._foreach_copy_(views, entries)
        node.update(zip(self.names, map(copied_alone, views), strict=True))
        return memory

    def updates(self, grads: Mapping[str, Tensor], *, again: bool = False) -> TensorMap:
        """Gather the gradients, and the parameters."""
        if again and self._own and self._last is not None:
            return self._last
        self._params.gather(self._loose, self._places)
        self._last = {}
        if self._key in grads:  # Then all have one; none in a window that closes.
            self._last = {self._key: self._gathered(grads)}
        return self._last

    def _room(self, dtype: torch.dtype) -> Gathered:
        """Return where to gather gradients."""
        memory, own = self._scratch.take(self._numel, self._tensors[0], dtype, "grads")
        self._own = self._own and own
        return Gathered(memory, self._shapes, compiles=self._compiles)

    def _gathered(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Return the gradients, one after the other."""
        dtype = dtype_of(grads, self._key)
        if self._grads.memory.dtype != dtype:
            self._grads = self._room(dtype)
        known = self._grads
        if isinstance(grads, Gradients):
            if self._members is None:
                order = {name: index for index, name in enumerate(grads.dtypes)}
                self._members = array("q", [order[name] for name in self.names])
            if known.gather_grads(grads, self._members):
                return known.memory
        known.gather([grads[name] for name in self.names])
        return known.memory

    def _apply(self, moved: TensorMap) -> None:
        super()._apply(moved)
        self._put_back()

    def after_write(self) -> None:
        """Write the gathered parameters to their own places, too."""
        self._put_back()
        super().after_write()

    def _put_back(self) -> None:
        """Write the gathered parameters to their own places, and count it."""
        seen = self._params.scatter(self._loose, self._places)
        (self._laid if seen else self._all).bump()


def _laid_in(memory: Tensor, tensors: list[Tensor]) -> tuple[int, int]:
    """Return how many tensors are the first pieces of memory, and their elements."""
    count = start = 0
    for tensor in tensors:
        here = memory.data_ptr() + start * memory.itemsize
        if tensor.data_ptr() != here or not tensor.numel():
            break
        count, start = count + 1, start + tensor.numel()
    return count, start

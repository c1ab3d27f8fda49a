"""Small tensors updated as one: gathered before an update, and put back after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from functional_optim.execution._copying import Gathered, places_of
from functional_optim.execution._memory import carved
from functional_optim.execution._nodes import Kind
from functional_optim.execution._units import Unit

if TYPE_CHECKING:
    from functional_optim._types import TensorMap
    from functional_optim.execution._memory import Scratch
    from functional_optim.execution._nodes import Node
    from functional_optim.execution._units import Source


class Pooled(Unit):
    """Small parameters with equal histories, gathered into one flat tensor.

    Args:
        params: The parameters, detached.
        source: Where their state comes from. Entries are replaced by views.
        scratch: Where to gather.
        compiles: Whether to copy by compiled code where that works.
    """

    kind: ClassVar[str] = "pool"
    pooled: ClassVar[bool] = True

    def __init__(
        self,
        params: TensorMap,
        source: Source,
        scratch: Scratch,
        *,
        compiles: bool = False,
    ) -> None:
        super().__init__(list(params), source)
        self._tensors = list(params.values())
        self._shapes = [param.shape for param in self._tensors]
        self._numel = sum(param.numel() for param in self._tensors)
        self._key, self._scratch, self._compiles = self.names[0], scratch, compiles
        first = self._tensors[0]
        memory, self._own = scratch.take(self._numel, first, first.dtype, "params")
        self._params = Gathered(memory, self._shapes, compiles=compiles)
        self._places = places_of(self._tensors) if memory.is_cpu else None
        self.params = {self._key: memory}
        self._grads: Gathered | None = None
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
        node.update(zip(self.names, views, strict=True))
        return memory

    def updates(self, grads: TensorMap, *, again: bool = False) -> TensorMap:
        """Gather the gradients, and the parameters."""
        if again and self._own and self._last is not None:
            return self._last
        try:
            found = list(map(grads.__getitem__, self.names))
        except KeyError:  # Then there is none, in a window that closes.
            found = []
        known = self._grads
        if found and (known is None or known.memory.dtype != found[0].dtype):
            memory, own = self._scratch.take(
                self._numel, self._tensors[0], found[0].dtype, "grads"
            )
            known = Gathered(memory, self._shapes, compiles=self._compiles)
            self._grads = known
            self._own = self._own and own
        self._params.gather(self._tensors, self._places)
        self._last = {}
        if found and known is not None:
            known.gather(found)
            self._last = {self._key: known.memory}
        return self._last

    def _apply(self, moved: TensorMap) -> None:
        super()._apply(moved)
        self.put_back()

    def put_back(self) -> None:
        """Write the gathered parameters to their own places."""
        self._params.scatter(self._tensors, self._places)

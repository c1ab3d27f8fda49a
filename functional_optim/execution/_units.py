"""Units: what is updated in one call, and where its tensors lie.

A unit shows a transform one tensor map, whatever lies behind it: a slice of a large
tensor, tensors in their own shapes, or small ones gathered (see `_pooling`). Results go
back to where the parameters and states lie; what is shared with other units waits until
all have run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._arithmetic import over
from functional_optim.algebra._buffers import Donated
from functional_optim.execution._state_tree import Kind, mapped, nodes_of, rebuilt
from functional_optim.execution._tensor_memory import (
    GatherBuffer,
    copied_alone,
    flat,
    flat_like,
    split_views,
    storage_ptr,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Static
    from functional_optim.execution._state_tree import Field, Node
    from functional_optim.execution._tensor_memory import ScratchMemory

Later: TypeAlias = "dict[int, tuple[Tensor, Tensor]]"
"""What is written when all units have run: by `id`, the old tensor and the new."""


class Source(NamedTuple):
    """The state that units take their parts from."""

    template: Any
    nodes: list[Node]
    fields: list[Field]
    columns: dict[int, Tensor]


class Unit:
    """Parameters that one call of `update` moves together."""

    params: TensorMap
    """The parameters as the transform sees them, when `updates` was called."""

    pooled: ClassVar[bool] = False
    """Whether all its parameters must take the same steps."""
    kind: ClassVar[str] = ""
    """What it is, for people."""
    shares: ClassVar[bool] = True
    """Whether other units may have a part of the same parameter."""

    def __init__(self, names: list[str], source: Source) -> None:
        self.names = names
        self.fields = source.fields
        self._columns = source.columns
        self._stored: list[dict[str, Tensor]] = []
        self._memory: set[int] | None = None
        self.state: Any = None
        self.donated: Any = None

    def _keep(self, template: Any, nodes: list[Node]) -> None:
        """Remember the state as the transform sees it; the tensors stay the same."""
        self._stored = [node if isinstance(node, dict) else {} for node in nodes]
        self._show(template, nodes)

        self._long: list[Tensor] | None = None

    def long(self) -> list[Tensor]:
        """Return the tensors that are as long as the unit: parameter, then state."""
        if self._long is None:
            entries = [
                entry
                for field, stored in zip(self.fields, self._stored, strict=True)
                if field.kind is Kind.ELEMENTWISE
                for entry in stored.values()
            ]
            self._long = [*self.params.values(), *entries]
        return self._long

    def _show(self, template: Any, nodes: list[Node]) -> None:
        self.state = rebuilt(template, iter(nodes))
        given_up = [
            Donated(node) if field.donated and isinstance(node, dict) else node
            for node, field in zip(nodes, self.fields, strict=True)
        ]
        self.donated = rebuilt(template, iter(given_up))

    def set_statics(self, statics: dict[int, Static[Any]]) -> None:
        """Go on with other values that are known on the host."""
        nodes = nodes_of(self.state)
        changed = [statics.get(index, node) for index, node in enumerate(nodes)]
        self._show(self.state, changed)

    def updates(self, grads: Mapping[str, Tensor], *, again: bool = False) -> TensorMap:
        """Return the gradients as the transform sees them; empty if there are none."""
        raise NotImplementedError

    def write(self, moved: TensorMap, state: Any, later: Later) -> list[Node]:
        """Move the parameters, and keep the new state."""
        found = nodes_of(state)
        self._check(moved, found)
        if self._gives_back(moved, found):
            # What is written first must not be read after.
            moved = {name: update.clone() for name, update in moved.items()}
            found = nodes_of(mapped(state, Tensor.clone))
        for field, node, stored in zip(self.fields, found, self._stored, strict=True):
            if field.kind is not Kind.STATIC and isinstance(node, dict):
                for key, old in stored.items():
                    new = node[key]
                    if new is old:
                        continue
                    if self.shares and field.kind is Kind.EACH:
                        self.share(old, new, later)
                    else:
                        old.copy_(new)
        if moved:
            self._apply(moved)
        return found

    def share(self, old: Tensor, new: Tensor, later: Later) -> None:
        """Keep what other units read, too, until all have run."""
        if new is not old:
            home = self._columns.get(id(old), old)
            later.setdefault(id(home), (home, new))

    def after_write(self) -> None:
        """Do what is left when parameters and state were written past torch."""
        torch.autograd.graph.increment_version(self._written())

    def _written(self) -> list[Tensor]:
        """Return what shares its version with the state that code has written."""
        return self.long()[len(self.params) :]

    def _gives_back(self, moved: TensorMap, nodes: list[Node]) -> bool:
        """Whether a result is what another entry of the state was, as in a delay."""
        if self._memory is None:
            mine = [entry for own in self._stored for entry in own.values()]
            self._memory = {storage_ptr(entry) for entry in mine if entry.numel()}
        for update in moved.values():
            if storage_ptr(update) in self._memory:
                return True
        for node, stored in zip(nodes, self._stored, strict=True):
            if isinstance(node, dict):
                for key, old in stored.items():
                    if node[key] is not old and storage_ptr(node[key]) in self._memory:
                        return True
        return False

    def _check(self, moved: TensorMap, nodes: list[Node]) -> None:
        """Refuse what no `update` may return: the transform may be a user's."""
        for key, update in moved.items():
            if update.shape != self.params[key].shape:
                raise ValueError(
                    f"an update of {format_names(self.names)} has shape "
                    f"{tuple(update.shape)} where {tuple(self.params[key].shape)} was "
                    "given; a transform must keep the shapes of its updates"
                )
        if len(nodes) != len(self.fields):
            raise ValueError(
                f"update returned a state of {len(nodes)} fields for "
                f"{format_names(self.names)}, init one of {len(self.fields)}; the "
                "structure must stay"
            )

    def _apply(self, moved: TensorMap) -> None:
        new = over(Donated(self.params), at=moved).add(moved).to_map(like=self.params)
        for key, param in new.items():
            if param is not self.params[key]:
                self.params[key].copy_(param)


class Shaped(Unit):
    """Parameters in their own shapes, under their own names."""

    kind: ClassVar[str] = "group"
    shares: ClassVar[bool] = False

    def __init__(self, params: TensorMap, source: Source) -> None:
        super().__init__(list(params), source)
        self.params = params
        own: list[Node] = []
        for node in source.nodes:
            if isinstance(node, dict):
                own.append({name: node[name] for name in params if name in node})
            else:
                own.append(node)
        self._keep(source.template, own)

    def updates(self, grads: Mapping[str, Tensor], *, again: bool = False) -> TensorMap:
        """Return the gradients that there are."""
        return {name: grads[name] for name in self.names if name in grads}


class Piece(Unit):
    """A slice of one dense parameter, flat."""

    kind: ClassVar[str] = "slice"

    def __init__(self, param: TensorMap, where: slice, source: Source) -> None:
        super().__init__(list(param), source)
        ((self._name, self._param),) = param.items()
        name, self._where = self._name, where
        self.params = {name: flat(self._param)[where]}
        self._is_whole = self._param.is_contiguous() and where.indices(
            self._param.numel()
        ) == (0, self._param.numel(), 1)
        own: list[Node] = []
        for node, field in zip(source.nodes, source.fields, strict=True):
            if not isinstance(node, dict):
                own.append(node)
            elif name not in node:
                own.append({})
            elif field.kind is Kind.ELEMENTWISE:
                own.append({name: flat(node[name])[where]})
            else:
                own.append({name: node[name]})
        self._keep(source.template, own)

    def updates(self, grads: Mapping[str, Tensor], *, again: bool = False) -> TensorMap:
        """Return the slice of the gradient."""
        if self._name not in grads:
            return {}
        grad = grads[self._name]
        if self._is_whole and grad.is_contiguous() and grad.shape == self._param.shape:
            return {self._name: grad.view(-1)}
        return {self._name: flat_like(grad, self._param, self._where)}

    def _written(self) -> list[Tensor]:
        return [self._param, *super()._written()]


class Pooled(Unit):
    """Small parameters with equal histories, gathered into one flat tensor."""

    kind: ClassVar[str] = "pool"
    pooled: ClassVar[bool] = True

    def __init__(
        self,
        params: TensorMap,
        source: Source,
        scratch: ScratchMemory,
        *,
        compiles: bool = False,
    ) -> None:
        super().__init__(list(params), source)
        self._key = self.names[0]
        self._buffer = GatherBuffer(params, scratch, compiles=compiles)
        self.params = {self._key: self._buffer.params}
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
        memory = entries[0].new_empty(sum(map(Tensor.numel, entries)))
        views = split_views(memory, [entry.shape for entry in entries])
        torch._foreach_copy_(views, entries)
        node.update(zip(self.names, map(copied_alone, views), strict=True))
        return memory

    def updates(self, grads: Mapping[str, Tensor], *, again: bool = False) -> TensorMap:
        """Gather the gradients, and the parameters."""
        if again and self._buffer.is_own and self._last is not None:
            return self._last
        self._buffer.gather(grads)
        # All have a gradient, or none where a window closes.
        self._last = {self._key: self._buffer.grads} if self._key in grads else {}
        return self._last

    def _apply(self, moved: TensorMap) -> None:
        super()._apply(moved)
        self._buffer.scatter()

    def after_write(self) -> None:
        """Write the gathered parameters to their own places, too."""
        self._buffer.scatter()
        super().after_write()

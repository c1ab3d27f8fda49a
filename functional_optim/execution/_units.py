"""Cut buckets into units, which are updated in one call.

A unit gives a transform one tensor map, whether it is a slice of a large tensor, whole
tensors, or small ones packed into one. It writes results back to parameters and states;
tensors that units share are written when all have run.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._buffers import Donated
from functional_optim.algebra._tensor_map import subset
from functional_optim.core._apply import added
from functional_optim.core._transform import Static
from functional_optim.execution._state_tree import (
    LeafKind,
    flatten,
    tree_map,
    unflatten,
)
from functional_optim.execution._tensor_memory import (
    GatherBuffer,
    ScratchMemory,
    copied_alone,
    flat,
    flat_like,
    is_dense,
    relayout_like,
    split_views,
    storage_ptr,
)
from functional_optim.execution.compiled._kernels import KernelCache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.execution._state_tree import ExecutorState, Leaf, LeafInfo

UNIT_BYTES = {"cpu": 4 * 2**20}
"""Size of a unit by type of device: small enough for the last cache together with its
temporaries, large enough that a call of `update` costs little beside its arithmetic."""

_UNIT_BYTES_ELSEWHERE = 8 * 2**20
"""On an accelerator a kernel costs more to start, and memory is fast."""

_PACKED_BELOW = 4
"""Tensors smaller than this part of a unit are packed."""

_COMPILED_ALONE = 32_768
"""Elements from which a call of compiled code costs less than packing."""

_LONGEST = 2**30
"""Elements that compiled code takes at once: it counts them in 32 bits."""

SCRATCH_BYTES = 16 * 2**20
"""Memory that packing may keep for good."""

DeferredWrites: TypeAlias = "dict[int, tuple[Tensor, Tensor]]"
"""Tensors to write when all units have run: by `id`, the old one and the new."""


@dataclasses.dataclass(frozen=True)
class ExecutionOptions:
    """The size of units, None for that of the device, and what compiles updates."""

    unit_bytes: int | None = None
    kernels: KernelCache | None = None


class BucketState(NamedTuple):
    """The state that the units of a bucket take their parts from."""

    template: Any
    leaves: list[Leaf]
    infos: list[LeafInfo]
    columns: dict[int, Tensor]
    """Numbers stacked over parameters, by `id` of the first one, which units get."""


class Unit:
    """Parameters that one call of `update` moves together."""

    params: TensorMap
    """The parameters as the transform gets them, when `updates` was called."""
    packs: ClassVar[bool] = False
    """Whether all its parameters must have gradients in the same steps."""
    kind: ClassVar[str] = ""
    """What `explain` calls it."""
    shares: ClassVar[bool] = True
    """Whether other units may have a part of the same parameter."""

    def __init__(self, names: list[str], state: BucketState) -> None:
        self.names, self.infos = names, state.infos
        self._columns = state.columns
        self._stored: list[dict[str, Tensor]] = []
        self._memory: set[int] | None = None

    def _set_state(
        self,
        state: BucketState,
        name: str,
        elementwise: Callable[[TensorMap], Tensor],
    ) -> None:
        """Take the entries of one name from the state of the bucket."""
        leaves: list[Leaf] = []
        for leaf, info in zip(state.leaves, state.infos, strict=True):
            if not isinstance(leaf, dict):
                leaves.append(leaf)
            elif name not in leaf:
                leaves.append({})
            elif info.kind is LeafKind.ELEMENTWISE:
                leaves.append({name: elementwise(leaf)})
            else:
                leaves.append({name: leaf[name]})
        self._store(state.template, leaves)

    def _store(self, template: Any, leaves: list[Leaf]) -> None:
        """Keep the state as the transform gets it; its tensors stay the same."""
        self._stored = [leaf if isinstance(leaf, dict) else {} for leaf in leaves]
        self._long: list[Tensor] | None = None
        self._set_leaves(template, leaves)

    def _set_leaves(self, template: Any, leaves: list[Leaf]) -> None:
        self.leaves = leaves
        self.state = unflatten(template, leaves)
        donated = [
            Donated(leaf) if info.donated and isinstance(leaf, dict) else leaf
            for leaf, info in zip(leaves, self.infos, strict=True)
        ]
        self.donated = unflatten(template, donated)
        """The state, for an update that may overwrite it."""
        self.listed = tuple(
            self.names[0] in leaf.value
            for leaf in leaves
            if isinstance(leaf, Static) and isinstance(leaf.value, tuple)
        )
        """Whether each `Static` names its parameters, as that of an open window does:
        all of a pack, or none."""

    def set_statics(self, statics: dict[int, Static[Any]]) -> None:
        """Replace values on the host."""
        leaves = [statics.get(index, leaf) for index, leaf in enumerate(self.leaves)]
        self._set_leaves(self.state, leaves)

    def long(self) -> list[Tensor]:
        """Return the tensors that are as long as the unit: parameter, then state."""
        if self._long is None:
            entries = [
                entry
                for info, stored in zip(self.infos, self._stored, strict=True)
                if info.kind is LeafKind.ELEMENTWISE
                for entry in stored.values()
            ]
            self._long = [*self.params.values(), *entries]
        return self._long

    def updates(self, grads: Mapping[str, Tensor], *, again: bool = False) -> TensorMap:
        """Return the gradients as the transform gets them."""
        raise NotImplementedError

    def write(
        self, moved: TensorMap, state: Any, deferred: DeferredWrites
    ) -> list[Leaf]:
        """Write new parameters and state; return the leaves of the new state."""
        leaves = flatten(state)
        self._check(moved, leaves)
        if self._returns_old_state(moved, leaves):
            # A tensor written first must not be read after.
            moved = {name: update.clone() for name, update in moved.items()}
            leaves = flatten(tree_map(state, Tensor.clone))
        for info, leaf, stored in zip(self.infos, leaves, self._stored, strict=True):
            if not isinstance(leaf, dict):
                continue
            for key, old in stored.items():
                new = leaf[key]
                if new is old:
                    continue
                if self.shares and info.kind is LeafKind.PER_PARAMETER:
                    self.share(old, new, deferred)
                else:
                    old.copy_(new)
        if moved:
            self._apply(moved)
        return leaves

    def share(self, old: Tensor, new: Tensor, deferred: DeferredWrites) -> None:
        """Write a tensor that other units read, too, when all have run."""
        if new is not old:
            home = self._columns.get(id(old), old)
            deferred.setdefault(id(home), (home, new))

    def after_write(self) -> None:
        """Count a write that torch has not seen, as compiled code makes them."""
        torch.autograd.graph.increment_version(self._versioned())

    def _versioned(self) -> list[Tensor]:
        """Return tensors that share their versions with all that code writes."""
        return self.long()[len(self.params) :]

    def _returns_old_state(self, moved: TensorMap, leaves: list[Leaf]) -> bool:
        """Whether a result is the old value of another entry, as in a delay."""
        if self._memory is None:
            mine = [entry for stored in self._stored for entry in stored.values()]
            self._memory = {storage_ptr(entry) for entry in mine if entry.numel()}
        for update in moved.values():
            if storage_ptr(update) in self._memory:
                return True
        for leaf, stored in zip(leaves, self._stored, strict=True):
            if isinstance(leaf, dict):
                for key, old in stored.items():
                    new = leaf[key]
                    if new is not old and storage_ptr(new) in self._memory:
                        return True
        return False

    def _check(self, moved: TensorMap, leaves: list[Leaf]) -> None:
        """Refuse results that no `update` may return: the transform may be a user's."""
        for key, update in moved.items():
            if update.shape != self.params[key].shape:
                raise ValueError(
                    f"an update of {format_names(self.names)} has shape "
                    f"{tuple(update.shape)} where {tuple(self.params[key].shape)} was "
                    "given; a transform must keep the shapes of its updates"
                )
        if len(leaves) != len(self.infos):
            raise ValueError(
                f"update returned a state of {len(leaves)} fields for "
                f"{format_names(self.names)}, init one of {len(self.infos)}; the "
                "structure must stay"
            )

    def _apply(self, moved: TensorMap) -> None:
        new = added(Donated(subset(self.params, moved)), moved)
        for key, param in new.items():
            if param is not self.params[key]:
                self.params[key].copy_(param)


class WholeTensors(Unit):
    """Parameters in their own shapes, under their own names."""

    kind: ClassVar[str] = "group"
    shares: ClassVar[bool] = False

    def __init__(self, params: TensorMap, state: BucketState) -> None:
        super().__init__(list(params), state)
        self.params = params
        leaves: list[Leaf] = [
            {name: leaf[name] for name in params if name in leaf}
            if isinstance(leaf, dict)
            else leaf
            for leaf in state.leaves
        ]
        self._store(state.template, leaves)

    def updates(self, grads: Mapping[str, Tensor], *, again: bool = False) -> TensorMap:
        """Return the gradients that there are."""
        return {name: grads[name] for name in self.names if name in grads}


class Slice(Unit):
    """A slice of one dense parameter, flat."""

    kind: ClassVar[str] = "slice"

    def __init__(
        self, name: str, param: Tensor, where: slice, state: BucketState
    ) -> None:
        super().__init__([name], state)
        self._name, self._param, self._where = name, param, where
        self.params = {name: flat(param)[where]}
        everything = (0, param.numel(), 1)
        self._is_whole = (
            param.is_contiguous() and where.indices(param.numel()) == everything
        )
        self._set_state(state, name, lambda leaf: flat(leaf[name])[where])

    def updates(self, grads: Mapping[str, Tensor], *, again: bool = False) -> TensorMap:
        """Return the slice of the gradient."""
        grad = grads[self._name]
        if self._is_whole and grad.is_contiguous() and grad.shape == self._param.shape:
            return {self._name: grad.view(-1)}
        return {self._name: flat_like(grad, self._param, self._where)}

    def _versioned(self) -> list[Tensor]:
        return [self._param, *super()._versioned()]


class PackedTensors(Unit):
    """Small parameters with equal histories, packed into one flat tensor."""

    kind: ClassVar[str] = "pool"
    packs: ClassVar[bool] = True

    def __init__(
        self,
        params: TensorMap,
        state: BucketState,
        scratch: ScratchMemory,
        *,
        compiles: bool = False,
    ) -> None:
        super().__init__(list(params), state)
        self._key = self.names[0]
        self._buffer = GatherBuffer(params, scratch, compiles=compiles)
        self.params = {self._key: self._buffer.params}
        self._last: TensorMap | None = None
        self._set_state(state, self._key, self._packed)

    def _packed(self, leaf: TensorMap) -> Tensor:
        """Move the entries of all names into one flat tensor."""
        entries = [leaf[name] for name in self.names]
        memory = entries[0].new_empty(sum(map(Tensor.numel, entries)))
        views = split_views(memory, [entry.shape for entry in entries])
        torch._foreach_copy_(views, entries)
        leaf.update(zip(self.names, map(copied_alone, views), strict=True))
        return memory

    def updates(self, grads: Mapping[str, Tensor], *, again: bool = False) -> TensorMap:
        """Gather the parameters and their gradients."""
        if again and self._buffer.is_exclusive and self._last is not None:
            return self._last
        self._buffer.gather(grads)
        self._last = {self._key: self._buffer.grads}
        return self._last

    def _apply(self, moved: TensorMap) -> None:
        super()._apply(moved)
        self._buffer.scatter()

    def after_write(self) -> None:
        """Write the packed parameters to their own memory, too."""
        self._buffer.scatter()
        super().after_write()


class UnitCutter:
    """Cuts the parameters of a bucket into units: slices, packs, whole tensors."""

    def __init__(self, state: ExecutorState, options: ExecutionOptions) -> None:
        self._state, self._options = state, options
        self._scratch = ScratchMemory(SCRATCH_BYTES)

    def cut(self, params: TensorMap, shared: BucketState | None) -> list[Unit]:
        """Return the units of a bucket; without a shared state of whole tensors."""
        first = next(iter(params.values()))
        num_bytes = self._options.unit_bytes
        if num_bytes is None:
            num_bytes = UNIT_BYTES.get(first.device.type, _UNIT_BYTES_ELSEWHERE)
        longest = size = max(1, num_bytes // first.dtype.itemsize)
        sliced_from = -(-size // _PACKED_BELOW)
        if self._options.kernels:
            longest, sliced_from = _LONGEST, min(sliced_from, _COMPILED_ALONE)
        units: list[Unit] = []
        pack: TensorMap = {}
        count = 0
        for name, param in params.items():
            if shared and param.numel() >= sliced_from and is_dense(param):
                units.extend(self._slices(name, param, longest, shared))
                continue
            if pack and count + param.numel() > size:
                units.append(self._packed(pack, shared))
                pack, count = {}, 0
            pack[name] = param
            count += param.numel()
        return [*units, self._packed(pack, shared)] if pack else units

    def whole(self, params: TensorMap) -> Unit:
        """Return one unit of whole tensors."""
        state = self._state
        for leaf, info in zip(state.leaves, state.infos, strict=True):
            if isinstance(leaf, dict) and info.kind is LeafKind.PER_PARAMETER:
                # Names that shared a number before have their own again.
                leaf.update({n: leaf[n].clone() for n in params if n in leaf})
        own = BucketState(state.tree, state.leaves, state.infos, {})
        return WholeTensors(params, own)

    def _packed(self, params: TensorMap, shared: BucketState | None) -> Unit:
        """Return one unit for several tensors."""
        if shared is None:
            return self.whole(params)
        name, param = next(iter(params.items()))
        if len(params) == 1 and is_dense(param):
            return self._slices(name, param, max(1, param.numel()), shared)[0]
        compiles = self._options.kernels is not None
        return PackedTensors(params, shared, self._scratch, compiles=compiles)

    def _slices(
        self, name: str, param: Tensor, size: int, shared: BucketState
    ) -> list[Unit]:
        for leaf, info in zip(self._state.leaves, self._state.infos, strict=True):
            if info.kind is not LeafKind.ELEMENTWISE or not isinstance(leaf, dict):
                continue
            if name in leaf:
                leaf[name] = relayout_like(leaf[name], param)
        return [
            Slice(name, param, slice(start, start + size), shared)
            for start in range(0, max(1, param.numel()), size)
        ]

"""The plan: which parameters are updated together, in units of which size.

Parameters share a bucket if one call of `update` may serve them all: the same resolved
transform, dtype and device, and the same history. A bucket is cut into units: small
tensors are pooled, large ones cut where the scope allows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import are_plain
from functional_optim.core._hyperparameters import resolve
from functional_optim.core._transform import Scope, Static
from functional_optim.core._traversal import routes_of
from functional_optim.core._value_class import same_value
from functional_optim.execution._group_transforms import joined
from functional_optim.execution._state_tree import Kind
from functional_optim.execution._tensor_memory import (
    ScratchMemory,
    copied_alone,
    is_dense,
    relayout_like,
)
from functional_optim.execution._units import Piece, Pooled, Shaped, Source, Unit
from functional_optim.execution.compiled._kernels import BucketKernels, KernelCache

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform
    from functional_optim.execution._reductions import ReduceCall
    from functional_optim.execution._state_tree import Field, Node


class Divergence:
    """Sets of parameters that must not share a bucket: their steps or groups differed.

    They stay separate for good, because making a plan is expensive.
    """

    def __init__(self) -> None:
        self._set_of: dict[str, int] = {}

    def set_of(self, name: str) -> int:
        """Return the number of the set that a parameter is in."""
        return self._set_of.get(name, 0)

    def split(self, by: Mapping[str, Hashable]) -> None:
        """Split each set by a value of its parameters."""
        numbers: dict[Hashable, int] = {}
        for name, value in by.items():
            key = self.set_of(name), value
            self._set_of[name] = numbers.setdefault(key, len(numbers))


@dataclasses.dataclass(frozen=True)
class ExecutionOptions:
    """How a plan is made.

    `unit_bytes` is the size of a unit, None for that of the device; `kernels` compiles
    updates.
    """

    unit_bytes: int | None = None
    kernels: KernelCache | None = None


@dataclasses.dataclass
class Bucket:
    """Parameters that one transform, resolved, serves."""

    transform: Transform
    params: TensorMap
    members: dict[int, str]
    whole: bool = False
    units: list[Unit] = dataclasses.field(default_factory=list)
    columns: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    calls: dict[Hashable, list[ReduceCall]] = dataclasses.field(default_factory=dict)
    kernels: BucketKernels | None = None
    compiled_steps: dict[Hashable, Any] = dataclasses.field(default_factory=dict)


UNIT_BYTES = {"cpu": 4 * 2**20}
"""Size of a unit by type of device: small enough for the last cache together with its
temporaries, large enough that a call of `update` costs little beside its arithmetic."""

_UNIT_BYTES_ELSEWHERE = 8 * 2**20
"""On an accelerator a kernel costs more to start, and memory is fast."""

_POOLED_BELOW = 4
"""Tensors smaller than this part of a unit are pooled."""

_COMPILED_ALONE = 32_768
"""Elements from which a call of compiled code costs less than gathering."""

_LONGEST = 2**30
"""Elements that compiled code takes at once: it counts them in 32 bits."""

SCRATCH_BYTES = 16 * 2**20
"""What gathering small tensors may keep for good."""


@dataclasses.dataclass
class Layout:
    """What a plan is made from."""

    params: TensorMap
    transforms: list[Transform]
    group_of: Mapping[str, int]
    divergence: Divergence
    template: Any
    nodes: list[Node]
    fields: list[Field]
    options: ExecutionOptions
    scratch: ScratchMemory = dataclasses.field(
        default_factory=lambda: ScratchMemory(SCRATCH_BYTES)
    )

    def buckets(self) -> list[Bucket]:
        """Return the buckets with their units, in the order of the parameters."""
        scope = max(transform.scope for transform in self.transforms)
        if scope is Scope.GLOBAL:
            everything = joined(self.transforms, self.group_of, self.params)
            bucket = Bucket(everything, self.params, {}, whole=True)
            bucket.units.append(self._shaped(list(self.params)))
            return [bucket]
        elementwise = scope is Scope.ELEMENTWISE
        buckets = []
        for transform, names in self._alike(elementwise=elementwise):
            members = {self.group_of[name]: name for name in reversed(names)}
            params = {name: self.params[name] for name in names}
            bucket = Bucket(transform, params, members)
            if elementwise and not self._has_scalars(names):
                source = self._shared(names)
                bucket.columns = source.columns
                bucket.units = self._flat_units(params, source)
                if self.options.kernels and are_plain(params.values()):
                    bucket.kernels = BucketKernels(self.options.kernels)
            else:
                bucket.units = self._shaped_units(names)
            buckets.append(bucket)
        return buckets

    def _alike(self, *, elementwise: bool) -> list[tuple[Transform, list[str]]]:
        """Return the names that may be updated together, with their transform."""
        found: dict[Hashable, list[tuple[Transform, list[str]]]] = {}
        histories = self._histories() if elementwise else {}
        for name, param in self.params.items():
            transform = resolve(self.transforms[self.group_of[name]], name, param)
            key: Hashable = (
                _hash(transform),
                tuple(routes_of(transform, name, param)),
                param.dtype,
                param.device,
                self.divergence.set_of(name),
                self._has_scalars([name]),
                histories.get(name),
                tuple(
                    node[name].dtype if name in node else None
                    for node in self.nodes
                    if isinstance(node, dict)
                ),
            )
            known = found.setdefault(key, [])
            for other, names in known:
                if same_value(other, transform, tensors="identity"):
                    names.append(name)
                    break
            else:
                known.append((transform, [name]))
        return [entry for entries in found.values() for entry in entries]

    def _histories(self) -> dict[str, Hashable]:
        """Return what has happened to each parameter, as far as its state tells.

        Reads counts on the host: a plan is made rarely.
        """
        found: dict[str, list[Hashable]] = {name: [] for name in self.params}
        for node, field in zip(self.nodes, self.fields, strict=True):
            if isinstance(node, Static):
                told = node.value if isinstance(node.value, tuple) else ()
                for name in self.params:
                    found[name].append(name in told)
            elif isinstance(node, dict) and field.kind is Kind.EACH:
                numbers = {n: entry for n, entry in node.items() if entry.ndim == 0}
                values = _read(list(numbers.values()))
                for name, value in zip(numbers, values, strict=True):
                    found[name].append(value)
                for name in node.keys() - numbers.keys():
                    found[name].append(name)  # Not a number: nothing to share.
        return {name: tuple(history) for name, history in found.items()}

    def _has_scalars(self, names: list[str]) -> bool:
        return any(
            field.scalars and isinstance(node, dict) and name in node
            for node, field in zip(self.nodes, self.fields, strict=True)
            for name in names
        )

    def _size(self, param: Tensor) -> int:
        """Return the number of elements of a unit of this kind."""
        size = self.options.unit_bytes
        if size is None:
            size = UNIT_BYTES.get(param.device.type, _UNIT_BYTES_ELSEWHERE)
        return max(1, size // param.dtype.itemsize)

    def _shaped(self, names: list[str]) -> Shaped:
        for node, field in zip(self.nodes, self.fields, strict=True):
            if isinstance(node, dict) and field.kind is Kind.EACH:
                for name in names:
                    if name in node:  # Names that share a number part here.
                        node[name] = node[name].clone()
        params = {name: self.params[name] for name in names}
        return Shaped(params, Source(self.template, self.nodes, self.fields, {}))

    def _shaped_units(self, names: list[str]) -> list[Unit]:
        units: list[Unit] = []
        taken: list[str] = []
        count = 0
        for name in names:
            numel = self.params[name].numel()
            if taken and count + numel > self._size(self.params[name]):
                units.append(self._shaped(taken))
                taken, count = [], 0
            taken.append(name)
            count += numel
        return [*units, self._shaped(taken)]

    def _shared(self, names: list[str]) -> Source:
        """Let parameters with equal histories share their numbers.

        All are shown the same tensor, so that what follows from it is computed once.
        """
        columns: dict[int, Tensor] = {}
        shown: list[Node] = []
        for node, field in zip(self.nodes, self.fields, strict=True):
            if not isinstance(node, dict) or field.kind is not Kind.EACH:
                shown.append(node)
                continue
            members = [name for name in names if name in node]
            if members:
                column = torch.stack([node[name] for name in members])
                entries = column.unbind()
                node.update(zip(members, map(copied_alone, entries), strict=True))
                columns[id(entries[0])] = column
                shown.append(dict.fromkeys(members, entries[0]))
            else:
                shown.append({})
        return Source(self.template, shown, self.fields, columns)

    def _flat_units(self, params: TensorMap, source: Source) -> list[Unit]:
        """Return flat units."""
        units: list[Unit] = []
        pool: TensorMap = {}
        count = 0
        for name, param in params.items():
            size = self._size(param)
            if param.numel() >= self._least_alone(size) and is_dense(param):
                own = _LONGEST if self.options.kernels else size
                units.extend(self._pieces(name, own, source))
                continue
            if pool and count + param.numel() > size:
                units.append(self._pooled(pool, source))
                pool, count = {}, 0
            pool[name] = param
            count += param.numel()
        if pool:
            units.append(self._pooled(pool, source))
        return units

    def _least_alone(self, size: int) -> int:
        """Return how many elements a tensor has that is not gathered with others."""
        least = -(-size // _POOLED_BELOW)
        return min(least, _COMPILED_ALONE) if self.options.kernels else least

    def _pooled(self, params: TensorMap, source: Source) -> Unit:
        name = next(iter(params))
        if len(params) == 1 and is_dense(params[name]):
            return self._pieces(name, max(1, params[name].numel()), source)[0]
        compiles = self.options.kernels is not None
        return Pooled(params, source, self.scratch, compiles=compiles)

    def _pieces(self, name: str, size: int, source: Source) -> list[Unit]:
        param = self.params[name]
        for node, field in zip(self.nodes, self.fields, strict=True):
            if field.kind is not Kind.ELEMENTWISE or not isinstance(node, dict):
                continue
            if name in node:
                node[name] = relayout_like(node[name], param)
        return [
            Piece({name: param}, slice(start, start + size), source)
            for start in range(0, max(1, param.numel()), size)
        ]


def _hash(value: object) -> int:
    try:
        return hash(value)
    except TypeError:  # A user's dataclass that compares by value has none.
        return 0


def _read(numbers: list[Tensor]) -> list[Hashable]:
    """Return numbers on the host; those with the same bits are equal."""
    if not numbers:
        return []
    if numbers[0].is_meta:
        return [None] * len(numbers)
    values = torch.stack(numbers).cpu()
    if values.is_floating_point():
        values = values.double().view(torch.int64)
    result: list[Hashable] = values.tolist()
    return result

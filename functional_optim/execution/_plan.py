"""Plan which parameters are updated together.

Parameters share a bucket if one call of `update` may serve them all: the same resolved
transform, dtype and device, and equal numbers in their state.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import are_plain
from functional_optim.core._hyperparameters import resolve
from functional_optim.core._transform import Scope, Static
from functional_optim.core._traversal import routes, walk
from functional_optim.core._value_class import same_value
from functional_optim.execution._group_transforms import joined
from functional_optim.execution._native import ParameterGradients
from functional_optim.execution._state_tree import LeafKind
from functional_optim.execution._tensor_memory import copied_alone
from functional_optim.execution._units import (
    BucketState,
    ExecutionOptions,
    Unit,
    UnitCutter,
)
from functional_optim.execution.compiled._kernels import BucketKernels

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform
    from functional_optim.execution._reductions import ReduceCall
    from functional_optim.execution._state_tree import ExecutorState, Leaf


@dataclasses.dataclass
class Bucket:
    """Parameters of one resolved transform; `members` has one of each group."""

    transform: Transform
    params: TensorMap
    members: dict[int, str]
    whole: bool = False
    units: list[Unit] = dataclasses.field(default_factory=list)
    columns: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    calls: dict[Hashable, list[ReduceCall]] = dataclasses.field(default_factory=dict)
    kernels: BucketKernels | None = None
    compiled_steps: dict[Hashable, Any] = dataclasses.field(default_factory=dict)


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


class BucketBuilder:
    """Sorts parameters into buckets, and cuts these into units."""

    def __init__(
        self,
        params: TensorMap,
        transforms: list[Transform],
        group_of: Mapping[str, int],
        state: ExecutorState,
        *,
        divergence: Divergence,
        options: ExecutionOptions,
    ) -> None:
        self._params, self._transforms, self._group_of = params, transforms, group_of
        self._divergence, self._options = divergence, options
        self._tree, self._leaves, self._infos = state.tree, state.leaves, state.infos
        self._cutter = UnitCutter(state, options)

    def buckets(self) -> list[Bucket]:
        """Return the buckets with their units, in the order of the parameters."""
        scope = max(transform.scope for transform in self._transforms)
        if scope is Scope.GLOBAL:
            everything = joined(self._transforms, self._group_of, self._params)
            bucket = Bucket(everything, self._params, {}, whole=True)
            bucket.units.append(self._cutter.whole(self._params))
            return [bucket]
        elementwise = scope is Scope.ELEMENTWISE and not any(
            map(_routes_in_update, self._transforms)
        )
        kernels = self._options.kernels
        buckets = []
        for transform, names in self._alike(elementwise=elementwise):
            members = {self._group_of[name]: name for name in reversed(names)}
            params = {name: self._params[name] for name in names}
            bucket = Bucket(transform, params, members)
            state = None
            if elementwise and not self._has_scalars(names):
                state = self._shared_state(names)
                bucket.columns = state.columns
                if kernels and are_plain(params.values()):
                    bucket.kernels = BucketKernels(kernels)
            bucket.units = self._cutter.cut(params, state)
            buckets.append(bucket)
        return buckets

    def _alike(self, *, elementwise: bool) -> list[tuple[Transform, list[str]]]:
        """Return the names that may share a bucket, with their transform."""
        found: dict[Hashable, list[tuple[Transform, list[str]]]] = {}
        histories = self._histories() if elementwise else {}
        for name, param in self._params.items():
            transform = resolve(self._transforms[self._group_of[name]], name, param)
            key: Hashable = (
                _hash(transform),
                param.dtype,
                param.device,
                self._divergence.set_of(name),
                self._has_scalars([name]),
                histories.get(name),
                tuple(
                    leaf[name].dtype if name in leaf else None
                    for leaf in self._leaves
                    if isinstance(leaf, dict)
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
        """Return the numbers in the state of each parameter, read on the host."""
        found: dict[str, list[Hashable]] = {name: [] for name in self._params}
        for leaf, info in zip(self._leaves, self._infos, strict=True):
            if isinstance(leaf, Static):
                listed = leaf.value if isinstance(leaf.value, tuple) else ()
                for name in self._params:
                    found[name].append(name in listed)
            elif isinstance(leaf, dict) and info.kind is LeafKind.PER_PARAMETER:
                numbers = {n: entry for n, entry in leaf.items() if entry.ndim == 0}
                values = _read(list(numbers.values()))
                for name, value in zip(numbers, values, strict=True):
                    found[name].append(value)
                for name in leaf.keys() - numbers.keys():
                    found[name].append(name)  # Not a number: nothing to share.
        return {name: tuple(history) for name, history in found.items()}

    def _has_scalars(self, names: list[str]) -> bool:
        return any(
            info.scalars and isinstance(leaf, dict) and name in leaf
            for leaf, info in zip(self._leaves, self._infos, strict=True)
            for name in names
        )

    def _shared_state(self, names: list[str]) -> BucketState:
        """Let parameters with equal histories share their numbers.

        All get the same tensor, so that results of it are computed once.
        """
        columns: dict[int, Tensor] = {}
        leaves: list[Leaf] = []
        for leaf, info in zip(self._leaves, self._infos, strict=True):
            if not isinstance(leaf, dict) or info.kind is not LeafKind.PER_PARAMETER:
                leaves.append(leaf)
                continue
            members = [name for name in names if name in leaf]
            leaves.append({})
            if members:
                column = torch.stack([leaf[name] for name in members])
                entries = column.unbind()
                leaf.update(zip(members, map(copied_alone, entries), strict=True))
                columns[id(entries[0])] = column
                leaves[-1] = dict.fromkeys(members, entries[0])
        return BucketState(self._tree, leaves, self._infos, columns)


def _routes_in_update(transform: Transform) -> bool:
    """Whether a router decides in `update`: it has no constant for a parameter."""
    inside = [node.transform for node in walk(transform)]
    return any(routes(one) and not hasattr(one, "resolved") for one in inside)


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


class Plan:
    """The buckets of a transform, made anew when steps or groups begin to differ."""

    def __init__(
        self,
        params: TensorMap,
        transforms: list[Transform],
        group_of: Mapping[str, int],
        state: ExecutorState,
        options: ExecutionOptions,
    ) -> None:
        self._params, self._transforms, self._group_of = params, transforms, group_of
        self._state, self._options = state, options
        self._divergence = Divergence()
        self._given: tuple[list[str], list[torch.dtype]] = ([], [])
        self._dtypes: dict[str, torch.dtype | None] = {}
        self.renew()

    def renew(self) -> None:
        """Make the plan again; the numbers stay as they are."""
        # Tensors of inference mode have no versions, and cannot be written outside it.
        with torch.inference_mode(mode=False):
            self._state.replaced = True
            builder = BucketBuilder(
                self._params,
                self._transforms,
                self._group_of,
                self._state,
                divergence=self._divergence,
                options=self._options,
            )
            self.buckets = builder.buckets()
        self.units = [
            (bucket, unit) for bucket in self.buckets for unit in bucket.units
        ]
        self._columns = [
            column for bucket in self.buckets for column in bucket.columns.values()
        ]
        self.keep_versions()
        self._last_dtypes: Mapping[str, Any] | None = None

    def keep_versions(self) -> None:
        """Remember the versions of shared numbers; writes from outside change them."""
        self._versions = [column._version for column in self._columns]

    def set_transforms(self, transforms: list[Transform]) -> None:
        """Go on with other hyperparameters."""
        self._transforms = transforms
        for bucket in self.buckets:
            if bucket.whole:
                bucket.transform = joined(transforms, self._group_of, self._params)
                continue
            members = {
                id(transforms[group]): (transforms[group], name)
                for group, name in bucket.members.items()
            }
            first, *others = [
                resolve(transform, name, self._params[name])
                for transform, name in members.values()
            ]
            if not all(same_value(x, first, tensors="identity") for x in others):
                self._divergence.split(
                    {name: id(transforms[g]) for name, g in self._group_of.items()}
                )
                self.renew()
                return
            bucket.transform = first

    def dtypes_of(
        self, grads: Mapping[str, Tensor]
    ) -> Mapping[str, torch.dtype | None]:
        """Return the dtype of the gradient of each parameter, None without one."""
        if isinstance(grads, ParameterGradients):
            return grads.dtypes
        given = list(grads), list(map(_dtype, grads.values()))
        if given != self._given:
            self._given = given
            self._dtypes = dict.fromkeys(self._params) | dict(zip(*given, strict=True))
        return self._dtypes

    def follow(self, dtypes: Mapping[str, torch.dtype | None]) -> None:
        """Separate parameters whose gradients or written counts differ."""
        if [column._version for column in self._columns] != self._versions:
            self.renew()
        if dtypes is not self._last_dtypes:  # Also after a plan: it ignores gradients.
            together = [unit.names for _, unit in self.units if unit.packs]
            together += [list(b.params) for b in self.buckets if b.columns]
            if any(len({dtypes[name] for name in names}) > 1 for names in together):
                self._divergence.split(dtypes)
                self.renew()
        self._last_dtypes = dtypes


_dtype = operator.attrgetter("dtype")

"""The plan as it is now, and what makes another one necessary."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.core._hyperparameters import resolve
from functional_optim.core._value_class import same_value
from functional_optim.execution._bucketing import (
    Bucket,
    Divergence,
    ExecutionOptions,
    Layout,
)
from functional_optim.execution._group_transforms import joined
from functional_optim.execution._native import ParameterGradients

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform
    from functional_optim.execution._state_tree import Store
    from functional_optim.execution._units import Unit

_dtype = operator.attrgetter("dtype")


class Plan:
    """What is updated together."""

    def __init__(
        self,
        params: TensorMap,
        transforms: list[Transform],
        group_of: Mapping[str, int],
        store: Store,
        options: ExecutionOptions,
    ) -> None:
        self._params, self._transforms, self._group_of = params, transforms, group_of
        self._store = store
        self.buckets: list[Bucket] = []
        self.units: list[tuple[Bucket, Unit]] = []
        self._options = options
        self._divergence = Divergence()
        self._given: tuple[list[str], list[torch.dtype]] = ([], [])
        self._wanted: dict[str, torch.dtype | None] = {}
        self.renew()

    def keep_versions(self) -> None:
        """Take the numbers that parameters share to be as they should be now."""
        self._versions = [column._version for column in self._columns]

    def renew(self) -> None:
        """Decide again what is updated together; the numbers stay as they are."""
        # Tensors of inference mode have no versions, and cannot be written outside it.
        with torch.inference_mode(mode=False):
            self._renew()

    def _renew(self) -> None:
        self._store.replaced = True
        layout = Layout(
            self._params,
            self._transforms,
            self._group_of,
            self._divergence,
            self._store.state,
            self._store.nodes,
            self._store.fields,
            self._options,
        )
        self.buckets = layout.buckets()
        self._scratch = layout.scratch
        self.units = [
            (bucket, unit) for bucket in self.buckets for unit in bucket.units
        ]
        self._columns = [
            column for bucket in self.buckets for column in bucket.columns.values()
        ]
        self.keep_versions()
        self._last_dtypes: Mapping[str, Any] | None = None

    def set_transforms(self, transforms: list[Transform]) -> None:
        """Go on with other numbers."""
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
        found = list(grads), list(map(_dtype, grads.values()))
        if found != self._given:
            self._given = found
            self._wanted = dict.fromkeys(self._params) | dict(zip(*found, strict=True))
        return self._wanted

    def follow(self, dtypes: Mapping[str, torch.dtype | None]) -> None:
        """Separate parameters whose gradients or written counts differ."""
        if [column._version for column in self._columns] != self._versions:
            self.renew()
        if dtypes is not self._last_dtypes:  # Also after a plan: it ignores gradients.
            together = [unit.names for _, unit in self.units if unit.pooled]
            together += [list(b.params) for b in self.buckets if b.columns]
            if any(len({dtypes[name] for name in names}) > 1 for names in together):
                self._divergence.split(dtypes)
                self.renew()
        self._last_dtypes = dtypes

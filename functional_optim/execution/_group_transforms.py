"""The transforms of all groups as one: where they differ, numbers by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from functional_optim.core._selection import picks
from functional_optim.core._transform import Transform
from functional_optim.core._value_class import same_value
from functional_optim.transforms import Masked, Partition

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap


def joined(
    transforms: Sequence[Transform], group_of: Mapping[str, int], params: TensorMap
) -> Transform:
    """Return one transform for all groups: where they differ, numbers by name.

    Example:
        >>> import torch
        >>> from functional_optim.transforms import Scale
        >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> joined([Scale(1.0), Scale(2.0)], {"w": 0, "b": 1}, params)
        Scale({'w': 1.0, 'b': 2.0})
    """
    if all(transform is transforms[0] for transform in transforms[1:]):
        return transforms[0]
    by_name = {name: transforms[group_of[name]] for name in params}
    result: Transform = _joined(by_name, params)
    return result


def _joined(values: dict[str, Any], params: TensorMap) -> Any:
    """Return one value for all names: a transform, or a part of one."""
    first = next(iter(values.values()))
    if all(same_value(v, first, tensors="identity") for v in values.values()):
        return first
    if isinstance(first, Partition):
        return dataclasses.replace(first, inner=_joined_labels(values, params))
    if isinstance(first, Masked):
        # Inside nobody knows the names outside.
        inside = {
            n: v.inner for n, v in values.items() if picks(first.mask, n, params[n])
        }
        return dataclasses.replace(first, inner=_joined(inside, params))
    if isinstance(first, tuple):
        columns = range(len(first))
        return tuple(
            _joined({n: value[i] for n, value in values.items()}, params)
            for i in columns
        )
    if isinstance(first, dict):
        return {
            key: _joined({n: value[key] for n, value in values.items()}, params)
            for key in first
        }
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        changes = {
            field: _joined({n: getattr(v, field) for n, v in values.items()}, params)
            for field in names
        }
        try:
            return dataclasses.replace(first, **changes)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"groups cannot differ in {type(first).__name__}: {error}"
            ) from error
    return values


def _joined_labels(values: dict[str, Any], params: TensorMap) -> dict[str, Transform]:
    """Return the transforms of a `Partition`, each for the names with its label."""
    inner: dict[str, Transform] = {}
    first = next(iter(values.values()))
    labels = {name: first.label_of(name, params[name]) for name in values}
    for label, transform in first.inner.items():
        own = {n: v.inner[label] for n, v in values.items() if labels[n] == label}
        inner[label] = _joined(own, params) if own else transform
    return inner

"""The transforms of all groups as one: where they differ, numbers by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from functional_optim.core._transform import Transform
from functional_optim.core._traversal import Label, children_of, routes
from functional_optim.core._value_class import same_value

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
    """Return one value for all names: a transform, or the value of a field."""
    first = next(iter(values.values()))
    if all(same_value(v, first, tensors="identity") for v in values.values()):
        return first
    if children_of(first):
        children = {
            label: _joined(served, params) if served else child
            for label, child in children_of(first).items()
            for served in [_served(values, label, params)]
        }
        values = {n: value.with_children(children) for n, value in values.items()}
        first = next(iter(values.values()))
        if not dataclasses.is_dataclass(first):
            return first  # No group has a value of its own of what is no field.
    if isinstance(first, tuple):
        columns = range(len(first))
        return tuple(
            _joined({n: value[i] for n, value in values.items()}, params)
            for i in columns
        )
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        changes = {
            field.name: _joined(
                {n: getattr(v, field.name) for n, v in values.items()}, params
            )
            for field in dataclasses.fields(first)
        }
        try:
            return dataclasses.replace(first, **changes)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"groups cannot differ in {type(first).__name__}: {error}"
            ) from error
    return values


def _served(
    values: dict[str, Any], label: Label, params: TensorMap
) -> dict[str, Transform]:
    """Return the child with a label, for each name that it serves."""
    return {
        name: children_of(value)[label]
        for name, value in values.items()
        if not routes(value) or value.route(name, params[name]) == label
    }

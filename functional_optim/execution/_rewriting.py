"""Other forms of a transform: numbers joined by name, or a memory for one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from functional_optim._context import Context
from functional_optim._types import Scope, Transform, inner_transforms, with_inner
from functional_optim._value import same_value

if TYPE_CHECKING:
    from functional_optim._types import TensorMap


def joined(transforms: Sequence[Transform], group_of: Mapping[str, int]) -> Transform:
    """Return one transform for all groups: where they differ, numbers by name.

    Args:
        transforms: The transform of each group; they differ in hyperparameters only.
        group_of: The group of each parameter.

    Example:
        >>> from functional_optim.transforms import Scale
        >>> joined([Scale(1.0), Scale(2.0)], {"w": 0, "b": 1})
        Scale({'w': 1.0, 'b': 2.0})
    """
    result: Transform = _joined(list(transforms), group_of)
    return result


def _joined(values: list[Any], group_of: Mapping[str, int]) -> Any:
    first = values[0]
    if all(value is first or same_value(value, first) for value in values[1:]):
        return first
    if isinstance(first, tuple):
        columns = zip(*values, strict=True)
        return tuple(_joined(list(column), group_of) for column in columns)
    if isinstance(first, dict):
        return {key: _joined([v[key] for v in values], group_of) for key in first}
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        changes = {n: _joined([getattr(v, n) for v in values], group_of) for n in names}
        return dataclasses.replace(first, **changes)
    return {name: values[group] for name, group in group_of.items()}


@dataclasses.dataclass(frozen=True)
class _Remembered:
    """A transform that computes once for each place, until its memory is cleared."""

    inner: Transform
    memory: dict[tuple[int | str, ...], tuple[TensorMap, Any]]

    @property
    def scope(self) -> Scope:
        return self.inner.scope

    def init(self, params: TensorMap) -> Any:
        return self.inner.init(params)

    def update(
        self,
        updates: TensorMap,
        state: Any,
        params: TensorMap,
        *,
        context: Context = Context(),
    ) -> tuple[TensorMap, Any]:
        if context.path not in self.memory:
            result = self.inner.update(updates, state, params, context=context)
            self.memory[context.path] = result
        return self.memory[context.path]


def remembered(
    transform: Transform, memory: dict[tuple[int | str, ...], tuple[TensorMap, Any]]
) -> Transform:
    """Return a transform whose expensive members run once for all passes of a step.

    Expensive is what looks at whole tensors: an orthogonalization in front of a global
    norm must not run again when the norm is known.

    Args:
        transform: The transform.
        memory: Where results are kept.
    """
    if transform.scope is Scope.ELEMENTWISE:
        return transform
    if not inner_transforms(transform):
        return _Remembered(transform, memory)
    return with_inner(transform, lambda inner: remembered(inner, memory))

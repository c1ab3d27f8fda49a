"""A transform with a memory for one step: what is expensive runs in one pass only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from functional_optim.core._context import Context
from functional_optim.core._transform import Scope, Transform
from functional_optim.core._traversal import children_of, map_children

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap


class Memory:
    """What members computed in a step, in the order in which they were called."""

    def __init__(self) -> None:
        self._results: dict[Any, list[tuple[TensorMap, Any]]] = {}
        self._calls: dict[Any, int] = {}

    def restart(self) -> None:
        """Begin another pass: the same calls will come again."""
        self._calls = {}

    def clear(self) -> None:
        """Forget everything."""
        self._results = {}

    def recall(
        self, key: Any, compute: Callable[[], tuple[TensorMap, Any]]
    ) -> tuple[TensorMap, Any]:
        """Return what a call gave in the pass before, or compute it."""
        number = self._calls.get(key, 0)
        self._calls[key] = number + 1
        known = self._results.setdefault(key, [])
        if number == len(known):
            known.append(compute())
        return known[number]


@final
@dataclasses.dataclass(frozen=True, eq=False)
class _Remembered:
    """A transform that computes once in a step."""

    inner: Transform
    memory: Memory

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
        context: Context | None = None,
    ) -> tuple[TensorMap, Any]:
        context = context or Context()
        return self.memory.recall(
            (context.path, id(self)),
            lambda: self.inner.update(updates, state, params, context=context),
        )


def remembered(transform: Transform, memory: Memory) -> Transform:
    """Return a transform whose expensive members run once for all passes of a step.

    Expensive is what looks at whole tensors: an orthogonalization in front of a global
    norm must not run again when the norm is known.
    """
    if transform.scope is Scope.ELEMENTWISE:
        return transform
    if not children_of(transform):
        return _Remembered(transform, memory)
    return map_children(transform, lambda _, child: remembered(child, memory))

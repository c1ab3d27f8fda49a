"""Memoize the results of expensive transforms for the passes of one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from functional_optim.core._context import Context
from functional_optim.core._transform import Scope, Transform
from functional_optim.core._traversal import children_of, map_children

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap


class StepCache:
    """The results of members in a step, in the order of their calls."""

    def __init__(self) -> None:
        self._results: dict[Any, list[tuple[TensorMap, Any]]] = {}
        self._calls: dict[Any, int] = {}

    def restart(self) -> None:
        """Begin another pass: the same calls will come again."""
        self._calls = {}

    def clear(self) -> None:
        """Forget all results."""
        self._results = {}

    def get(
        self, key: Any, compute: Callable[[], tuple[TensorMap, Any]]
    ) -> tuple[TensorMap, Any]:
        """Return the result of the same call in an earlier pass, or compute it."""
        number = self._calls.get(key, 0)
        self._calls[key] = number + 1
        known = self._results.setdefault(key, [])
        if number == len(known):
            known.append(compute())
        return known[number]


@final
@dataclasses.dataclass(frozen=True, eq=False)
class _Memoized:
    """A transform that is computed once in a step."""

    inner: Transform
    cache: StepCache

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
        return self.cache.get(
            (context.path, id(self)),
            lambda: self.inner.update(updates, state, params, context=context),
        )


def memoize_whole_tensor(transform: Transform, cache: StepCache) -> Transform:
    """Return a transform whose members on whole tensors run once for all passes.

    An orthogonalization in front of a global norm is too expensive to run again.
    """
    if transform.scope is Scope.ELEMENTWISE:
        return transform
    if not children_of(transform):
        return _Memoized(transform, cache)
    return map_children(transform, lambda _, child: memoize_whole_tensor(child, cache))

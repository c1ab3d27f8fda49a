"""Run the update of a unit, once for each total and once to write."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from functional_optim.core._context import Context
from functional_optim.core._transform import Scope, Transform
from functional_optim.core._traversal import children_of, map_children
from functional_optim.execution._grad_scaling import Scaling, wrap_state
from functional_optim.execution._reductions import (
    CallCounter,
    CallRecorder,
    KnownTotals,
    Partial,
    ReduceCall,
    TotalNeededError,
    Totals,
    order_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from functional_optim.algebra._buffers import Workspace
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._context import Reducer
    from functional_optim.execution._plan import Bucket
    from functional_optim.execution._state_tree import Leaf
    from functional_optim.execution._units import DeferredWrites, Unit

_MOST_KNOWN = 256
"""Where gradients are missing by chance, no kind of step comes again."""


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """The inputs of a step."""

    grads: Mapping[str, Tensor]
    context: Context
    scaling: Scaling | None


class EagerUpdate:
    """One update of one unit in one step, by torch's operations."""

    def __init__(
        self,
        bucket: Bucket,
        unit: Unit,
        transform: Transform,
        workspace: Workspace,
        inputs: StepInputs,
        *,
        kind: Hashable,
    ) -> None:
        self.bucket, self.unit, self.kind = bucket, unit, kind
        self.key: Hashable = (id(bucket), kind)
        self.transform, self._workspace = transform, workspace
        self._inputs = inputs
        self._again = False
        self._cache: StepCache | None = None

    def calls(self) -> Sequence[ReduceCall]:
        """Return the calls of `reduce`, recorded once."""
        known = self.bucket.calls
        if self.kind not in known:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            calls: list[ReduceCall] = []
            self._run(CallRecorder(calls))
            known[self.kind] = calls
        if known[self.kind] and self.transform.scope is not Scope.ELEMENTWISE:
            self._cache = StepCache()
            self.transform = memoize_whole_tensor(self.transform, self._cache)
        return known[self.kind]

    def partial(self, totals: Totals) -> Partial | None:
        """Run up to the first unknown total; return the unit's part of it."""
        try:
            self._run(KnownTotals(totals))
        except TotalNeededError as needed:
            return needed.partial
        return None

    def apply(self, totals: Totals, deferred: DeferredWrites) -> list[Leaf]:
        """Write new parameters and state; return the new state."""
        call: ReduceCall | None = None
        try:
            moved, state = self._run(KnownTotals(totals), last=True)
        except TotalNeededError as needed:
            call = needed.partial.call
        if call is not None:
            raise order_error(call)
        if self._cache is not None:
            self._cache.clear()
        return self.unit.write(moved, state, deferred)

    def _run(self, reducer: Reducer, *, last: bool = False) -> tuple[TensorMap, Any]:
        """Run the update; the last one of a step may overwrite the state."""
        unit, scaling = self.unit, self._inputs.scaling
        updates = unit.updates(self._inputs.grads, again=self._again)
        self._again = True
        state = unit.donated if last and scaling is None else unit.state
        if scaling is not None:
            state = wrap_state(state, scaling.grad_scale)
        context = self._inputs.context.with_reducer(reducer)
        update = self.transform.update
        if self._cache is None:
            with self._workspace:
                moved, new = update(updates, state, unit.params, context=context)
        else:  # Memoized results must not be overwritten.
            self._cache.restart()
            moved, new = update(updates, state, unit.params, context=context)
        return moved, new if scaling is None else new[-1]


class StepCache:
    """The results of members in a step, in the order of their calls."""

    def __init__(self) -> None:
        self._results: dict[Any, list[tuple[TensorMap, Any, Any]]] = {}
        self._calls: dict[Any, int] = {}

    def restart(self) -> None:
        """Begin another pass: the same calls will come again."""
        self._calls = {}

    def clear(self) -> None:
        """Forget all results."""
        self._results = {}

    def get(
        self,
        key: Any,
        counter: CallCounter | None,
        compute: Callable[[], tuple[TensorMap, Any]],
    ) -> tuple[TensorMap, Any]:
        """Return the result of the same call in an earlier pass, or compute it.

        The calls of `reduce` in it are counted either way: the next has their number.
        """
        number = self._calls.get(key, 0)
        self._calls[key] = number + 1
        known = self._results.setdefault(key, [])
        if number == len(known):
            known.append((*compute(), counter.counts() if counter else {}))
        moved, state, counts = known[number]
        if counter:  # A combinator may run a child without the context.
            counter.go_on_from(counts)
        return moved, state


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
        counter: Any = context.reducer
        return self.cache.get(
            (context.path, id(self)),
            counter,
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

"""Run the update of a unit, once for each total and once to write."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from functional_optim.core._context import Context
from functional_optim.core._transform import Scope
from functional_optim.execution._grad_scaling import Scaling, wrapped_state
from functional_optim.execution._memoized import Memory, remembered
from functional_optim.execution._reductions import (
    Call,
    Recorded,
    Stop,
    StopError,
    Supplied,
    Totals,
    through,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from functional_optim.algebra._buffers import Workspace
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._context import Reducer
    from functional_optim.core._transform import Transform
    from functional_optim.execution._bucketing import Bucket
    from functional_optim.execution._state_tree import Node
    from functional_optim.execution._units import Later, Unit

_MOST_KNOWN = 256
"""Where gradients are missing by chance, no kind of step comes again."""


@dataclasses.dataclass(frozen=True)
class Given:
    """The inputs of a step."""

    grads: Mapping[str, Tensor]
    context: Context
    scaling: Scaling | None


class Run:
    """One update of one unit in one step, by torch's operations."""

    def __init__(
        self,
        bucket: Bucket,
        unit: Unit,
        transform: Transform,
        workspace: Workspace,
        given: Given,
        *,
        kind: Hashable,
    ) -> None:
        self.bucket, self.unit, self.kind = bucket, unit, kind
        self.key: Hashable = (id(bucket), kind)
        self.transform, self._workspace = transform, workspace
        self._given = given
        self._again = False
        self._memory: Memory | None = None

    def calls(self) -> Sequence[Call]:
        """Return the calls of `reduce`, recorded once."""
        known = self.bucket.calls
        if self.kind not in known:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            calls: list[Call] = []
            self._update(Recorded(calls))
            known[self.kind] = calls
        if known[self.kind] and self.transform.scope is not Scope.ELEMENTWISE:
            self._memory = Memory()
            self.transform = remembered(self.transform, self._memory)
        return known[self.kind]

    def stop(self, totals: Totals) -> Stop | None:
        """Run up to the first unknown total; return its call and partial."""
        try:
            self._update(Supplied(totals))
        except StopError as stop:
            return stop.at
        return None

    def apply(self, totals: Totals, later: Later) -> list[Node]:
        """Write the new parameters and state; return the nodes of the new state."""
        moved, state = through(lambda reducer: self._update(reducer, last=True), totals)
        if self._memory is not None:
            self._memory.clear()
        return self.unit.write(moved, state, later)

    def _update(self, reducer: Reducer, *, last: bool = False) -> tuple[TensorMap, Any]:
        """Run the update; the last one of a step may overwrite the state."""
        unit, scaling = self.unit, self._given.scaling
        updates = unit.updates(self._given.grads, again=self._again)
        self._again = True
        state = unit.donated if last and scaling is None else unit.state
        if scaling is not None:
            state = wrapped_state(state, scaling.grad_scale)
        context = self._given.context.with_reducer(reducer)
        update = self.transform.update
        if self._memory is None:
            with self._workspace:
                moved, new = update(updates, state, unit.params, context=context)
        else:  # Memoized results must not be overwritten.
            self._memory.restart()
            moved, new = update(updates, state, unit.params, context=context)
        return moved, new if scaling is None else new[-1]

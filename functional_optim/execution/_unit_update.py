"""One update of one unit: with which state, and with what beside it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from functional_optim.core._context import Context
from functional_optim.core._transform import Scope
from functional_optim.execution._accumulation import from_window
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
from functional_optim.execution._state_tree import Kind, nodes_of, rebuilt

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
"""Where gradients are missing by chance, no answer is asked for twice."""


_COMPANION = "\N{NULL}companion"


@dataclasses.dataclass(frozen=True)
class Given:
    """What a step is given."""

    grads: Mapping[str, Tensor]
    context: Context
    scaling: Scaling | None


class Run:
    """One update of one unit in one step."""

    def __init__(
        self,
        bucket: Bucket,
        unit: Unit,
        transform: Transform,
        workspace: Workspace,
        given: Given,
        *,
        kind: Hashable,
        alone: bool,
    ) -> None:
        self.bucket, self.unit, self.kind = bucket, unit, kind
        self.key: Hashable = (id(bucket), kind)
        self.transform, self._workspace = transform, workspace
        self._given, self.alone = given, alone
        self._again = False
        self._memory: Memory | None = None
        if alone:
            self.transform = from_window(transform, self._state())

    def calls(self) -> Sequence[Call]:
        """Return the calls of `reduce`: always the same, so tried once."""
        known = self.bucket.calls
        if self.kind not in known:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            calls: list[Call] = []
            self(Recorded(calls))
            known[self.kind] = calls
        if known[self.kind] and self.transform.scope is not Scope.ELEMENTWISE:
            self._memory = Memory()
            self.transform = remembered(self.transform, self._memory)
        return known[self.kind]

    def stop(self, totals: Totals) -> Stop | None:
        """Run up to the first total that is not known; return where that was."""
        try:
            self(Supplied(totals))
        except StopError as stop:
            return stop.at
        return None

    def apply(self, totals: Totals, later: Later) -> list[Node]:
        """Run the update when all totals are known, and write what it returns."""
        moved, state = through(lambda reducer: self(reducer, last=True), totals)
        if self._memory is not None:
            self._memory.clear()
        return self.unit.write(moved, state, later)

    def __call__(
        self, reducer: Reducer, *, last: bool = False
    ) -> tuple[TensorMap, Any]:
        """Run the update; the last one of a step may overwrite the state."""
        updates = self.unit.updates(self._given.grads, again=self._again)
        self._again = True
        context = self._given.context.with_reducer(reducer)
        if self._memory is not None:  # What is remembered must not be written over.
            self._memory.restart()
            return self._updated(updates, context, last=last)
        with self._workspace:
            return self._updated(updates, context, last=last)

    def _updated(
        self, updates: TensorMap, context: Context, *, last: bool
    ) -> tuple[TensorMap, Any]:
        unit, update = self.unit, self.transform.update
        if self.alone:
            return self._with_companion(context)
        if self._given.scaling is None:
            state = unit.donated if last else unit.state
            return update(updates, state, unit.params, context=context)
        moved, new = update(updates, self._state(), unit.params, context=context)
        return moved, new[-1]

    def _state(self) -> Any:
        """Return the state in the form that the transform wants."""
        scaling = self._given.scaling
        if scaling is None:
            return self.unit.state
        return wrapped_state(self.unit.state, scaling.grad_scale)

    def _with_companion(self, context: Context) -> tuple[TensorMap, Any]:
        """Run without a gradient: one without elements goes along, so that it runs."""
        unit = self.unit
        param = next(iter(unit.params.values()))
        empty = param.new_empty(0)
        nodes: list[Node] = []
        for node, field in zip(nodes_of(unit.state), unit.fields, strict=True):
            if isinstance(node, dict) and node:
                entry = next(iter(node.values()))
                like_param = field.kind is Kind.ELEMENTWISE and not field.scalars
                beside = entry.new_empty(0) if like_param else entry
                nodes.append({**node, _COMPANION: beside})
            else:
                nodes.append(node)
        moved, state = self.transform.update(
            {_COMPANION: empty},
            rebuilt(unit.state, iter(nodes)),
            {**unit.params, _COMPANION: empty},
            context=context,
        )
        moved.pop(_COMPANION, None)
        return moved, state

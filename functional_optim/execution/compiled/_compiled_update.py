"""Run the update of a unit as compiled code.

All units of a bucket run the same code. Everything that changes from step to step goes
in as a tensor: hyperparameters, counts, totals.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._messages import first_line, user_stacklevel
from functional_optim.algebra._arithmetic import over
from functional_optim.core._context import Context
from functional_optim.core._transform import Static
from functional_optim.execution._grad_scaling import wrap_state
from functional_optim.execution._native import dtype_of
from functional_optim.execution._reductions import (
    CallRecorder,
    KnownTotals,
    Partial,
    TotalNeededError,
)
from functional_optim.execution._state_tree import Kind, nodes_of, rebuilt
from functional_optim.execution.compiled._constants import (
    as_tensors,
    is_frozen,
    with_constants,
)
from functional_optim.execution.compiled._kernels import CompiledPass
from functional_optim.execution.compiled._tracing import example_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._context import ReduceOp, Reducer
    from functional_optim.execution._reductions import ReduceCall, Totals, UnitUpdate
    from functional_optim.execution._state_tree import Field, Node
    from functional_optim.execution._unit_update import EagerUpdate, StepInputs
    from functional_optim.execution._units import Later
    from functional_optim.execution.compiled._kernels import BucketKernels

_MOST_KINDS = 16
"""Kinds of steps that are kept; where each is another, none comes again."""


class StepPass:
    """A compiled pass with the single numbers of a step."""

    __slots__ = ("call", "code", "crossing", "early", "op")

    def __init__(
        self,
        call: ReduceCall | None,
        code: CompiledPass,
        op: ReduceOp,
        short: list[Tensor],
    ) -> None:
        self.call, self.code, self.op = call, code, op
        self.crossing, self.early = code.run_prologue(short)


class CompiledStep:
    """The code and the numbers that all units of a bucket share in a step."""

    def __init__(
        self, kernels: BucketKernels, update: EagerUpdate, inputs: StepInputs
    ) -> None:
        self.kernels = kernels
        self._step_kind, self._known, self._unit = (
            update.kind,
            update.bucket.calls,
            update.unit,
        )
        self._transform = update.transform
        ((self._name, param),) = update.unit.params.items()
        self._kind, self._numbers = kernels.kind_of(update.transform, param)
        self._dtype = dtype_of(inputs.grads, update.unit.names[0])
        self._is_frozen = is_frozen(update.transform)
        self._made: dict[tuple[ReduceCall, ...], tuple[CompiledPass, ReduceOp]] = {}
        self._start(inputs)
        self._signature = self._signature_of()

    def _start(self, inputs: StepInputs) -> None:
        (param,) = self._unit.params.values()
        optional = inputs.context.loss, inputs.context.weight
        self._is_given = [x is not None for x in optional]
        tensors = as_tensors([x for x in optional if x is not None], param)
        self._context_tensors = [x.to(param.device) for x in tensors]
        self._context = inputs.context
        self._scaling = inputs.scaling
        self._passes: dict[int, StepPass] = {}
        self._is_shared = False

    def _signature_of(self) -> Hashable:
        tensors = [(x.dtype, x.device, x.shape) for x in self._context_tensors]
        return *self._is_given, *tensors

    def restart(self, update: EagerUpdate, inputs: StepInputs) -> bool:
        """Begin the next step, if it runs the same code as the last one."""
        same = self._is_frozen and update.transform is self._transform
        if not same or self.kernels.failure:
            return False
        self._start(inputs)
        return self._signature_of() == self._signature

    def finish(self) -> None:
        """Release the context of the step."""
        self._context = Context()
        self._scaling = None
        self._context_tensors = []
        self._passes = {}

    def calls(self) -> list[ReduceCall] | None:
        """Return the calls of `reduce`, recorded once; None if that failed."""
        if self._step_kind in self._known or self.kernels.failure:
            return self._known.get(self._step_kind)
        calls: list[ReduceCall] = []
        try:
            function = self._function(lambda _: CallRecorder(calls), [], [])
            with torch.random.fork_rng(devices=[]):  # It must not be seen.
                function(*map(example_of, self._examples()), *self._short({}))
        except Exception as error:
            self._fail(error)
            return None
        return self._known.setdefault(self._step_kind, calls)

    def next_pass(self, totals: Totals) -> StepPass | None:
        """Return the pass to the first unknown total, or the end; None if it failed."""
        known = self._passes.get(len(totals))
        if known is None and not self.kernels.failure:
            try:
                known = self._passes[len(totals)] = self._new_pass(totals)
            except Exception as error:
                self._fail(error)
        return known

    def _new_pass(self, totals: Totals) -> StepPass:
        calls = self._known[self._step_kind]
        own = {call: totals[call] for call in calls if call in totals}
        short = self._short(own)
        made = tuple(own)
        if made not in self._made:
            self._made[made] = self._compiled(made, short)
        code, op = self._made[made]
        call = next((call for call in calls if call not in own), None)
        return StepPass(call, code, op, short)

    def _compiled(
        self, known: tuple[ReduceCall, ...], short: list[Tensor]
    ) -> tuple[CompiledPass, ReduceOp]:
        """Return the code of a pass, and the operation of the total where it stops."""
        examples = self._examples()
        ops: list[ReduceOp] = ["sum"]
        cache = self.kernels.cache

        def make() -> tuple[CompiledPass, ReduceOp]:
            function = self._function(KnownTotals, list(known), ops)
            return CompiledPass(function, examples, short, cache.compiler), ops[-1]

        nodes = nodes_of(self._unit.state)
        key = (
            self._kind,
            self._step_kind,
            *self._is_given,
            len(known),
            tuple(len(node) if isinstance(node, dict) else -1 for node in nodes),
            # Whether these parameters are among the names of an open window.
            tuple(
                self._name in node.value
                for node in nodes
                if isinstance(node, Static) and isinstance(node.value, tuple)
            ),
            tuple((x.dtype, x.device, x.shape) for x in short),
            tuple((x.dtype, x.device) for x in examples),
        )
        return cache.get(key, make)

    def _examples(self) -> list[Tensor]:
        """Return tensors with the dtypes of gradient, parameter and state."""
        (param,) = self._unit.params.values()
        return [param.new_empty(0, dtype=self._dtype), *self._unit.long()]

    def _short(self, totals: Totals) -> list[Tensor]:
        """Return the inputs that are single numbers."""
        entries: list[Tensor] = []
        for field, node in zip(
            self._unit.fields, nodes_of(self._unit.state), strict=True
        ):
            if isinstance(node, Tensor):
                entries.append(node)
            elif field.kind is Kind.EACH and isinstance(node, dict):
                entries.extend(node.values())
        return [*entries, *self._numbers, *self._context_tensors, *totals.values()]

    def _fail(self, error: Exception) -> None:
        """Run this kind of transform without code from now on, with one warning."""
        why = first_line(error)
        failures = self.kernels.cache.failures
        self.kernels.failure = why
        if self._kind not in failures:
            warnings.warn(
                f"compile=True: no code could be made for {self._transform!r} ({why}); "
                "it runs without: the same update, only slower",
                stacklevel=user_stacklevel(),
            )
        failures[self._kind] = why

    def share(
        self, done: StepPass, late: Sequence[Tensor], later: Later
    ) -> list[Node] | None:
        """Keep the numbers of the new state that units share; return its nodes once."""
        if self._is_shared:
            return None
        self._is_shared = True
        unit, results = self._unit, iter(done.code.merge_results(late, done.early))
        nodes: list[Node] = []
        for field, node in zip(unit.fields, nodes_of(unit.state), strict=True):
            if isinstance(node, Tensor):
                nodes.append(next(results))
                continue
            nodes.append(node)
            if field.kind is Kind.EACH and isinstance(node, dict):
                for entry in node.values():
                    unit.share(entry, next(results), later)
        return nodes

    def _function(
        self,
        reducer: Callable[[Totals], Reducer],
        known: list[ReduceCall],
        ops: list[ReduceOp],
    ) -> Callable[..., list[Tensor]]:
        """Return a pass as a function of tensors.

        It returns the partial of a total, and leaves its operation in `ops`. The last
        one writes parameters and states, and returns the single numbers.
        """
        name, transform_now = self._name, self._transform
        now, scaling = self._context, self._scaling
        unit, nodes = self._unit, nodes_of(self._unit.state)

        def function(*tensors: Tensor) -> list[Tensor]:
            inputs = iter(tensors)
            grad, param = next(inputs), next(inputs)
            filled: dict[int, Node] = {}
            for kind in (Kind.ELEMENTWISE, Kind.EACH):
                for index, (field, node) in enumerate(
                    zip(unit.fields, nodes, strict=True)
                ):
                    if field.kind is kind and isinstance(node, dict):
                        filled[index] = {key: next(inputs) for key in node}
                    elif kind is Kind.EACH and isinstance(node, Tensor):
                        filled[index] = next(inputs)
            old = [filled.get(index, node) for index, node in enumerate(nodes)]
            transform = with_constants(transform_now, lambda _: next(inputs))
            changes: dict[str, Any] = {
                field_name: next(inputs)
                for field_name in ("loss", "weight")
                if getattr(now, field_name) is not None
            }
            totals = {call: next(inputs) for call in known}
            context = now.with_reducer(reducer(totals), **changes)
            state = rebuilt(unit.state, iter(old))
            if scaling is not None:
                state = wrap_state(state, scaling.grad_scale)
            try:
                moved, new = transform.update(
                    {name: grad}, state, {name: param}, context=context
                )
            except TotalNeededError as needed:
                ops.append(needed.partial.op)
                return [needed.partial.value]
            new = new if scaling is None else new[-1]
            return _write_results(moved, {name: param}, unit.fields, old, nodes_of(new))

        return function


def _write_results(
    moved: TensorMap,
    params: TensorMap,
    fields: list[Field],
    old: list[Node],
    new: list[Node],
) -> list[Tensor]:
    """Write parameters and states in a trace; return the single numbers of the state.

    A written tensor may be the old value of another entry, so all are read first.
    """
    if any(update.shape != params[name].shape for name, update in moved.items()):
        # The eager update says which parameter it is.
        raise ValueError("an update must keep its shape")
    results: list[Tensor] = []
    after = over(params, at=moved).add(moved).to_map(like=params)
    pairs = [(params[name], after[name]) for name in after]
    for field, before, node in zip(fields, old, new, strict=True):
        if isinstance(before, Tensor) and isinstance(node, Tensor):
            results.append(node)
        elif isinstance(before, dict) and isinstance(node, dict):
            for key, entry in before.items():
                if field.kind is Kind.EACH:
                    results.append(node[key])
                elif node[key] is not entry:
                    pairs.append((entry, node[key]))
    values = [value.clone() for _, value in pairs]
    for (home, _), value in zip(pairs, values, strict=True):
        home.copy_(value)
    return results


class CompiledUpdate:
    """One update of one unit in one step, by compiled code where that can be made."""

    def __init__(
        self, step: CompiledStep, update: EagerUpdate, grads: Mapping[str, Tensor]
    ) -> None:
        self.unit, self.key = update.unit, update.key
        self._step, self._eager, self._grads = step, update, grads
        self._long: list[Tensor] | None = None

    def calls(self) -> Sequence[ReduceCall]:
        """Return the calls of `reduce`."""
        calls = self._step.calls()
        return self._eager.calls() if calls is None else calls

    def partial(self, totals: Totals) -> Partial | None:
        """Run up to the first unknown total; return the unit's part of it."""
        found = self._step.next_pass(totals)
        if found is None or found.call is None:
            return self._eager.partial(totals)
        late = found.code(self._inputs(), found.crossing)
        (value,) = found.code.merge_results(late, found.early)
        return Partial(found.call, value, found.op)

    def apply(self, totals: Totals, later: Later) -> list[Node] | None:
        """Write the new parameters and state; return its nodes for one of the units."""
        found = self._step.next_pass(totals)
        if found is None:
            return self._eager.apply(totals, later)
        late = found.code(self._inputs(), found.crossing)
        self.unit.after_write()
        return self._step.share(found, late, later)

    def _inputs(self) -> list[Tensor]:
        if self._long is None or self.unit.pooled:
            again = self._long is not None
            (grad,) = self.unit.updates(self._grads, again=again).values()
            self._long = [_plain(grad), *self.unit.long()]
        return self._long


def _plain(grad: Tensor) -> Tensor:
    """Return a gradient with its own values one after the other in memory."""
    if grad.is_contiguous() and not grad.is_neg() and not grad._is_zerotensor():
        return grad
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device).copy_(grad)


def compile_update(
    update: EagerUpdate, inputs: StepInputs, steps: dict[Hashable, CompiledStep]
) -> UnitUpdate:
    """Return an update as compiled code, or itself where there is none."""
    kernels = update.bucket.kernels
    if kernels is None or kernels.failure:
        return update
    if not any(param.numel() for param in update.unit.params.values()):
        return update  # Code for any length is not code for none.
    key = update.key, dtype_of(inputs.grads, update.unit.names[0])
    if key not in steps:
        bucket_steps = update.bucket.compiled_steps
        known = bucket_steps.get(key)
        if known is None or not known.restart(update, inputs):
            if len(bucket_steps) >= _MOST_KINDS:
                bucket_steps.clear()
            known = bucket_steps[key] = CompiledStep(kernels, update, inputs)
        steps[key] = known
    return CompiledUpdate(steps[key], update, inputs.grads)

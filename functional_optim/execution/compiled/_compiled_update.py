"""Run the update of a unit as compiled code.

All units of a bucket run the same code. Everything that changes from step to step goes
in as a tensor: hyperparameters, counts, totals.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functional_optim._messages import first_line, user_stacklevel
from functional_optim.algebra._tensor_map import subset
from functional_optim.core._apply import added
from functional_optim.core._context import Context
from functional_optim.execution._grad_scaling import wrap_state
from functional_optim.execution._native import dtype_of
from functional_optim.execution._reductions import (
    CallRecorder,
    KnownTotals,
    Partial,
    TotalNeededError,
)
from functional_optim.execution._state_tree import LeafKind, flatten, unflatten
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
    from functional_optim.execution._state_tree import Leaf
    from functional_optim.execution._unit_update import EagerUpdate, StepInputs
    from functional_optim.execution._units import DeferredWrites
    from functional_optim.execution.compiled._kernels import BucketKernels

_MOST_KINDS = 16
"""Kinds of steps that are kept; where each is another, none comes again."""


class StepPass(NamedTuple):
    """A compiled pass with the single numbers of a step."""

    call: ReduceCall | None
    code: CompiledPass
    op: ReduceOp
    crossing: Sequence[Tensor]
    early: Sequence[Tensor]


class CompiledStep:
    """The code and the numbers that all units of a bucket share in a step."""

    def __init__(
        self, kernels: BucketKernels, update: EagerUpdate, inputs: StepInputs
    ) -> None:
        self._kernels, self._transform = kernels, update.transform
        self._unit, self._calls = update.unit, update.bucket.calls
        self._step_kind = update.kind
        ((self._name, self._param),) = update.unit.params.items()
        self._kind, self._numbers = kernels.kind_of(update.transform, self._param)
        self._dtype = dtype_of(inputs.grads, update.unit.names[0])
        self._is_frozen = is_frozen(update.transform)
        kinds = [info.kind for info in update.unit.infos]
        self._cut = [i for i, kind in enumerate(kinds) if kind is LeafKind.ELEMENTWISE]
        self._uncut = [
            i
            for i, kind in enumerate(kinds)
            if kind in {LeafKind.PER_PARAMETER, LeafKind.GLOBAL}
        ]
        self._compiled: dict[Hashable, tuple[CompiledPass, ReduceOp]] = {}
        self._start(inputs)

    def _start(self, inputs: StepInputs) -> None:
        self._context, self._scaling = inputs.context, inputs.scaling
        optional = inputs.context.loss, inputs.context.weight
        given = as_tensors([x for x in optional if x is not None], self._param)
        self._context_tensors = [x.to(self._param.device) for x in given]
        self._signature: Hashable = (
            *[x is not None for x in optional],
            *[(x.dtype, x.device, x.shape) for x in self._context_tensors],
        )
        self._passes: dict[int, StepPass] = {}
        self._is_shared = False

    def restart(self, update: EagerUpdate, inputs: StepInputs) -> bool:
        """Begin the next step, if it runs the same code as the last one."""
        same = self._is_frozen and update.transform is self._transform
        if not same or self._kernels.failure:
            return False
        signature = self._signature
        self._start(inputs)
        return self._signature == signature

    def finish(self) -> None:
        """Release the context of the step."""
        self._context, self._scaling = Context(), None
        self._context_tensors, self._passes = [], {}

    def calls(self) -> list[ReduceCall] | None:
        """Return the calls of `reduce`, recorded once; None if that failed."""
        if self._step_kind in self._calls or self._kernels.failure:
            return self._calls.get(self._step_kind)
        calls: list[ReduceCall] = []
        try:
            function = self._function(lambda _: CallRecorder(calls), (), [])
            with torch.random.fork_rng(devices=[]):  # It must not be seen.
                function(*map(example_of, self._examples()), *self._short({}))
        except Exception as error:
            self._fail(error)
            return None
        return self._calls.setdefault(self._step_kind, calls)

    def next_pass(self, totals: Totals) -> StepPass | None:
        """Return the pass to the first unknown total, or the end; None if it failed."""
        known = self._passes.get(len(totals))
        if known is None and not self._kernels.failure:
            try:
                known = self._passes[len(totals)] = self._new_pass(totals)
            except Exception as error:
                self._fail(error)
        return known

    def _new_pass(self, totals: Totals) -> StepPass:
        calls = self._calls[self._step_kind]
        own = {call: totals[call] for call in calls if call in totals}
        short, known = self._short(own), tuple(own)
        # A total has the widest dtype of its partials, and not all have one each step.
        key = known, tuple((x.dtype, x.shape) for x in short)
        if key not in self._compiled:
            self._compiled[key] = self._compile(known, short)
        code, op = self._compiled[key]
        call = next((call for call in calls if call not in own), None)
        return StepPass(call, code, op, *code.run_prologue(short))

    def _compile(
        self, known: tuple[ReduceCall, ...], short: list[Tensor]
    ) -> tuple[CompiledPass, ReduceOp]:
        """Return the code of a pass, and the operation of the total where it stops."""
        examples = self._examples()
        ops: list[ReduceOp] = ["sum"]
        cache = self._kernels.cache

        def make() -> tuple[CompiledPass, ReduceOp]:
            function = self._function(KnownTotals, known, ops)
            return CompiledPass(function, examples, short, cache.compiler), ops[-1]

        leaves = self._unit.leaves
        key = (
            self._kind,
            self._step_kind,
            self._signature,
            len(known),
            tuple(len(leaf) if isinstance(leaf, dict) else -1 for leaf in leaves),
            self._unit.listed,
            tuple((x.dtype, x.device, x.shape) for x in short),
            tuple((x.dtype, x.device) for x in examples),
        )
        return cache.get(key, make)

    def _examples(self) -> list[Tensor]:
        """Return tensors like gradient, parameter and elementwise state."""
        return [self._param.new_empty(0, dtype=self._dtype), *self._unit.long()]

    def _short(self, totals: Totals) -> list[Tensor]:
        """Return the inputs that are single numbers."""
        leaves: list[Any] = self._unit.leaves
        short: list[Tensor] = []
        for index in self._uncut:
            leaf = leaves[index]
            short += leaf.values() if isinstance(leaf, dict) else [leaf]
        return [*short, *self._numbers, *self._context_tensors, *totals.values()]

    def _fail(self, error: Exception) -> None:
        """Run this kind of transform without code from now on, with one warning."""
        why = first_line(error)
        failures = self._kernels.cache.failures
        self._kernels.failure = why
        if self._kind not in failures:
            warnings.warn(
                f"compile=True: no code could be made for {self._transform!r} ({why}); "
                "it runs without: the same update, only slower",
                stacklevel=user_stacklevel(),
            )
        failures[self._kind] = why

    def share(
        self, done: StepPass, late: Sequence[Tensor], deferred: DeferredWrites
    ) -> list[Leaf] | None:
        """Keep the numbers of the new state that units share; return it once."""
        if self._is_shared:
            return None
        self._is_shared = True
        results = iter(done.code.merge_results(late, done.early))
        leaves = list(self._unit.leaves)
        for index in self._uncut:
            leaf = leaves[index]
            if isinstance(leaf, dict):
                for entry in leaf.values():
                    self._unit.share(entry, next(results), deferred)
            else:
                leaves[index] = next(results)
        return leaves

    def _function(
        self,
        reducer: Callable[[Totals], Reducer],
        known: tuple[ReduceCall, ...],
        ops: list[ReduceOp],
    ) -> Callable[..., list[Tensor]]:
        """Return a pass as a function of tensors.

        It returns the partial of a total, and leaves its operation in `ops`. The last
        one writes parameters and states, and returns the single numbers.
        """
        name, old_transform = self._name, self._transform
        context_now, scaling = self._context, self._scaling
        template, cut, uncut = self._unit.state, self._cut, self._uncut

        def function(*tensors: Tensor) -> list[Tensor]:
            inputs = iter(tensors)
            grad, param = next(inputs), next(inputs)
            old: list[Any] = flatten(template)
            for index in [*cut, *uncut]:
                leaf = old[index]
                if isinstance(leaf, dict):
                    old[index] = {key: next(inputs) for key in leaf}
                else:
                    old[index] = next(inputs)
            transform = with_constants(old_transform, lambda _: next(inputs))
            changes: dict[str, Any] = {
                field: next(inputs)
                for field in ("loss", "weight")
                if getattr(context_now, field) is not None
            }
            totals = {call: next(inputs) for call in known}
            context = context_now.with_reducer(reducer(totals), **changes)
            state = unflatten(template, old)
            if scaling is not None:
                state = wrap_state(state, scaling.grad_scale)
            try:
                moved, new_state = transform.update(
                    {name: grad}, state, {name: param}, context=context
                )
            except TotalNeededError as needed:
                ops.append(needed.partial.op)
                return [needed.partial.value]
            new: list[Any] = flatten(new_state if scaling is None else new_state[-1])
            if len(new) != len(old) or any(
                u.shape != param.shape for u in moved.values()
            ):
                raise ValueError("an update must keep its shape")  # Eager says more.
            _write({name: param}, moved, [(old[i], new[i]) for i in cut])
            numbers: list[Tensor] = []
            for index in uncut:
                before, after = old[index], new[index]
                is_map = isinstance(before, dict)
                numbers += [after[key] for key in before] if is_map else [after]
            return numbers

        return function


def _write(
    params: TensorMap, moved: TensorMap, states: list[tuple[TensorMap, TensorMap]]
) -> None:
    """Write parameters and elementwise state in a trace.

    A written tensor may be the old value of another entry, so all are read first.
    """
    updated = added(subset(params, moved), moved)
    pairs = [(params[name], param) for name, param in updated.items()]
    for old, new in states:
        pairs += [(old[key], new[key]) for key in old if new[key] is not old[key]]
    values = [value.clone() for _, value in pairs]
    for (home, _), value in zip(pairs, values, strict=True):
        home.copy_(value)


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

    def apply(self, totals: Totals, deferred: DeferredWrites) -> list[Leaf] | None:
        """Write new parameters and state; return the new state of one of the units."""
        found = self._step.next_pass(totals)
        if found is None:
            return self._eager.apply(totals, deferred)
        late = found.code(self._inputs(), found.crossing)
        self.unit.after_write()
        return self._step.share(found, late, deferred)

    def _inputs(self) -> list[Tensor]:
        if self._long is None or self.unit.packs:
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
    unit = update.unit
    key = update.key, dtype_of(inputs.grads, unit.names[0]), unit.listed
    if key not in steps:
        bucket_steps = update.bucket.compiled_steps
        known = bucket_steps.get(key)
        if known is None or not known.restart(update, inputs):
            if len(bucket_steps) >= _MOST_KINDS:
                bucket_steps.clear()
            known = bucket_steps[key] = CompiledStep(kernels, update, inputs)
        steps[key] = known
    return CompiledUpdate(steps[key], update, inputs.grads)

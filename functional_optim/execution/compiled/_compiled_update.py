"""What the units of a bucket have in common in a compiled step.

All run the same code. Everything that changes from step to step goes in as a tensor:
hyperparameters, counts, totals.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._messages import first_line, user_stacklevel
from functional_optim.algebra._arithmetic import over
from functional_optim.core._context import Context
from functional_optim.core._transform import Static
from functional_optim.execution._grad_scaling import wrapped_state
from functional_optim.execution._native import dtype_of
from functional_optim.execution._reductions import Recorded, Stop, StopError, Supplied
from functional_optim.execution._state_tree import Kind, nodes_of, rebuilt
from functional_optim.execution.compiled._constants import (
    as_tensors,
    is_frozen,
    lowered,
)
from functional_optim.execution.compiled._kernels import Code, Codes, Library
from functional_optim.execution.compiled._tracing import example_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._context import ReduceOp, Reducer
    from functional_optim.execution._reductions import Call, Totals
    from functional_optim.execution._state_tree import Field, Node
    from functional_optim.execution._unit_update import Given, Run
    from functional_optim.execution._units import Later
    from functional_optim.execution.compiled._kernels import Compiler


class Pass:
    """A pass of a step: its code, and the numbers that it runs with."""

    __slots__ = ("call", "code", "crossing", "early", "op")

    def __init__(
        self, call: Call | None, code: Code, op: ReduceOp, numbers: tuple[Any, Any]
    ) -> None:
        self.call, self.code, self.op = call, code, op
        self.crossing, self.early = numbers


class CompiledStep:
    """What the units of a bucket have in common in a step."""

    def __init__(self, codes: Codes, run: Run, given: Given) -> None:
        self.codes = codes
        self._run_key, self._known, self._unit = run.key, run.bucket.calls, run.unit
        self._transform = run.transform
        ((self._name, param),) = run.unit.params.items()
        self._kind, self._numbers = codes.kind_of(run.transform, param)
        self._dtype = dtype_of(given.grads, run.unit.names[0])
        self._is_frozen = is_frozen(run.transform)
        self._made: dict[tuple[Call, ...], tuple[Call | None, Code, ReduceOp]] = {}
        self._start(given)
        self._signature = self._signature_of()

    def _start(self, given: Given) -> None:
        (param,) = self._unit.params.values()
        told = given.context.loss, given.context.weight
        self._has_told = [x is not None for x in told]
        beside = as_tensors([x for x in told if x is not None], param)
        self._beside = [x.to(param.device) for x in beside]
        self._context = given.context
        self._scaling = given.scaling
        self._passes: dict[int, Pass] = {}
        self.is_told = False
        """Whether a unit has given the state that all share."""

    def _signature_of(self) -> Hashable:
        beside = [(x.dtype, x.device, x.shape) for x in self._beside]
        return *self._has_told, *beside

    def restart(self, run: Run, given: Given) -> bool:
        """Go on to the next step, if it is like the last one."""
        same = self._is_frozen and run.transform is self._transform
        if not same or self.codes.failure:
            return False
        self._start(given)
        return self._signature_of() == self._signature

    def calls(self) -> list[Call]:
        """Return the calls of `reduce`: always the same, so tried once."""
        if self._run_key not in self._known:
            calls: list[Call] = []
            try_out = self._function(lambda _: Recorded(calls), [], [])
            with torch.random.fork_rng(devices=[]):  # It must not be seen.
                try_out(*[example_of(x) for x in self._examples()], *self._short({}))
            self._known[self._run_key] = calls
        return self._known[self._run_key]

    def _examples(self) -> list[Tensor]:
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
        return [*entries, *self._numbers, *self._beside, *totals.values()]

    def next_pass(self, totals: Totals) -> Pass:
        """Return the pass to the first total that is not known, or the last one."""
        if len(totals) not in self._passes:
            self._passes[len(totals)] = self._new_pass(totals)
        return self._passes[len(totals)]

    def _new_pass(self, totals: Totals) -> Pass:
        own = {call: totals[call] for call in self.calls() if call in totals}
        short = self._short(own)
        made = tuple(own)
        if made not in self._made:
            self._made[made] = self._made_for(made, short)
        call, code, op = self._made[made]
        return Pass(call, code, op, code.numbers(short))

    def _made_for(
        self, known: tuple[Call, ...], short: list[Tensor]
    ) -> tuple[Call | None, Code, ReduceOp]:
        """Return where a pass ends, its code, and what it brings to a total."""
        examples = self._examples()
        ops: list[ReduceOp] = ["sum"]

        def make() -> tuple[Code, ReduceOp]:
            function = self._function(Supplied, list(known), ops)
            code = Code(function, examples, short, self.codes.library.compiler)
            return code, ops[-1]

        entries = [
            len(node) if isinstance(node, dict) else -1
            for node in nodes_of(self._unit.state)
        ]
        # Whether these parameters are among the names of an open window.
        listed = [
            self._name in node.value
            for node in nodes_of(self._unit.state)
            if isinstance(node, Static) and isinstance(node.value, tuple)
        ]
        inputs = [(x.dtype, x.device, x.shape) for x in short]
        inputs += [(x.dtype, x.device, torch.Size()) for x in examples]
        key = (
            self._kind,
            self._run_key,
            *self._has_told,
            len(known),
            tuple(entries),
            tuple(listed),
            tuple(inputs),
        )
        code, op = self.codes.library.code(key, make)
        call = next((call for call in self.calls() if call not in known), None)
        return call, code, op

    def finish(self) -> None:
        """Let go of what the step was given."""
        self._context = Context()
        self._scaling = None
        self._beside = []
        self._passes = {}

    def fail(self, error: Exception) -> None:
        """Let this kind of transform run without code from now on, and say so."""
        why = first_line(error)
        failures = self.codes.library.failures
        self.codes.failure = why
        if self._kind not in failures:
            warnings.warn(
                f"compile=True: no code could be made for {self._transform!r} ({why}); "
                "it runs without: the same update, only slower",
                stacklevel=user_stacklevel(),
            )
        failures[self._kind] = why

    def share(self, done: Pass, late: Sequence[Tensor], later: Later) -> list[Node]:
        """Keep the single numbers of the new state; return its nodes."""
        unit, results = self._unit, iter(done.code.results(late, done.early))
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
        known: list[Call],
        ops: list[ReduceOp],
    ) -> Callable[..., list[Tensor]]:
        """Return a pass as a function of tensors.

        It returns what the units bring to a total, and leaves its operation in `ops`.
        The last one writes parameters and states, and returns the single numbers.
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
            transform = lowered(transform_now, lambda _: next(inputs))
            changes: dict[str, Any] = {}
            for field_name in ("loss", "weight"):
                if getattr(now, field_name) is not None:
                    changes[field_name] = next(inputs)
            totals = {call: next(inputs) for call in known}
            context = now.with_reducer(reducer(totals), **changes)
            state = rebuilt(unit.state, iter(old))
            if scaling is not None:
                state = wrapped_state(state, scaling.grad_scale)
            try:
                moved, new = transform.update(
                    {name: grad}, state, {name: param}, context=context
                )
            except StopError as stop:
                ops.append(stop.at.op)
                return [stop.at.partial]
            new = new if scaling is None else new[-1]
            return _written(moved, {name: param}, unit.fields, old, nodes_of(new))

        return function


def _written(
    moved: TensorMap,
    params: TensorMap,
    fields: list[Field],
    old: list[Node],
    new: list[Node],
) -> list[Tensor]:
    """Write parameters and states in a trace; return the single numbers of the state.

    What is written may be what another entry was, so all is read first.
    """
    if any(update.shape != params[name].shape for name, update in moved.items()):
        # The run without code says whose it is.
        raise ValueError("an update must keep its shape")
    results: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    after = over(params, at=moved).add(moved).to_map(like=params)
    pairs += [(params[name], after[name]) for name in after]
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


_MOST_KINDS = 16
"""Kinds of steps that are known; where each is another, none comes again."""


class CompiledRun:
    """One update of one unit in one step; what `Run` is, compiled."""

    def __init__(
        self, step: CompiledStep, run: Run, grads: Mapping[str, Tensor]
    ) -> None:
        self.bucket, self.unit, self.key = run.bucket, run.unit, run.key
        self._step, self._run, self._grads = step, run, grads
        self._long: list[Tensor] | None = None

    def calls(self) -> Sequence[Call]:
        """Return the calls of `reduce`."""
        if not self._step.codes.failure:
            try:
                return self._step.calls()
            except Exception as error:
                self._step.fail(error)
        return self._run.calls()

    def prepare(self, totals: Totals) -> None:
        """Compile the last pass, before anything is written."""
        self._next_pass(totals)

    def _next_pass(self, totals: Totals) -> Pass | None:
        """Return the next pass, None if there is no code for it."""
        step = self._step
        if step.codes.failure:
            return None
        try:
            return step.next_pass(totals)
        except Exception as error:
            self._step.fail(error)
            return None

    def _inputs(self) -> list[Tensor]:
        if self._long is None or self.unit.pooled:
            again = self._long is not None
            (grad,) = self.unit.updates(self._grads, again=again).values()
            self._long = [_plain(grad), *self.unit.long()]
        return self._long

    def __call__(self, reducer: Reducer) -> Any:
        """Run up to the first total that is not known, and stop there."""
        if isinstance(reducer, Supplied):
            stop = self._stopped(reducer.totals)
            if stop is not None:
                raise StopError(stop)
        return self._run(reducer)

    def stop(self, totals: Totals) -> Stop | None:
        """Run up to the first total that is not known; return where that was."""
        return self._stopped(totals) or self._run.stop(totals)

    def _stopped(self, totals: Totals) -> Stop | None:
        """Return where the code stops, None if there is none or it does not."""
        found = self._next_pass(totals)
        if found is None or found.call is None:
            return None
        late = found.code(self._inputs(), found.crossing)
        (partial,) = found.code.results(late, found.early)
        return Stop(found.call, partial, found.op)

    def apply(self, totals: Totals, later: Later) -> list[Node] | None:
        """Move parameters and state."""
        found = self._next_pass(totals)
        if found is None:
            return self._run.apply(totals, later)
        late = found.code(self._inputs(), found.crossing)
        self.unit.after_write()
        if self._step.is_told:
            return None
        self._step.is_told = True
        return self._step.share(found, late, later)


def _plain(grad: Tensor) -> Tensor:
    """Return a gradient whose memory holds its numbers, one after the other."""
    if grad.is_contiguous() and not grad.is_neg() and not grad._is_zerotensor():
        return grad
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device).copy_(grad)


class Compiling:
    """Lets code run in the place of transforms, where it can be made."""

    def __init__(self, compiler: Compiler) -> None:
        self._library = Library(compiler)

    def codes(self) -> Codes:
        """Return the code of a new bucket: none yet."""
        return Codes(self._library)

    def run(
        self, run: Run, given: Given, steps: dict[Hashable, CompiledStep]
    ) -> Run | CompiledRun:
        """Return what runs in the place of a run, or itself."""
        codes = run.bucket.codes
        if codes is None or codes.failure or run.alone:
            return run
        if not any(param.numel() for param in run.unit.params.values()):
            return run  # Code for any length is not code for none.
        key = id(run.bucket), run.key, dtype_of(given.grads, run.unit.names[0])
        if key not in steps:
            known = run.bucket.steps.get(key)
            if known is None or not known.restart(run, given):
                if len(run.bucket.steps) >= _MOST_KINDS:
                    run.bucket.steps.clear()
                known = run.bucket.steps[key] = CompiledStep(codes, run, given)
            steps[key] = known
        return CompiledRun(steps[key], run, given.grads)


def with_inductor() -> Compiling:
    """Return what makes code by TorchInductor."""
    inductor = importlib.import_module("functional_optim.execution.compiled._inductor")
    return Compiling(inductor.compiled)

"""Updates of units as compiled code: what runs in the place of `Run`.

All units of a bucket run the same code, made once for a kind of transform. Everything
that changes from step to step goes in as a tensor: hyperparameters, counts, totals.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._tensor_map import over
from functional_optim._value import same_for_good
from functional_optim.execution._guard import wrapped_state
from functional_optim.execution._inductor import compiled
from functional_optim.execution._lifting import lifted, lowered
from functional_optim.execution._nodes import Kind, nodes_of, rebuilt
from functional_optim.execution._passes import Recorded, StopError, Supplied
from functional_optim.execution._tracing import example_of, traced

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from functional_optim._context import Reducer, ReduceOp
    from functional_optim._types import TensorMap, Transform
    from functional_optim.execution._lifting import Number
    from functional_optim.execution._nodes import Field, Node
    from functional_optim.execution._passes import Call, Totals
    from functional_optim.execution._runs import Given, Run
    from functional_optim.execution._units import Later, Unit


class Code:
    """One pass over units as code: numbers first, then every unit.

    Args:
        function: What it does, a function of tensors.
        long: Its first inputs for one of the units.
        short: Its other inputs.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        long: list[Tensor],
        short: list[Tensor],
    ) -> None:
        self._graph = traced(function, long, short)
        self._kernel = compiled(self._graph)

    def numbers(self, long: list[Tensor], short: list[Tensor]) -> tuple[Any, Any]:
        """Return what the kernel needs to know, and results that do not need it."""
        told: tuple[Any, Any] = self._graph.prologue(*long, *short)
        return told

    def __call__(self, long: list[Tensor], told: tuple[Any, Any]) -> list[Tensor]:
        """Run on a unit; returns the results in order."""
        crossing, results = told
        inputs = [long[place] for place in self._graph.long]
        # A kernel for any length may not be one for none.
        kernel = self._kernel if inputs and inputs[0].numel() else self._graph.kernel
        of_kernel, of_prologue = iter(kernel(*inputs, *crossing)), iter(results)
        return [
            next(of_kernel) if is_late else next(of_prologue)
            for is_late in self._graph.results
        ]


class Codes:
    """The code of a bucket, made when it is first needed.

    Attributes:
        failed: Whether this bucket runs without.
    """

    def __init__(self) -> None:
        self.failed = False
        self._kinds: list[Any] = []
        self._codes: dict[Hashable, tuple[Code, ReduceOp]] = {}
        self._numbers: tuple[tuple[Number, ...], list[Tensor]] = ((), [])

    def kind_of(self, transform: Transform, like: Tensor) -> tuple[int, list[Tensor]]:
        """Return which kind of transform it is, and its numbers as tensors.

        Args:
            transform: The transform, resolved.
            like: A tensor on the device of the bucket.
        """
        kind, found = lifted(transform)
        numbers = tuple(found)
        if not same_for_good(numbers, self._numbers[0]):
            tensors = [
                number
                if isinstance(number, Tensor)
                else torch.tensor(number, dtype=torch.float64, device=like.device)
                for number in numbers
            ]
            self._numbers = numbers, tensors
        for index, other in enumerate(self._kinds):
            if same_for_good(other, kind):
                return index, self._numbers[1]
        self._kinds.append(kind)
        return len(self._kinds) - 1, self._numbers[1]

    def code(
        self, key: Hashable, make: Callable[[], tuple[Code, ReduceOp]]
    ) -> tuple[Code, ReduceOp]:
        """Return code by its key; made if there is none.

        Raises:
            Exception: it cannot be made.
        """
        if key not in self._codes:
            self._codes[key] = make()
        return self._codes[key]


class CompiledStep:
    """What the units of a bucket have in common in a step.

    Args:
        codes: The code of the bucket.
        run: One of the runs.
        transform: What they run.
        given: What the step was given.
    """

    def __init__(
        self, codes: Codes, run: Run, transform: Transform, given: Given
    ) -> None:
        self.codes = codes
        self._run, self._unit = run, run.unit
        self._transform, self._given = transform, given
        ((self._name, param),) = run.unit.params.items()
        kind, self._numbers = codes.kind_of(transform, param)
        told = given.context.loss, given.context.weight
        self._beside = [
            torch.as_tensor(x, device=param.device) for x in told if x is not None
        ]
        self._dtype = next(given.grads[n].dtype for n in run.unit.names)
        self._key = kind, run.key, self._dtype, tuple(x is None for x in told)
        self._passes: dict[int, tuple[Code, ReduceOp, Any]] = {}

    def calls(self) -> list[Call]:
        """Return the calls of `reduce`: always the same, so tried once."""
        known = self._run.bucket.calls
        if self._run.key not in known:
            calls: list[Call] = []
            try_out = self._function(lambda _: Recorded(calls), [], [])
            try_out(*map(example_of, self._examples()), *self._short({}))
            known[self._run.key] = calls
        return known[self._run.key]

    def long(self, unit: Unit, grad: Tensor) -> list[Tensor]:
        """Return the inputs that are as long as a unit."""
        entries = [
            entry
            for field, node in zip(unit.fields, nodes_of(unit.state), strict=True)
            if field.kind is Kind.ELEMENTWISE and isinstance(node, dict)
            for entry in node.values()
        ]
        return [grad, *unit.params.values(), *entries]

    def _examples(self) -> list[Tensor]:
        (param,) = self._unit.params.values()
        return self.long(self._unit, param.new_empty(0, dtype=self._dtype))

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

    def code(self, totals: Totals) -> tuple[Code, ReduceOp, Any]:
        """Return the next pass, the operation of its total, and its numbers.

        Args:
            totals: All totals that are known.

        Raises:
            Exception: it cannot be compiled.
        """
        own = {call: totals[call] for call in self.calls() if call in totals}
        place = len(own)
        if place not in self._passes:
            short = self._short(own)
            ops: list[ReduceOp] = ["sum"]

            def make() -> tuple[Code, ReduceOp]:
                function = self._function(Supplied, list(own), ops)
                return Code(function, self._examples(), short), ops[-1]

            code, op = self.codes.code((*self._key, place), make)
            self._passes[place] = code, op, code.numbers(self._examples(), short)
        return self._passes[place]

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
        name, given = self._name, self._given
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
            transform = lowered(self._transform, lambda _: next(inputs))
            changes: dict[str, Any] = {}
            for field_name in ("loss", "weight"):
                if getattr(given.context, field_name) is not None:
                    changes[field_name] = next(inputs)
            totals = {call: next(inputs) for call in known}
            context = given.context.with_reducer(reducer(totals), **changes)
            state = rebuilt(unit.state, iter(old))
            if given.scaling is not None:
                state = wrapped_state(state, given.scaling.grad_scale)
            try:
                moved, new = transform.update(
                    {name: grad}, state, {name: param}, context=context
                )
            except StopError as stop:
                ops.append(stop.op)
                return [stop.partial]
            new = new if given.scaling is None else new[-1]
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


class CompiledRun:
    """One update of one unit in one step; what `Run` is, compiled.

    Args:
        step: What it has in common with others.
        run: The run that it stands for, and falls back to.
        grads: Gradients by name.
    """

    def __init__(self, step: CompiledStep, run: Run, grads: TensorMap) -> None:
        self.bucket, self.unit, self.key = run.bucket, run.unit, run.key
        self._step, self._run, self._grads = step, run, grads
        self._again = False

    def calls(self) -> Sequence[Call]:
        """Return the calls of `reduce`."""
        return self._tried(self._step.calls) or self._run.calls()

    def prepare(self, totals: Totals) -> None:
        """Compile the last pass, before anything is written."""
        self._tried(lambda: self._step.code(totals))

    def _tried(self, make: Callable[[], Any]) -> Any:
        """Return something that may fail to compile; None if it did."""
        codes = self._step.codes
        if codes.failed:
            return None
        try:
            return make()
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises
            codes.failed = True
            warn_of_failure(error)
            return None

    def _long(self) -> list[Tensor]:
        (grad,) = self.unit.updates(self._grads, again=self._again).values()
        self._again = True
        return self._step.long(self.unit, grad)

    def __call__(self, reducer: Reducer) -> Any:
        """Run up to the first total that is not known, and stop there."""
        totals = reducer.totals if isinstance(reducer, Supplied) else {}
        found = self._tried(lambda: self._step.code(totals))
        if found is None:
            return self._run(reducer)
        code, op, told = found
        (partial,) = code(self._long(), told)
        call = next(call for call in self.calls() if call not in totals)
        raise StopError(call, partial, op)

    def apply(self, totals: Totals, later: Later) -> list[Node]:
        """Move parameters and state; return the nodes of the new state."""
        found = self._tried(lambda: self._step.code(totals))
        if found is None:
            return self._run.apply(totals, later)
        code, _, told = found
        results = iter(code(self._long(), told))
        nodes: list[Node] = []
        for field, node in zip(self.unit.fields, nodes_of(self.unit.state), strict=True):
            if isinstance(node, Tensor):
                nodes.append(next(results))
            elif field.kind is Kind.EACH and isinstance(node, dict):
                for entry in node.values():
                    self.unit.share(entry, next(results), later)
                nodes.append(node)
            else:
                nodes.append(node)
        self.unit.put_back()
        return nodes


def warn_of_failure(error: Exception) -> None:
    """Warn that steps run without compiled code."""
    lines = str(error).strip().splitlines() or [""]
    warnings.warn(
        f"compile=True: no code could be made, so this runs without, with the same "
        f"results ({type(error).__name__}: {lines[0]})",
        stacklevel=2,
    )

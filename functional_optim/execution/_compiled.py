"""Updates of units as compiled code: what runs in the place of `Run`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.execution._reductions import Stop, StopError, Supplied
from functional_optim.execution._scanning import dtype_of
from functional_optim.execution.compiled._compiled_update import CompiledStep
from functional_optim.execution.compiled._kernels import Codes, Library

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from functional_optim.core._context import Reducer
    from functional_optim.execution._reductions import Call, Totals
    from functional_optim.execution._state_tree import Node
    from functional_optim.execution._unit_update import Given, Run
    from functional_optim.execution._units import Later
    from functional_optim.execution.compiled._compiled_update import Pass
    from functional_optim.execution.compiled._kernels import Compiler


_MOST_KINDS = 16
"""Kinds of steps that are known; where each is another, none comes again."""


class CompiledRun:
    """One update of one unit in one step; what `Run` is, compiled.

    Args:
        step: What it has in common with others.
        run: The run that it stands for, and falls back to.
        grads: Gradients by name.
    """

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
        """Move parameters and state.

        Returns:
            The nodes of the new state; None if another unit told them.
        """
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
    """Lets code run in the place of transforms, where it can be made.

    Args:
        compiler: Makes it.
    """

    def __init__(self, compiler: Compiler) -> None:
        self._library = Library(compiler)

    def codes(self) -> Codes:
        """Return the code of a new bucket: none yet."""
        return Codes(self._library)

    def run(
        self, run: Run, given: Given, steps: dict[Hashable, CompiledStep]
    ) -> Run | CompiledRun:
        """Return what runs in the place of a run, or itself.

        Args:
            run: The run.
            given: What the step was given.
            steps: What runs of this step have in common; it fills up.
        """
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

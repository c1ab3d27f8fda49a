"""Run a transform in place on parameters, unit by unit.

Temporary memory is that of one unit, not of the model; but results of members that look
at whole tensors in front of a total are kept until that total is known.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from functional_optim.algebra._buffers import Workspace
from functional_optim.algebra._scalars import memoize_scalars
from functional_optim.core._context import Context
from functional_optim.core._traversal import walk
from functional_optim.execution._accumulation import (
    AccumulationTracker,
    check_accumulation,
)
from functional_optim.execution._grad_scaling import Scaling, with_grad_scaling
from functional_optim.execution._plan import Plan
from functional_optim.execution._reductions import totals_of
from functional_optim.execution._state_tree import ExecutorState, LeafKind, clone_if_in
from functional_optim.execution._tensor_memory import storage_ptr
from functional_optim.execution._unit_update import EagerUpdate, StepInputs
from functional_optim.execution._units import ExecutionOptions
from functional_optim.execution.compiled._compiled_update import compile_update

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform
    from functional_optim.execution._plan import Bucket
    from functional_optim.execution._reductions import UnitUpdate
    from functional_optim.execution._state_tree import Leaf
    from functional_optim.execution._units import DeferredWrites, Unit
    from functional_optim.execution.compiled._compiled_update import CompiledStep


class Executor:
    """Runs a transform in place."""

    def __init__(
        self,
        params: TensorMap,
        transforms: list[Transform],
        group_of: Mapping[str, int],
        state: Any,
        *,
        options: ExecutionOptions | None = None,
        check_totals: Callable[[], None] = lambda: None,
    ) -> None:
        transform, options = transforms[0], options or ExecutionOptions()
        check_accumulation(transform)
        self._params, self._check_totals = params, check_totals
        self._workspace = Workspace()
        self.state = ExecutorState(transform, state, params)
        """The whole state; its tensors stay the same from step to step."""
        kinds = {info.kind for info in self.state.infos}
        self._has_global = LeafKind.GLOBAL in kinds
        self._tracker: AccumulationTracker | None = None
        if LeafKind.STATIC in kinds:
            self._tracker = AccumulationTracker(transform, self.state.tree, params)
        self._may_raise = any(
            getattr(stage.transform, "error_if_nonfinite", False)
            for stage in walk(transform, self.state.tree, params)
        )
        self._compiles = options.kernels is not None and not self._may_raise
        self._plan = Plan(params, transforms, group_of, self.state, options)

    @property
    def holds(self) -> bool:
        """Whether a step may emit nothing."""
        return self._tracker is not None

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets of the plan."""
        return self._plan.buckets

    def check(self, leaves: list[Leaf]) -> None:
        """Refuse a state that the transform cannot continue from."""
        if self._tracker is not None:
            dtypes = {name: param.dtype for name, param in self._params.items()}
            self._tracker.effect_of(dtypes, leaves)

    def load(self, leaves: list[Leaf]) -> None:
        """Copy the numbers of other leaves; see `ExecutorState`."""
        with torch.inference_mode(mode=False):
            self.state.load(leaves)
        self._plan.renew()

    def set_transforms(self, transforms: list[Transform]) -> None:
        """Go on with other hyperparameters."""
        self._plan.set_transforms(transforms)

    def step(
        self,
        grads: Mapping[str, Tensor],
        *,
        context: Context,
        scaling: Scaling | None = None,
    ) -> None:
        """Move parameters and state by one update."""
        if not grads:
            return
        dtypes = self._plan.dtypes_of(grads)
        effect = None
        if self._tracker is not None:
            leaves = self.state.leaves
            effect = self._tracker.effect_of(dtypes, leaves, last=context.last)
            missing = [name for name in effect.moved if dtypes[name] is None]
            if missing:  # -0.0 changes no sum.
                zeros = {n: torch.full_like(self._params[n], -0.0) for n in missing}
                grads = {**grads, **zeros}
        self._plan.follow(dtypes)
        steps: dict[Hashable, CompiledStep] = {}
        updates = self._updates(StepInputs(grads, context, scaling), steps)
        try:
            with memoize_scalars():
                self._run(updates, steps)
        finally:
            for step in steps.values():
                step.finish()
        self._plan.keep_versions()
        if effect is not None and self.state.set_statics(effect.statics):
            for _, unit in self._plan.units:
                unit.set_statics(effect.statics)

    def _updates(
        self, inputs: StepInputs, steps: dict[Hashable, CompiledStep]
    ) -> list[UnitUpdate]:
        """Return the updates of the units that have gradients."""
        grads, scaling = inputs.grads, inputs.scaling
        transforms = {id(b): b.transform for b in self._plan.buckets}
        if scaling is not None:
            transforms = {
                key: with_grad_scaling(it, scaling.grad_scale, scaling.found_inf)
                for key, it in transforms.items()
            }
        unscales = scaling is not None and scaling.grad_scale is not None
        kind = self.state.statics, inputs.context.last, scaling is None, unscales
        # A dispatch mode, as of make_fx, would not see what compiled code does.
        compiles = self._compiles and not is_in_torch_dispatch_mode()
        updates: list[UnitUpdate] = []
        for bucket, unit in self._plan.units:
            if not any(name in grads for name in unit.names):
                continue
            # Parts of a whole may be reached by some names only.
            own = kind, tuple(grads) if bucket.whole else ()
            transform = transforms[id(bucket)]
            update = EagerUpdate(
                bucket, unit, transform, self._workspace, inputs, kind=own
            )
            updates.append(
                compile_update(update, inputs, steps) if compiles else update
            )
        return updates

    def _run(
        self, updates: list[UnitUpdate], steps: Mapping[Hashable, CompiledStep]
    ) -> None:
        """Run updates, and write their results."""
        totals = totals_of(updates)
        if totals:
            self._check_totals()
        # Errors over a total, and of compilers, come before anything is overwritten.
        if self._may_raise:
            for update in {update.key: update for update in updates}.values():
                update.partial(totals)
        for step in steps.values():
            step.next_pass(totals)
        deferred: DeferredWrites = {}
        for update in updates:
            leaves = update.apply(totals, deferred)
            if self._has_global and leaves is not None:
                self._collect(update.unit, leaves, deferred)
        homes = {storage_ptr(old) for old, _ in deferred.values()}
        values = [(old, clone_if_in(new, homes)) for old, new in deferred.values()]
        for old, new in values:
            old.copy_(new)

    def _collect(
        self, unit: Unit, leaves: list[Leaf], deferred: DeferredWrites
    ) -> None:
        """Keep the new tensors of the transform as a whole that a unit has computed."""
        for info, old, new in zip(
            self.state.infos, self.state.leaves, leaves, strict=True
        ):
            if new is old or not isinstance(old, Tensor) or id(old) in deferred:
                continue
            if isinstance(new, Tensor) and not info.names.isdisjoint(unit.names):
                deferred[id(old)] = old, new

"""The executor: a transform run in place on parameters, unit by unit.

The arithmetic is that of `update`; here is only what lies where, what runs when, and
who learns which total. Temporary memory is that of one unit, not of the model; but what
looks at whole tensors in front of a total is kept until that total is known.
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
from functional_optim.execution._accumulation import Structure, Windows, statics_of
from functional_optim.execution._bucketing import ExecutionOptions
from functional_optim.execution._grad_scaling import Scaling, scaled
from functional_optim.execution._plan import Plan
from functional_optim.execution._reductions import totals_of
from functional_optim.execution._state_tree import Kind, Store, free
from functional_optim.execution._tensor_memory import memory_of
from functional_optim.execution._unit_update import Given, Run
from functional_optim.execution.compiled._compiled_update import compiled

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform
    from functional_optim.execution._bucketing import Bucket
    from functional_optim.execution._reductions import UnitUpdate
    from functional_optim.execution._state_tree import Node
    from functional_optim.execution._units import Later, Unit
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
        self._check_totals = check_totals
        self.params, self._options = params, options or ExecutionOptions()
        self._workspace = Workspace()
        self._store = Store(transforms[0], state, params)
        self._has_whole = any(f.kind is Kind.WHOLE for f in self._store.fields)
        self._refuses = any(
            getattr(stage.transform, "error_if_nonfinite", False)
            for stage in walk(transforms[0], self._store.state, params)
        )
        self._compiles = self._options.kernels is not None and not self._refuses
        self._windows: Windows | None = None
        if any(field.kind is Kind.STATIC for field in self._store.fields):
            self._windows = Windows(transforms[0], self._store.state, params)
        self._plan = Plan(
            params, transforms, group_of, self._store, options=self._options
        )

    @property
    def store(self) -> Store:
        """The whole state; its tensors stay the same from step to step."""
        return self._store

    @property
    def holds(self) -> bool:
        """Whether a step may emit nothing."""
        return self._windows is not None

    def check(self, nodes: list[Node]) -> None:
        """Refuse what the transform cannot go on from, such as a window too long."""
        if self._windows is not None:
            given = {name: param.dtype for name, param in self.params.items()}
            self._windows.structure(given, nodes, context=Context())

    def load(self, nodes: list[Node]) -> None:
        """Take over the numbers of other nodes; see `Store`."""
        with torch.inference_mode(mode=False):
            self._store.load(nodes)
        self._plan.renew()

    @property
    def buckets(self) -> list[Bucket]:
        """The plan."""
        return self._plan.buckets

    def set_transforms(self, transforms: list[Transform]) -> None:
        """Go on with other numbers."""
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
        self._plan.follow(dtypes)
        structure = None
        if self._windows is not None:
            given = {name: dtype for name, dtype in dtypes.items() if dtype is not None}
            structure = self._windows.structure(
                given, self._store.nodes, context=context
            )
        steps: dict[Hashable, CompiledStep] = {}
        runs = self._runs(Given(grads, context, scaling), structure, steps)
        try:
            with memoize_scalars():
                self._run(runs, steps)
        finally:
            for shared in steps.values():
                shared.finish()
        self._plan.keep_versions()
        if structure is not None:
            self._advance(structure)

    def _run(
        self, runs: list[UnitUpdate], steps: Mapping[Hashable, CompiledStep]
    ) -> None:
        """Run the updates of a step, and write what they return."""
        totals = totals_of(runs)
        if totals:
            self._check_totals()
        if self._refuses:
            # An error over a total comes before anything is overwritten.
            for run in {run.key: run for run in runs}.values():
                run.stop(totals)
        for shared in steps.values():
            shared.next_pass(totals)  # The last one is compiled before anything, too.
        later: Later = {}
        for run in runs:
            nodes = run.apply(totals, later)
            if self._has_whole and nodes is not None:
                self._collect(run.unit, nodes, later)
        homes = {memory_of(old) for old, _ in later.values()}
        values = [(old, free(new, homes)) for old, new in later.values()]
        for old, new in values:
            old.copy_(new)

    def _runs(
        self,
        given: Given,
        structure: Structure | None,
        steps: dict[Hashable, CompiledStep],
    ) -> list[UnitUpdate]:
        """Return what runs in this step."""
        scaling = given.scaling
        form = None if scaling is None else scaling.grad_scale is None
        key = statics_of(self._store.nodes), given.context.last, form
        transforms = {
            id(bucket): bucket.transform
            if scaling is None
            else scaled(bucket.transform, scaling.grad_scale, scaling.found_inf)
            for bucket in self._plan.buckets
        }
        # A dispatch mode, as of make_fx, would not see what compiled code does.
        compiles = self._compiles and not is_in_torch_dispatch_mode()
        runs: list[UnitUpdate] = []
        for bucket, unit in self._plan.units:
            pushed = any(name in given.grads for name in unit.names)
            touched = structure is not None and any(
                name in structure.touched for name in unit.names
            )
            if pushed or touched:
                # Parts of a whole may be reached by some names only.
                names = tuple(given.grads) if bucket.whole else pushed
                run = Run(
                    bucket,
                    unit,
                    transforms[id(bucket)],
                    self._workspace,
                    given,
                    kind=(key, names),
                    alone=not pushed,
                )
                runs.append(compiled(run, given, steps) if compiles else run)
        return runs

    def _collect(self, unit: Unit, nodes: list[Node], later: Later) -> None:
        """Take what belongs to the transform as a whole from a unit that it served."""
        for field, old, new in zip(
            self._store.fields, self._store.nodes, nodes, strict=True
        ):
            if new is old or not isinstance(old, Tensor) or id(old) in later:
                continue
            if isinstance(new, Tensor) and not field.names.isdisjoint(unit.names):
                later[id(old)] = old, new

    def _advance(self, structure: Structure) -> None:
        """Keep the new `Static` values."""
        if self._store.set_statics(structure.statics):
            for _, unit in self._plan.units:
                unit.set_statics(structure.statics)

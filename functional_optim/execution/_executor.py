"""The executor: a transform run in place on parameters, unit by unit.

The arithmetic is that of `update`; here is only what lies where, what runs when, and
who learns which total. Temporary memory is that of one unit, not of the model; but what
looks at whole tensors in front of a total is kept until that total is known.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._context import Context
from functional_optim._hoisting import hoisting
from functional_optim._memory import Workspace
from functional_optim._parts import walk
from functional_optim._resolving import resolve
from functional_optim._value import same_for_good
from functional_optim.execution._cohorts import Cohorts
from functional_optim.execution._guard import scaled
from functional_optim.execution._joining import joined
from functional_optim.execution._memory import memory_of
from functional_optim.execution._nodes import Kind
from functional_optim.execution._passes import through, totals_of
from functional_optim.execution._plan import Bucket, Layout
from functional_optim.execution._runs import Given, Run, Scaling
from functional_optim.execution._store import Store, free
from functional_optim.execution._windows import Structure, Windows, statics_of

if TYPE_CHECKING:
    from functional_optim._types import TensorMap, Transform
    from functional_optim.execution._compiled import CompiledRun, Compiling
    from functional_optim.execution._compiled_steps import CompiledStep
    from functional_optim.execution._nodes import Node
    from functional_optim.execution._units import Later, Unit


_dtype = operator.attrgetter("dtype")


class Executor:
    """Runs a transform in place.

    Args:
        params: Parameters by name, detached; they are changed by `step`.
        transforms: The transform of each group of parameters. They differ in numbers
            only; groups that agree share one object.
        group_of: The group of each parameter.
        state: The whole state; `step` writes into it.
        unit_bytes: Size of a unit; None chooses by device.
        compiling: Makes code of what runs on units; None runs without.
    """

    def __init__(
        self,
        params: TensorMap,
        transforms: list[Transform],
        group_of: Mapping[str, int],
        state: Any,
        *,
        unit_bytes: int | None = None,
        compiling: Compiling | None = None,
    ) -> None:
        self._params = params
        self._transforms = transforms
        self._group_of = group_of
        self._unit_bytes, self._compiling = unit_bytes, compiling
        self._cohorts = Cohorts()
        self._given: tuple[list[str], list[torch.dtype]] = ([], [])
        self._wanted: dict[str, torch.dtype | None] = {}
        self._workspace = Workspace()
        self._store = Store(transforms[0], state, params)
        self._has_whole = any(f.kind is Kind.WHOLE for f in self._store.fields)
        self._refuses = any(
            getattr(stage.transform, "error_if_nonfinite", False)
            for stage in walk(transforms[0], self._store.state, params)
        )
        self._windows: Windows | None = None
        if any(field.kind is Kind.STATIC for field in self._store.fields):
            self._windows = Windows(transforms[0], self._store.state, params)
        self._plan()

    @property
    def store(self) -> Store:
        """The whole state; its tensors stay the same from step to step."""
        return self._store

    @property
    def holds(self) -> bool:
        """Whether a step may emit nothing."""
        return self._windows is not None

    def check(self, nodes: list[Node]) -> None:
        """Refuse what the transform cannot go on from, such as a window too long.

        Raises:
            ValueError: from the transform.
        """
        if self._windows is not None:
            given = {name: param.dtype for name, param in self._params.items()}
            self._windows.structure(given, nodes, context=Context())

    def load(self, nodes: list[Node]) -> None:
        """Take over the numbers of other nodes; see `Store`."""
        with torch.inference_mode(mode=False):
            self._store.load(nodes)
        self._plan()

    @property
    def buckets(self) -> list[Bucket]:
        """The plan."""
        return self._buckets

    @property
    def scratch_bytes(self) -> int:
        """Bytes that are kept to gather small tensors."""
        return self._scratch.taken

    def _plan(self) -> None:
        """Decide again what is updated together; the numbers stay as they are."""
        # Tensors of inference mode have no versions, and cannot be written outside it.
        with torch.inference_mode(mode=False):
            self._plan_anew()

    def _plan_anew(self) -> None:
        self._store.replaced = True
        layout = Layout(
            self._params,
            self._transforms,
            self._group_of,
            self._cohorts,
            self._store.state,
            self._store.nodes,
            self._store.fields,
            self._unit_bytes,
            self._compiling,
        )
        self._buckets = layout.buckets()
        self._scratch = layout.scratch
        self._units = [
            (bucket, unit) for bucket in self._buckets for unit in bucket.units
        ]
        self._columns = [
            column for bucket in self._buckets for column in bucket.columns.values()
        ]
        self._versions = [column._version for column in self._columns]
        self._kinds: dict[str, Any] | None = None

    def set_transforms(self, transforms: list[Transform]) -> None:
        """Go on with other numbers.

        Args:
            transforms: As at construction.
        """
        self._transforms = transforms
        for bucket in self._buckets:
            if bucket.whole:
                bucket.transform = joined(transforms, self._group_of, self._params)
                continue
            chosen = {id(transforms[group]): group for group in bucket.members}
            found = [
                resolve(transforms[group], name, self._params[name])
                for group in chosen.values()
                for name in [bucket.members[group]]
            ]
            if not all(same_for_good(other, found[0]) for other in found[1:]):
                # They part for good: a plan is not for free.
                self._part_by_group()
                return
            bucket.transform = found[0]

    def _part_by_group(self) -> None:
        first: dict[int, int] = {}
        for group, transform in enumerate(self._transforms):
            first.setdefault(id(transform), group)
        self._cohorts.part_groups(
            {
                name: first[id(self._transforms[group])]
                for name, group in self._group_of.items()
            }
        )
        self._plan()

    def _follow(self, grads: TensorMap) -> None:
        """Let parameters part that did not get a gradient alike, or were written to."""
        found = list(grads), list(map(_dtype, grads.values()))
        if found != self._given:
            self._given = found
            self._wanted = dict.fromkeys(self._params) | dict(zip(*found, strict=True))
        kinds = self._wanted
        written = [column._version for column in self._columns] != self._versions
        if written or (kinds is self._kinds and self._cohorts.rest(kinds)):
            self._plan()
        if kinds is not self._kinds:  # Also after a plan: it ignores gradients.
            together = [unit.names for _, unit in self._units if unit.pooled]
            together += [list(b.params) for b in self._buckets if b.columns]
            if self._cohorts.follow(kinds, together):
                self._plan()
        self._kinds = kinds

    def step(
        self, grads: TensorMap, *, context: Context, scaling: Scaling | None = None
    ) -> None:
        """Move parameters and state by one update.

        Args:
            grads: Gradients by name; a name that is missing keeps its state.
            context: What the training loop knows.
            scaling: What a gradient scaler asks for.
        """
        if not grads:
            return
        self._follow(grads)
        structure = None
        if self._windows is not None:
            dtypes = {name: grad.dtype for name, grad in grads.items()}
            structure = self._windows.structure(
                dtypes, self._store.nodes, context=context
            )
        runs = self._runs(Given(grads, context, scaling), structure)
        with hoisting():
            self._run(runs)
        self._versions = [column._version for column in self._columns]
        if structure is not None:
            self._advance(structure)

    def _run(self, runs: list[Run | CompiledRun]) -> None:
        """Run the updates of a step, and write what they return."""
        totals = totals_of(runs)
        if self._refuses:
            # An error over a total comes before anything is overwritten.
            for run in {(id(run.bucket), run.key): run for run in runs}.values():
                through(run, totals)
        later: Later = {}
        for run in runs:
            run.prepare(totals)
        for run in runs:
            nodes = run.apply(totals, later)
            if self._has_whole and nodes is not None:
                self._collect(run.unit, nodes, later)
        homes = {memory_of(old) for old, _ in later.values()}
        values = [(old, free(new, homes)) for old, new in later.values()]
        for old, new in values:
            old.copy_(new)

    def _runs(
        self, given: Given, structure: Structure | None
    ) -> list[Run | CompiledRun]:
        """Return what runs in this step."""
        scaling = given.scaling
        form = None if scaling is None else scaling.grad_scale is None
        key = statics_of(self._store.nodes), given.context.last, form
        transforms = {
            id(bucket): bucket.transform
            if scaling is None
            else scaled(bucket.transform, scaling.grad_scale, scaling.found_inf)
            for bucket in self._buckets
        }
        runs: list[Run | CompiledRun] = []
        steps: dict[Hashable, CompiledStep] = {}
        for bucket, unit in self._units:
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
                    key=(key, names),
                    alone=not pushed,
                )
                if self._compiling is not None and not self._refuses:
                    runs.append(self._compiling.run(run, given, steps))
                else:
                    runs.append(run)
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
            for _, unit in self._units:
                unit.set_statics(structure.statics)

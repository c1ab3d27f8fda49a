"""In place: an executor that joins and cuts tensors computes what `update` does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._apply import apply_updates
from functional_optim.core._chain import chain
from functional_optim.core._context import Context
from functional_optim.core._transform import Scope, Transform
from functional_optim.execution._bucketing import ExecutionOptions
from functional_optim.execution._executor import Executor
from functional_optim.testing._compare import difference
from functional_optim.testing._examples import Example
from functional_optim.testing._law import law, require
from functional_optim.transforms import Scale

if TYPE_CHECKING:
    from functional_optim.execution.compiled._kernels import KernelCache

_ROUNDING = 1e-12
"""Units change the order of sums: n * eps of float64, n < 4000."""

_CAUSE = (
    "TransformOptimizer shows an elementwise transform tensors without their names and "
    "shapes: small ones joined, large ones cut. Look at names and shapes in no update: "
    "use Masked or Partition, a hyperparameter by name, or a method "
    "resolved(name, param) that returns the transform for one parameter"
)
_CAUSE_WHOLE = (
    "TransformOptimizer shows a transform a part of the tensors at a time. Learn about "
    "others only through context.reduce, and read each entry of a state once if the "
    "class says consumes_state"
)


@law(rounds=True, hint=_CAUSE)
def in_place(transform: Transform, example: Example) -> None:
    """Run in place, in units of any size, it moves parameters as in the pure way."""
    for elements in (1, 3, 1000):
        moves_alike(chain(transform), example, elements)
    for chained in _beside_others(transform):
        moves_alike(chained, example, 3)


def _beside_others(transform: Transform) -> Iterator[Transform]:
    """Yield chains with neighbours that hand over, or take, what can be overwritten."""
    for members in ((Scale(1.0), transform), (transform, Scale(1.0))):
        with contextlib.suppress(ValueError):  # Nothing may stand behind a guard.
            yield chain(*members)


def moves_alike(
    transform: Transform,
    example: Example,
    elements: int,
    kernels: KernelCache | None = None,
) -> None:
    """Require that an executor with units of this size does what `update` does."""
    params, state = example.params, transform.init(example.params)
    widest = max(p.dtype.itemsize for p in params.values())
    own = {name: p.clone() for name, p in params.items()}
    views = {name: p.view(p.shape) for name, p in own.items()}
    executor = Executor(
        views,
        [transform],
        dict.fromkeys(own, 0),
        transform.init(own),
        options=ExecutionOptions(unit_bytes=elements * widest, kernels=kernels),
    )
    cause = _CAUSE if transform.scope is Scope.ELEMENTWISE else _CAUSE_WHOLE
    for step, (updates, context) in enumerate(example.steps):
        params, state = _pure(transform, updates, state, params, context)
        given = {name: u.clone() for name, u in updates.items()}
        executor.step(given, context=context)
        at = f"step {step} in units of {elements} elements"
        gap = difference(own, params, _ROUNDING)
        require(not gap, f"{at}: parameters{gap}", cause)
        gap = difference(executor.store.state, state, _ROUNDING)
        require(not gap, f"{at}: state{gap}", cause)
        gap = difference(given, updates)
        require(not gap, f"{at}: the gradients were overwritten, {gap}", cause)


def _pure(
    transform: Transform,
    updates: TensorMap,
    state: object,
    params: TensorMap,
    context: Context,
) -> tuple[TensorMap, object]:
    """Return parameters and state after one step in the pure way."""
    moved, state = transform.update(updates, state, params, context=context)
    return apply_updates(params, moved), state

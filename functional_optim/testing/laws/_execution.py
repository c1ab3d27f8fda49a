"""Check that an executor that joins and cuts tensors computes what `update` does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from functional_optim.core._apply import apply_updates
from functional_optim.core._chain import chain
from functional_optim.core._transform import Scope, Transform
from functional_optim.execution._accumulation import check_accumulation
from functional_optim.execution._executor import Executor
from functional_optim.execution._units import ExecutionOptions
from functional_optim.testing._examples import Example
from functional_optim.testing._law import ROUNDING, law, require_equal
from functional_optim.transforms import Scale

if TYPE_CHECKING:
    from functional_optim.execution.compiled._kernels import KernelCache

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
    for chained, elements in _chains(transform):
        moves_alike(chained, example, elements)


def _chains(transform: Transform) -> Iterator[tuple[Transform, int]]:
    """Yield the transform, also beside others that reuse memory, and sizes of units."""
    for members, sizes in (
        ((transform,), (1, 3, 1000)),
        ((Scale(1.0), transform), (3,)),
        ((transform, Scale(1.0)), (3,)),
    ):
        # Nothing may follow a guard nor, in place, precede Accumulate.
        with contextlib.suppress(ValueError):
            chained = chain(*members)
            check_accumulation(chained)
            yield from ((chained, elements) for elements in sizes)


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
        moved, state = transform.update(updates, state, params, context=context)
        params = apply_updates(params, moved)
        given = {name: u.clone() for name, u in updates.items()}
        executor.step(given, context=context)
        at = f"step {step} in units of {elements} elements"
        require_equal(f"{at}: parameters", own, params, cause, ROUNDING)
        require_equal(f"{at}: state", executor.state.tree, state, cause, ROUNDING)
        require_equal(f"{at}: the gradients were overwritten, ", given, updates, cause)

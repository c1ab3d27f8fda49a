"""What is reported when a pipeline and a plain loop part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from functional_optim.core._transform import TensorMap
from functional_optim.testing._examples import Example
from functional_optim.testing._repro import context_import, transform_code

Loop: TypeAlias = Callable[[torch.nn.Module, Sequence[TensorMap]], Any]
"""A plain PyTorch loop over the gradients of each step; it may yield after each."""


class NotEquivalentError(AssertionError):
    """A pipeline and a loop give different parameters.

    Attributes:
        step: The first step after which they differ; None if the loop does not yield.
        name: The parameter.
        index: The element where they are farthest apart.
        ulps: How far, in ulp.
        example: The smallest example found.

    Example:
        >>> import functional_optim as fo
        >>> from functional_optim.testing import check_equivalent
        >>> def plain(model, gradients):
        ...     for step in gradients:
        ...         for name, p in model.named_parameters():
        ...             p.data -= 0.2 * step.get(name, 0.0)
        ...         yield
        >>> try:
        ...     check_equivalent(fo.sgd(0.1), plain)
        ... except NotEquivalentError as error:
        ...     print(error.step, error.name, error.index)
        0 a.weight ()
    """

    def __init__(self, gap: Gap, transform: Any, loop: Loop, example: Example) -> None:
        self.step, self.name, self.index = gap.step, gap.name, gap.index
        self.ulps, self.example = gap.ulps, example
        super().__init__(_report(gap, transform, loop, example))


@dataclasses.dataclass(frozen=True)
class Gap:
    """Where two runs part."""

    step: int | None
    name: str
    index: tuple[int, ...]
    ulps: float
    allowed: float
    ours: float
    theirs: float


def _report(gap: Gap, transform: Any, loop: Loop, example: Example) -> str:
    """Return where two runs part, and the program in which they do."""
    when = "at the end" if gap.step is None else f"first after step {gap.step}"
    element = f"element {gap.index} of " if gap.index else ""
    bound = f"{gap.allowed:g} ulp" if gap.allowed else "no difference in any bit"
    imports, made = transform_code(transform)
    called = getattr(loop, "__name__", "torch_loop")
    program = [
        "import torch",
        "from functional_optim.testing import Example, check_equivalent",
        *imports,
        *context_import(example),
        "",
        f"transform = {made}",
        *f"example = {example!r}".splitlines(),
        f"check_equivalent(transform, {called}, example=example"
        + (f", max_ulps={gap.allowed:g})" if gap.allowed else ")"),
    ]
    what = (
        f"What: {element}{gap.name!r} is {gap.ours!r} in the pipeline and "
        f"{gap.theirs!r} in the loop: {gap.ulps:.3g} ulp apart, allowed: {bound}"
    )
    return "\n".join(
        [
            f"{transform!r} is not {called}: they part {when}.",
            "",
            what,
            "",
            "The smallest case found, to paste and run:",
            "",
            *(f"    {line}".rstrip() for line in program),
        ]
    )

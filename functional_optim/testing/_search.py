"""Examples by hypothesis: drawn once for all laws, and searched for the smallest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from functional_optim.testing._examples import Example
from functional_optim.testing._hypothesis import hypothesis

if TYPE_CHECKING:
    import torch

    from functional_optim._types import TensorMap
    from functional_optim.testing import strategies


def kinds_of(
    params: TensorMap | None,
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...] | None:
    """Return names, shapes and dtypes of parameters, for a `Pattern`."""
    if params is None:
        return None
    return tuple((name, tuple(p.shape), p.dtype) for name, p in params.items())


@functools.lru_cache(maxsize=32)
def drawn_examples(
    pattern: strategies.Pattern, max_examples: int, seed: int | None
) -> tuple[Example, ...]:
    """Return examples by hypothesis: drawn once, tried by all laws that ask for it."""
    drawn: list[Example] = []
    searched(drawn.append, pattern, max_examples, seed)
    return tuple(drawn)


def searched(
    check: Callable[[Example], None],
    pattern: strategies.Pattern,
    max_examples: int,
    seed: int | None,
) -> None:
    """Run a check on examples by hypothesis; the smallest that fails raises."""

    # Its name and source seed hypothesis: all checks see the same examples.
    def run(example: Example) -> None:
        check(example)

    test = hypothesis.given(pattern.examples())(run)
    test = hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        verbosity=hypothesis.Verbosity.quiet,
    )(test)
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    test()

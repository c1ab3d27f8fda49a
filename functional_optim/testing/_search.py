"""Draw examples with hypothesis, once for all laws, and shrink the failing ones."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import hypothesis
import torch
from hypothesis import strategies as st

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.testing import strategies
from functional_optim.testing._examples import Example

E = TypeVar("E", bound=Exception)
Kinds: TypeAlias = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
"""Names, shapes and dtypes of parameters."""

_SECONDS = 5.0
"""How long a failure may be made smaller: a slow transform must not take minutes."""


class _TimeUpError(BaseException):
    """Ends a search; hypothesis lets through what is no `Exception`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Options for drawing examples; hashable, so that these are drawn once."""

    kinds: Kinds | None
    elements: st.SearchStrategy[float]
    dtypes: tuple[torch.dtype, ...]
    omit: bool = True
    max_steps: int
    max_examples: int
    seed: int | None

    def smallest(self, check: Callable[[Example], None], found: E) -> E:
        """Return the failure of a check on the smallest example, or the one found."""
        failure, failures = type(found), [found]
        end = time.monotonic() + _SECONDS

        def timed(example: Example) -> None:
            if len(failures) > 1 and time.monotonic() > end:
                raise _TimeUpError
            try:
                check(example)
            except failure as error:
                failures.append(error)
                raise

        try:
            self.run(timed)
        except failure as error:
            # What hypothesis notes about itself is of no use: the report says it all.
            vars(error).pop("__notes__", None)
            return error
        except _TimeUpError:
            return failures[-1]  # Each one is smaller than the one before.
        return found

    def run(self, check: Callable[[Example], None]) -> None:
        """Run a check on drawn examples; the smallest that fails raises."""

        # Its name and source seed hypothesis: all checks see the same examples.
        def run(example: Example) -> None:
            check(example)

        params = None
        if self.kinds is not None:
            params = {
                name: torch.zeros(shape, dtype=dtype, device="cpu")
                for name, shape, dtype in self.kinds
            }
        examples = strategies.examples(
            params,
            elements=self.elements,
            dtypes=self.dtypes,
            omit=self.omit,
            max_steps=self.max_steps,
        )
        test = hypothesis.settings(
            max_examples=self.max_examples,
            deadline=None,
            database=None,
            print_blob=False,
            derandomize=self.seed is None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            verbosity=hypothesis.Verbosity.quiet,
        )(hypothesis.given(examples)(run))
        if self.seed is not None:
            test = hypothesis.seed(self.seed)(test)
        test()


@functools.lru_cache(maxsize=32)
def drawn_examples(search: Search) -> tuple[Example, ...]:
    """Return the examples of a search, drawn once."""
    drawn: list[Example] = []
    search.run(drawn.append)
    return tuple(drawn)


def kinds_of(params: TensorMap | None) -> Kinds | None:
    """Return names, shapes and dtypes of parameters."""
    if params is None:
        return None
    return tuple((name, tuple(p.shape), p.dtype) for name, p in params.items())

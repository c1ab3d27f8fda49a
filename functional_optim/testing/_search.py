"""Examples by hypothesis: drawn once for all laws, and searched for the smallest."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from functional_optim.testing import strategies
from functional_optim.testing._examples import Example
from functional_optim.testing._hypothesis import hypothesis, st

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap

E = TypeVar("E", bound=Exception)

_SECONDS = 5.0
"""How long a failure may be made smaller: a slow transform must not take minutes."""


class _TimeUpError(BaseException):
    """Ends a search; hypothesis lets through what is no `Exception`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Which examples to try; hashable, so that they are drawn once."""

    kinds: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] | None = None
    elements: st.SearchStrategy[float]
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    omit: bool = True
    max_steps: int = 4
    max_examples: int = 100
    seed: int | None = None

    def smallest(self, check: Callable[[Example], None], failure: type[E]) -> E | None:
        """Return the failure of a check on the smallest example found; None if none."""
        failures: list[E] = []
        end = time.monotonic() + _SECONDS

        def timed(example: Example) -> None:
            if failures and time.monotonic() > end:
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
        return None

    def run(self, check: Callable[[Example], None]) -> None:
        """Run a check on drawn examples; the smallest that fails raises."""

        # Its name and source seed hypothesis: all checks see the same examples.
        def run(example: Example) -> None:
            check(example)

        test = hypothesis.given(self._strategy())(run)
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
        )(test)
        if self.seed is not None:
            test = hypothesis.seed(self.seed)(test)
        test()

    def _strategy(self) -> st.SearchStrategy[Example]:
        params = None
        if self.kinds is not None:
            params = {
                name: torch.zeros(shape, dtype=dtype, device="cpu")
                for name, shape, dtype in self.kinds
            }
        return strategies.examples(
            params,
            elements=self.elements,
            dtypes=self.dtypes,
            omit=self.omit,
            max_steps=self.max_steps,
        )


@functools.lru_cache(maxsize=32)
def drawn_examples(search: Search) -> tuple[Example, ...]:
    """Return examples by hypothesis: drawn once, tried by all laws that ask for it."""
    drawn: list[Example] = []
    search.run(drawn.append)
    return tuple(drawn)


def kinds_of(
    params: TensorMap | None,
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...] | None:
    """Return names, shapes and dtypes of parameters, for a `Search`."""
    if params is None:
        return None
    return tuple((name, tuple(p.shape), p.dtype) for name, p in params.items())

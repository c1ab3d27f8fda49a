"""Try a law on a transform, and report a transform that breaks it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import hypothesis
import torch
from hypothesis import strategies as st

from functional_optim.core._chain import validate_transform
from functional_optim.core._context import Context
from functional_optim.core._validation import check_parameters
from functional_optim.testing import strategies
from functional_optim.testing._compare import difference
from functional_optim.testing._examples import Example, fixed_examples
from functional_optim.testing._repro import report
from functional_optim.testing._search import Search, drawn_examples, kinds_of

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform


ROUNDING = 1e-12
"""Bound on the effect of another order of sums: n * eps of float64, n < 4000."""


class ViolationError(AssertionError):
    """A broken law, raised inside it: what is broken, and the likely cause."""

    def __init__(self, what: str, cause: str) -> None:
        super().__init__(what)
        self.what, self.cause = what, cause


def require(condition: object, what: str, cause: str) -> None:
    """Raise a `ViolationError` unless a condition holds."""
    if not condition:
        raise ViolationError(what, cause)


def require_equal(
    what: str, a: Any, b: Any, cause: str, rtol: float | None = None
) -> None:
    """Raise a `ViolationError` if two trees differ, with the first difference."""
    gap = difference(a, b, rtol)
    require(not gap, f"{what}{gap}", cause)


class BrokenLawError(AssertionError):
    """A transform breaks a law.

    Attributes:
        law: Name of the law, such as "purity".
        what: What is broken and where.
        cause: What is likely the matter, and the remedy.
        transform: The transform.
        example: The smallest example found.

    Example:
        >>> import functional_optim as fo
        >>> from functional_optim.testing import laws
        >>> class Same:
        ...     scope = fo.Scope.ELEMENTWISE
        ...     init = staticmethod(lambda params: ())
        ...
        ...     def update(self, updates, state, params, *, context=None):
        ...         return updates, state
        >>> try:
        ...     laws.purity(Same())
        ... except BrokenLawError as broken:
        ...     print(broken.what)
        update returned a tensor that it was given: updates['a.weight']
    """

    def __init__(
        self, law: Law, violation: ViolationError, transform: Any, example: Example
    ) -> None:
        self.law, self.statement = law.name, law.statement
        self.what, self.cause = violation.what, violation.cause
        self.transform, self.example = transform, example
        summary = [
            f"{transform!r} breaks the law of {law.name}: {law.statement}",
            "",
            f"What: {self.what}",
            f"Likely cause: {self.cause}",
        ]
        call = f"laws.{law.name}(transform, example)"
        super().__init__(report(summary, transform, example, "laws", call))


_LOCK = threading.RLock()


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Law:
    """A law that every transform obeys. Call it to try it on a transform.

    Not made by hand: `functional_optim.testing.laws` has them all.

    Args:
        name: Its name, a function's.
        statement: What it demands, in one sentence.
        holds: Function of a transform and an example that raises what it finds broken.
        hint: The likely cause if the transform raises an error.
        drawn: Whether hypothesis draws examples, besides three fixed ones.
        omit: Whether some steps of the examples lack some names.
        wide: Whether float32 is tried as well as float64.
        rounds: Whether results are compared up to rounding. Then float64 is tried
            whatever the parameters are: there rounding is far smaller than a mistake.
        away_from_zero: Whether examples keep away from zero, where there are kinks.
        before: Run once before the examples of one call.

    Example:
        >>> import functional_optim as fo
        >>> from functional_optim.testing import laws
        >>> laws.purity(fo.ClipByGlobalNorm(1.0), max_examples=20)
        23
    """

    name: str
    statement: str
    holds: Callable[[Any, Example], None]
    hint: str
    drawn: bool = True
    omit: bool = True
    wide: bool = False
    rounds: bool = False
    away_from_zero: bool = False
    before: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"laws.{self.name}"

    def __call__(
        self,
        transform: Transform,
        example: Example | None = None,
        *,
        params: TensorMap | None = None,
        contexts: Sequence[Context] = (),
        elements: st.SearchStrategy[float] = strategies.ordinary,
        max_steps: int = 4,
        max_examples: int = 100,
        seed: int | None = None,
    ) -> int:
        """Try the law on a transform.

        Args:
            transform: Anything with `init`, `update` and `scope`.
            example: The one example to try, whatever the other arguments are; None
                tries many.
            params: Parameters that give names, shapes and dtypes; None draws them.
            contexts: What the loop knows at each step, in turns.
            elements: Strategy of a number, such as `strategies.hostile`.
            max_steps: Largest number of steps. >= 1.
            max_examples: How many examples are drawn besides three fixed ones. >= 1.
            seed: Draws other examples; None means the same ones every time.

        Returns:
            On how many examples it was tried.

        Raises:
            BrokenLawError: the law does not hold; with the smallest case found.
            TypeError: not a transform.
        """
        check_protocol(transform)
        check_arguments(params, contexts, max_examples)
        self.before()
        if self.rounds and params is not None:
            params = {name: p.double() for name, p in params.items()}
        search = Search(
            kinds=kinds_of(params),
            elements=strategies.away_from_zero if self.away_from_zero else elements,
            dtypes=(torch.float64, torch.float32) if self.wide else (torch.float64,),
            omit=self.omit,
            max_steps=max_steps,
            max_examples=max_examples,
            seed=seed,
        )
        # torch.compile counts its graphs for all threads together.
        with _LOCK, torch.inference_mode(mode=False), torch.enable_grad():
            if example is not None:
                self._try(transform, example)
                return 1
            # They have every kind of shape; drawn ones may miss some.
            tried = fixed_examples(params, full=not self.omit)
            if self.drawn:
                tried += drawn_examples(search)
            try:
                for one in tried:
                    self._try(transform, one, contexts)
            except BrokenLawError as broken:
                found = broken
            else:
                return len(tried)
            if self.drawn:
                found = self._smallest(found, search, contexts)
        raise found.with_traceback(None)

    def _try(
        self, transform: Transform, example: Example, contexts: Sequence[Context] = ()
    ) -> None:
        """Try one example; blame the most basic law that does not hold on it."""
        if contexts:
            example = dataclasses.replace(example, contexts=contexts)
        broken = self._violation(transform, example)
        if broken is None:
            return
        for name in itertools.takewhile(lambda name: name != self.name, _BASIC):
            basic = LAWS[name]._violation(transform, example)
            if basic is not None and basic.__cause__ is None:  # It raised no error.
                raise BrokenLawError(LAWS[name], basic, transform, example)
        raise BrokenLawError(self, broken, transform, example) from broken.__cause__

    def _violation(
        self, transform: Transform, example: Example
    ) -> ViolationError | None:
        """Return how an example breaks the law, be it by an error; None if it holds."""
        try:  # On a copy: what is reported must not have been changed.
            self.holds(transform, example.copied())
        except ViolationError as violation:
            return violation
        except Exception as error:
            broken = ViolationError(error_line(error), self.hint)
            broken.__cause__ = error
            return broken
        return None

    def _smallest(
        self, found: BrokenLawError, search: Search, contexts: Sequence[Context]
    ) -> BrokenLawError:
        """Return the failure on the smallest example that hypothesis finds."""
        transform = found.transform
        check = functools.partial(self._try, transform, contexts=contexts)
        try:
            return search.smallest(check, found)
        except hypothesis.errors.Flaky:  # The same inputs broke it once, and not again.
            broken = ViolationError(found.what + ", but not each time", HIDDEN)
            return BrokenLawError(LAWS["determinism"], broken, transform, found.example)


HIDDEN = (
    "memory outside of the state (an attribute, a global, a cache), or unseeded "
    "randomness. Keep all memory in the state that update returns; random numbers are "
    "a function of a seed and a counter in the state (not a torch.Generator)"
)

LAWS: dict[str, Law] = {}
"""All laws by name."""

_BASIC = ("purity", "determinism")
"""Laws without which a failure of another says nothing."""


def law(*, hint: str, **options: Any) -> Callable[[Callable[..., None]], Law]:
    """Make a law of a function; the first line of its docstring is the statement."""

    def made(holds: Callable[..., None]) -> Law:
        statement = (holds.__doc__ or "").splitlines()[0]
        LAWS[holds.__name__] = Law(holds.__name__, statement, holds, hint, **options)
        return LAWS[holds.__name__]

    return made


def run(transform: Transform, example: Example) -> Iterator[tuple[Any, Any]]:
    """Yield the updates and the state after each step."""
    state = transform.init(example.params)
    for updates, context in example.steps:
        result = transform.update(updates, state, example.params, context=context)
        is_pair = isinstance(result, tuple) and len(result) == 2
        what = f"update returned a {type(result).__name__}, not a pair"
        require(is_pair, what, "write: return new_updates, new_state")
        out, state = result
        what = f"update returned updates as a {type(out).__name__}"
        require(type(out) is dict, what, "return a dict from name to tensor")
        yield out, state


def check_protocol(transform: Any) -> None:
    """Refuse what is no transform, or cannot be called like one."""
    validate_transform("transform", transform)
    _check_signature(transform, transform.init, "params")
    _check_signature(
        transform, transform.update, "updates", "state", "params", context=None
    )


def _check_signature(
    transform: Any, method: Any, *arguments: str, **keywords: None
) -> None:
    try:
        inspect.signature(method).bind(*arguments, **keywords)
    except TypeError as error:
        wanted = ["self", *arguments, *(f"*, {name}=None" for name in keywords)]
        raise TypeError(
            f"{transform!r}.{method.__name__} must take ({', '.join(wanted)}), as "
            f"chain calls it: {error}"
        ) from None
    except ValueError:
        return  # A builtin has no signature.


def check_arguments(params: Any, contexts: Any, max_examples: int) -> None:
    """Refuse arguments that cannot describe examples."""
    if params is not None:
        check_parameters(params)
        size = sum(p.numel() for p in params.values())
        if not params:
            raise ValueError(
                'params must have a parameter, such as {"w": torch.zeros(3, 2)}'
            )
        if size > 10_000:
            raise ValueError(
                f"params must be small, at most 10,000 numbers in all, got {size:,}; "
                "laws do not depend on size"
            )
    if not isinstance(contexts, Sequence) or not all(
        isinstance(context, Context) for context in contexts
    ):
        raise TypeError(f"contexts must be a list of Context(...), got {contexts!r}")
    if max_examples < 1:
        raise ValueError(f"max_examples must be >= 1, got {max_examples}")


def error_line(error: Exception) -> str:
    """Return the type of an error, and the first line of its text that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"it raised {type(error).__name__}: {lines[0] if lines else error!r}"

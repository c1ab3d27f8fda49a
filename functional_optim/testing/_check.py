"""Check every law on one transform."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._context import Context
from functional_optim.core._transform import Transform
from functional_optim.testing import laws, strategies
from functional_optim.testing._examples import default_params, numbers_like
from functional_optim.testing._law import check_arguments, check_protocol, error_line


def check_transform(
    transform: Transform,
    params: TensorMap | None = None,
    *,
    contexts: Sequence[Context] = (),
    smooth: bool = False,
    elements: st.SearchStrategy[float] = strategies.ordinary,
    max_steps: int = 4,
    max_examples: int = 100,
    seed: int | None = None,
) -> None:
    """Check that a transform is safe to compose, batch, compile, shard and checkpoint.

    Tries every law on it, and raises on the first that does not hold, with the
    smallest case found. Takes a few seconds for most rules; a program that does not
    change gets the same answer every time. Empties the caches of torch.compile.

    Args:
        transform: Anything with `init`, `update` and `scope`; `()` is a legal state.
        params: Parameters that give names, shapes and dtypes; their numbers do not
            matter. None tries scalars, vectors, matrices and empty tensors in float64
            and float32. Pass small ones if the transform needs certain names or shapes.
            At most 10,000 numbers.
        contexts: What the loop knows at each step, in turns, such as
            `[Context(weight=3.0), Context(last=True)]`.
        smooth: Whether it has derivatives that `Context(differentiable=True)` shall
            give; then they are compared with finite differences.
        elements: Strategy of a number; `strategies.hostile` also tries huge, subnormal,
            infinite and NaN ones.
        max_steps: Largest number of steps; more if the rule changes later on. >= 1.
        max_examples: How many examples hypothesis draws for each law. >= 1.
        seed: Draws other examples; None means the same ones every time.

    Raises:
        BrokenLawError: a law does not hold; says which, why that is likely, and gives
            the smallest case found as a program.
        ValueError: it fails on plain parameters of some shapes; says on which, and on
            which not.
        TypeError: not a transform, or not a map of parameters.

    Example:
        >>> import functional_optim as fo
        >>> from functional_optim.testing import check_transform
        >>> class Double:
        ...     scope = fo.Scope.ELEMENTWISE
        ...
        ...     def init(self, params):
        ...         return ()
        ...
        ...     def update(self, updates, state, params, *, context=None):
        ...         return {name: 2 * u for name, u in updates.items()}, state
        >>> check_transform(Double(), max_examples=10)
    """
    check_protocol(transform)
    check_arguments(params, contexts, max_examples)
    with torch.enable_grad():  # Whatever the transform does to grad mode is undone.
        params = _params_to_try(transform, params, contexts)
    for law in laws.ALL:
        if law is laws.differentiable and not smooth:
            continue
        law(
            transform,
            params=params,
            contexts=contexts,
            elements=elements,
            max_steps=max_steps,
            max_examples=max_examples,
            seed=seed,
        )


def _params_to_try(
    transform: Transform, params: TensorMap | None, contexts: Sequence[Context]
) -> TensorMap | None:
    """Return the parameters that examples must have; None if any will do."""
    context = contexts[0] if contexts else Context()
    given = params or default_params()
    failure = _failure(transform, given, context)
    alone = {
        f"{name!r} of shape {tuple(p.shape)}": _failure(transform, {name: p}, context)
        for name, p in given.items()
    }
    if failure is None:
        # Masks and labels may need all names, where hypothesis would draw some.
        return given if any(alone.values()) else params
    bad = [place for place, error in alone.items() if error]
    good = [place for place, error in alone.items() if not error]
    method, error = next((f for f in alone.values() if f), failure)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{transform!r} cannot be checked on these parameters: in {method} "
    lines = [what + f"{error_line(error)} ({frame.filename}, line {frame.lineno})"]
    if bad and good:
        lines.append(f"It works on {', '.join(good)}; it fails on {', '.join(bad)}.")
    elif not bad:
        lines.append("It works on each of them alone, but not on all together.")
    if not isinstance(error, (NameError, AttributeError)):
        lines.append(
            "If it is meant for certain names or shapes, pass parameters of that kind: "
            'check_transform(transform, params={"weight": torch.zeros(4, 3)}). If it '
            "looks at the loss or the weight, pass contexts=[Context(loss=...)]"
        )
    raise ValueError("\n".join(lines)) from error


def _failure(
    transform: Transform, params: TensorMap, context: Context
) -> tuple[str, Exception] | None:
    """Return the method that raises and its error; None if both methods run."""
    params = numbers_like(params, 1)
    method = "init"
    try:
        state = transform.init(params)
        method = "update"
        transform.update(numbers_like(params, 2), state, params, context=context)
    except Exception as error:
        return method, error
    return None

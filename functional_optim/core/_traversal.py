"""A transform together with its state, part by part.

A combinator says what it is made of by a method `parts(state, params)`. It is optional
and open to users' transforms: one without it is a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from functional_optim.core._transform import Transform

if TYPE_CHECKING:
    from collections.abc import Iterator

    from functional_optim.algebra._tensor_map import TensorMap


class Part(NamedTuple):
    """A transform inside a combinator, with its share of state and parameters.

    What a method `parts(state, params)` returns a list of.

    Attributes:
        at: What the combinator gives to `Context.at` when it updates this part.
        label: The user's name for it, "" if there is none: a prefix of its readings.
        transform: The transform.
        state: Its state.
        params: The parameters that it sees.

    Example:
        >>> from functional_optim.transforms import Masked, Scale
        >>> part = Masked(Scale(2.0), "*.bias").parts((), {})[0]
        >>> part.at, part.transform
        ('inner', Scale(2.0))
    """

    at: int | str
    label: str
    transform: Transform
    state: Any
    params: TensorMap


class Stage(NamedTuple):
    """A transform at some depth."""

    path: tuple[int | str, ...]
    place: tuple[int, ...]
    labels: tuple[str, ...]
    label: str
    transform: Transform
    state: Any
    params: TensorMap
    parts: list[Part]


def walk(
    transform: Transform,
    state: Any,
    params: TensorMap,
    path: tuple[int | str, ...] = (),
    labels: tuple[str, ...] = (),
    *,
    place: tuple[int, ...] = (),
    label: str = "",
) -> Iterator[Stage]:
    """Yield a transform and all that it is made of, in the order in which they run.

    Example:
        >>> import functional_optim as fo
        >>> pipeline = fo.chain(fo.Masked(fo.Scale(2.0), "*.bias"))
        >>> [stage.path for stage in walk(pipeline, ((),), {})]
        [(), (0,), (0, 'inner')]
    """
    tell = getattr(transform, "parts", None)
    parts = [] if tell is None else [Part(*part) for part in tell(state, params)]
    yield Stage(path, place, labels, label, transform, state, params, parts)
    for index, part in enumerate(parts):
        yield from walk(
            part.transform,
            part.state,
            part.params,
            (*path, part.at),
            (*labels, part.label) if part.label else labels,
            place=(*place, index),
            label=part.label,
        )

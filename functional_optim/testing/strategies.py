"""Hypothesis strategies for tensor maps, gradients, examples, transforms and chains.

Hypothesis draws every number, so that failures shrink and replay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

import functional_optim as fo
from functional_optim import schedules
from functional_optim.testing._examples import Example

__all__ = [
    "away_from_zero",
    "chains",
    "examples",
    "finite",
    "gradient_sequences",
    "hostile",
    "ordinary",
    "parameter_shapes",
    "tensor_maps",
    "transforms",
]

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

ordinary: st.SearchStrategy[float] = st.floats(-100, 100, width=32).map(
    lambda x: x if abs(x) > 1e-3 else 0.0
)
"""Everyday numbers, zero included."""

finite: st.SearchStrategy[float] = st.one_of(
    ordinary,
    st.sampled_from([1.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 1e-20, 1e15, -1e18]),
)
"""Also signed zeros, subnormals and huge ones whose squares stay finite in float32."""

hostile: st.SearchStrategy[float] = st.one_of(
    finite, st.sampled_from([math.nan, math.inf, -math.inf])
)
"""Also NaN and infinities."""

away_from_zero: st.SearchStrategy[float] = st.builds(
    math.copysign, st.floats(0.125, 8.0, width=32), st.sampled_from([1.0, -1.0])
)
"""Numbers where square roots and norms have derivatives."""

_numbers = st.floats(-4, 4, width=32)
_fractions = st.floats(0, 0.9375, width=32)
_positive = st.floats(0.125, 8, width=32)
_shapes = st.sampled_from([(), (1,), (3,), (2, 2), (1, 3, 1), (0,), (2, 0)])


def _hyperparameters(
    numbers: st.SearchStrategy[float], names: Sequence[str] = ()
) -> st.SearchStrategy[Any]:
    """Draw a number, or a tensor, a schedule or a map by name of such numbers."""
    kinds = [
        numbers,
        numbers.map(lambda x: torch.tensor(x, dtype=torch.float64)),
        st.builds(schedules.linear, numbers, numbers, st.integers(1, 5)),
    ]
    if names:
        kinds.append(st.fixed_dictionaries(dict.fromkeys(names, numbers)))
    return st.one_of(kinds)


def transforms(
    names: Sequence[str] = (), *, smooth: bool = False
) -> st.SearchStrategy[fo.Transform]:
    """Draw a transform of the library, with any kind of hyperparameter.

    Args:
        names: Names of the parameters; hyperparameters by name need them.
        smooth: Whether to leave out those that have no derivative somewhere.

    Example:
        >>> from hypothesis import find
        >>> find(transforms(), lambda transform: "Trace" in repr(transform)).scope.name
        'ELEMENTWISE'
    """
    number = _hyperparameters(_numbers, names)
    fraction = _hyperparameters(_fractions, names)
    positive = _hyperparameters(_positive, names)
    joint = _hyperparameters(_positive)
    kinked = [] if smooth else [st.builds(fo.ClipByValue, positive)]
    return st.one_of(
        st.builds(fo.Scale, number),
        st.builds(fo.ScaleByLearningRate, fraction),
        st.builds(fo.Unscale, joint),
        st.builds(fo.Accumulate, st.integers(1, 3), mean=st.booleans()),
        st.builds(fo.ClipByGlobalNorm, joint, norm_type=st.sampled_from([1.0, 2.0])),
        st.builds(fo.ClipByNorm, positive),
        st.builds(fo.Trace, fraction),
        st.builds(fo.Trace, st.floats(0.125, 0.9375), nesterov=st.sampled_from([True])),
        st.builds(fo.ScaleByAdam, st.tuples(fraction, fraction), amsgrad=st.booleans()),
        st.builds(fo.AddDecayedWeights, fraction),
        st.builds(fo.MultiplyParamwise, st.just({"*": 0.5})),
        st.builds(fo.Masked, st.just(fo.Trace(0.5)), st.just("*")),
        st.builds(fo.SkipNonfinite, st.builds(fo.sgd, fraction, _fractions)),
        st.builds(fo.Observe, st.just("norm")),
        st.just(fo.Identity()),
        st.just(fo.Centralize()),
        st.just(fo.ZeroNans()),
        st.just(fo.SetToZero()),
        st.builds(fo.Named, st.just("inner"), st.builds(fo.Scale, number)),
        st.builds(
            fo.Partition,
            st.builds(lambda scale: {"all": scale}, st.builds(fo.Trace, _fractions)),
            st.just("all"),
        ),
        *kinked,
    )


@st.composite
def chains(
    draw: st.DrawFn,
    names: Sequence[str] = (),
    *,
    max_size: int = 4,
    smooth: bool = False,
) -> fo.Chain:
    """Draw a chain of transforms of the library, in an order that `chain` accepts.

    Args:
        draw: Given by hypothesis.
        names: Names of the parameters; hyperparameters by name need them.
        max_size: Largest number of members.
        smooth: Whether to leave out what has no derivative somewhere.

    Example:
        >>> from hypothesis import find
        >>> len(find(chains(), lambda chained: len(chained) == 2))
        2
    """
    members: list[fo.Transform] = []
    for member in draw(st.lists(transforms(names, smooth=smooth), max_size=max_size)):
        try:
            fo.chain(*members, member)
        except ValueError:  # An order that cannot be right: leave it out.
            continue
        members.append(member)
    return fo.chain(*members)


_MOST_DRAWN = 16
"""A larger tensor repeats a run of numbers: hypothesis draws them one by one."""


def _tensors(
    shape: tuple[int, ...], dtype: torch.dtype, elements: st.SearchStrategy[float]
) -> st.SearchStrategy[Tensor]:
    size = math.prod(shape)
    # 13 is prime: no row or column of usual shapes repeats.
    drawn = size if size <= _MOST_DRAWN else 13
    numbers = st.lists(elements, min_size=drawn, max_size=drawn)

    def made(drawn: list[float]) -> Tensor:
        repeats = -(-size // len(drawn)) if drawn else 0
        flat = torch.tensor((drawn * repeats)[:size], dtype=torch.float64)
        return flat.to(dtype).reshape(shape)

    return numbers.map(made)


@st.composite
def parameter_shapes(
    draw: st.DrawFn, min_size: int = 1, max_size: int = 3
) -> dict[str, tuple[int, ...]]:
    """Draw shapes of a few parameters: scalars, vectors, matrices, empty ones.

    Args:
        draw: Given by hypothesis.
        min_size: Least number of parameters. >= 0.
        max_size: Largest number of parameters. <= 4.

    Example:
        >>> from hypothesis import find
        >>> find(parameter_shapes(), lambda shapes: len(shapes) == 2)
        {'a.weight': (), 'a.bias': ()}
    """
    names = ["a.weight", "a.bias", "b.weight", "norm"]
    count = draw(st.integers(min_size, max_size))
    return {name: draw(_shapes) for name in names[:count]}


@st.composite
def tensor_maps(
    draw: st.DrawFn,
    shapes: Shapes,
    dtype: torch.dtype = torch.float64,
    elements: st.SearchStrategy[float] = ordinary,
) -> fo.TensorMap:
    """Draw a tensor map with given names and shapes.

    Args:
        draw: Given by hypothesis.
        shapes: Shape by name.
        dtype: Dtype of all tensors.
        elements: Strategy of a number: `ordinary`, `finite`, `hostile`.

    Example:
        >>> from hypothesis import find
        >>> find(tensor_maps({"w": (2,)}), lambda tensors: True)
        {'w': tensor([0., 0.], dtype=torch.float64)}
    """
    return {
        name: draw(_tensors(shape, dtype, elements)) for name, shape in shapes.items()
    }


@st.composite
def gradient_sequences(
    draw: st.DrawFn,
    shapes: Shapes,
    dtype: torch.dtype = torch.float64,
    elements: st.SearchStrategy[float] = ordinary,
    *,
    min_size: int = 1,
    max_size: int = 4,
    omit: bool = True,
) -> list[fo.TensorMap]:
    """Draw the gradients of some steps; a step may lack some names.

    The maps are picked from a pool of at most three, so that long sequences are cheap
    and steps repeat.

    Args:
        draw: Given by hypothesis.
        shapes: Shape by name.
        dtype: Dtype of all tensors.
        elements: Strategy of a number.
        min_size: Least number of steps. >= 1.
        max_size: Largest number of steps.
        omit: Whether names may be missing; never all of a step.

    Example:
        >>> from hypothesis import find
        >>> find(gradient_sequences({"w": ()}), lambda steps: len(steps) == 2)
        [{'w': tensor(0., dtype=torch.float64)}, {'w': tensor(0., dtype=torch.float64)}]
    """
    pool = draw(st.lists(tensor_maps(shapes, dtype, elements), min_size=1, max_size=3))
    picks = st.integers(0, len(pool) - 1)
    order = draw(st.lists(picks, min_size=min_size, max_size=max_size))
    missing = [frozenset[str]()] * len(order)
    if omit and len(shapes) > 1:
        some = st.frozensets(st.sampled_from(list(shapes)), max_size=len(shapes) - 1)
        missing = [draw(some) for _ in order]
    return [
        {name: g.clone() for name, g in pool[i].items() if name not in gone}
        for i, gone in zip(order, missing, strict=True)
    ]


@st.composite
def examples(
    draw: st.DrawFn,
    params: fo.TensorMap | None = None,
    contexts: Sequence[fo.Context] = (),
    *,
    elements: st.SearchStrategy[float] = ordinary,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    omit: bool = True,
    max_steps: int = 4,
) -> Example:
    """Draw parameters, and the updates of a few steps.

    Args:
        draw: Given by hypothesis.
        params: Parameters that give names, shapes and dtypes; None draws them.
        contexts: What the loop knows at each step, in turns.
        elements: Strategy of a number.
        dtypes: Dtypes to choose from; those of `params` come first.
        omit: Whether steps may lack names.
        max_steps: Largest number of steps.

    Example:
        >>> from hypothesis import find
        >>> find(examples({"w": torch.zeros(2)}), lambda example: True)
        Example(
            params={"w": torch.tensor([0.0, 0.0])},
            updates=[{"w": torch.tensor([0.0, 0.0])}],
        )
    """
    if params is None:
        shapes = draw(parameter_shapes())
        dtype = draw(st.sampled_from(list(dtypes)))
        kinds = dict.fromkeys(shapes, dtype)
    else:
        shapes = {name: tuple(p.shape) for name, p in params.items()}
        kinds = {name: p.dtype for name, p in params.items()}
    maps = [draw(tensor_maps(shapes, elements=elements))]
    maps += draw(
        gradient_sequences(shapes, elements=elements, max_size=max_steps, omit=omit)
    )
    params, *updates = (
        {name: x.to(kinds[name]) for name, x in tensors.items()} for tensors in maps
    )
    return Example(params, updates, contexts)

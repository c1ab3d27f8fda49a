"""Strategies of transforms and chains of the library, with their hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import functional_optim as fo
from functional_optim import schedules
from functional_optim.testing._hypothesis import st

_numbers = st.floats(-4, 4, width=32)
_fractions = st.floats(0, 0.9375, width=32)
_positive = st.floats(0.125, 8, width=32)


def _hyperparameters(
    numbers: st.SearchStrategy[float], names: Sequence[str] = ()
) -> st.SearchStrategy[Any]:
    """A number, or a tensor, a schedule or a map by name of such numbers."""
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
    """Transforms of the library; numbers, tensors, schedules and maps as arguments.

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
    """Chains of transforms of the library, in an order that `chain` accepts.

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

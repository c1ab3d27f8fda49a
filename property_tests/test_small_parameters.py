"""A step of small parameters, gathered or alone, does what `update` does."""

from __future__ import annotations

import warnings

import torch
from chains import in_place_chains
from graph_code import the_graph
from hypothesis import example, given, settings
from hypothesis import strategies as st

import functional_optim as fo
from functional_optim.execution.compiled._kernels import KernelCache
from functional_optim.testing import Example, strategies
from functional_optim.testing.laws._execution import moves_alike

SHAPES = {"a": (8,), "b": (3,), "c": (2, 4), "d": (0,), "e": (), "f": (16,)}
PARAMS = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}


def _one_late() -> Example:
    """Return an example where "a" has its first gradient in the second step."""
    everything = {name: torch.ones_like(p) for name, p in PARAMS.items()}
    without = {name: u for name, u in everything.items() if name != "a"}
    return Example(PARAMS, [without, everything, everything])


@settings(max_examples=60)
@example(
    transform=fo.chain(fo.Accumulate(2, mean=False)),
    steps=_one_late(),
    elements=1,
    compiles=True,
)
@given(
    transform=in_place_chains(list(SHAPES)),
    steps=strategies.examples(PARAMS),
    elements=st.sampled_from([1, 20, 1000]),
    compiles=st.booleans(),
)
def test_every_chain(
    transform: fo.Chain, steps: Example, elements: int, compiles: bool
) -> None:
    """Parameters, state and gradients are those of the pure way, step by step."""
    kernels = KernelCache(the_graph) if compiles else None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "compile=True")
        moves_alike(transform, steps, elements, kernels)

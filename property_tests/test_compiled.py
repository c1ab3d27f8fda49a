"""Compiled units do what `update` does: every chain, as the graph that is compiled.

What the compiler makes of a graph is its affair, and tried on a few chains in
tests/execution/test_compiled.py: it takes seconds for each. Here the graph itself runs,
so that thousands of chains can be tried: what is traced, memoized, written, and shared
between units.
"""

from __future__ import annotations

import warnings

from chains import in_place_chains
from graph_code import the_graph
from hypothesis import given, settings
from hypothesis import strategies as st

import functional_optim as fo
from functional_optim.execution.compiled._kernels import KernelCache
from functional_optim.testing import Example, strategies
from functional_optim.testing._examples import SHAPES, fixed_examples
from functional_optim.testing.laws._execution import moves_alike

PARAMS = fixed_examples(None)[0].params


@settings(max_examples=60)
@given(
    transform=in_place_chains(list(SHAPES)),
    example=strategies.examples(PARAMS),
    elements=st.sampled_from([1, 3, 1000]),
)
def test_every_chain(transform: fo.Chain, example: Example, elements: int) -> None:
    """Parameters, state and gradients are those of the pure way, step by step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "compile=True")
        moves_alike(transform, example, elements, KernelCache(the_graph))

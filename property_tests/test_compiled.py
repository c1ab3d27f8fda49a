"""Compiled units do what `update` does: every chain, as the graph that is compiled.

What the compiler makes of a graph is its affair, and tried in tests/test_compiled.py on
a few chains: it takes seconds for each. Here the graph itself runs, so that thousands
of chains can be tried: what is traced, hoisted, written, and shared between units.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import functional_optim as fo
from functional_optim.execution._compiled import Compiling
from functional_optim.execution._executor import Executor
from functional_optim.execution._tracing import Graph
from functional_optim.testing import Example, strategies
from functional_optim.testing._compare import difference
from functional_optim.testing._examples import SHAPES, fixed_examples

PARAMS = fixed_examples(None)[0].params
ROUNDING = 1e-12
"""In float64: the order of sums, n * eps with n < 4000; and a trace takes numbers for
tensors, so that a factor may be rounded once more."""


def the_graph(graph: Graph) -> Any:
    """Return code that is the graph itself."""
    return lambda tensors: graph.module(*tensors)


@settings(max_examples=60)
@given(
    transform=strategies.chains(list(SHAPES)),
    example=strategies.examples(PARAMS),
    elements=st.sampled_from([1, 3, 1000]),
)
def test_every_chain(transform: fo.Chain, example: Example, elements: int) -> None:
    """Parameters, state and gradients are those of the pure way, step by step."""
    params, state = example.params, transform.init(example.params)
    own = {name: p.clone() for name, p in params.items()}
    executor = Executor(
        own,
        [transform],
        dict.fromkeys(own, 0),
        transform.init(own),
        unit_bytes=elements * 8,
        compiling=Compiling(the_graph),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for updates, context in example.steps:
            moved, state = transform.update(updates, state, params, context=context)
            params = fo.apply_updates(params, moved)
            grads = {name: u.clone() for name, u in updates.items()}
            executor.step(grads, context=context)
            assert not difference(own, params, ROUNDING)
            assert not difference(executor.store.state, state, ROUNDING)
            assert not difference(grads, updates)
    told = [str(w.message) for w in caught if "compile=True" in str(w.message)]
    event(f"compiled: {not told}")
    codes = [bucket.codes for bucket in executor.buckets if bucket.codes]
    event(f"buckets: {len(codes)}")
    if told:
        pytest.fail(told[0])

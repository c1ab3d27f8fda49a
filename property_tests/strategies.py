"""Strategies: tensor maps, runs of gradients, chains. Hypothesis draws every number."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from laws import Example
from torch import Tensor

import functional_optim as fo

ordinary = st.floats(-100, 100, width=32).map(lambda x: x if abs(x) > 1e-3 else 0.0)
"""Everyday numbers, zero included."""

finite = st.one_of(
    ordinary,
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 1e-20, 1e15, -1e18]),
)
"""Also signed zeros, subnormals and huge ones whose squares stay finite in float32."""

hostile = st.one_of(
    finite, st.sampled_from([float("nan"), float("inf"), -float("inf")])
)


def tensors(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    elements: st.SearchStrategy[float] = ordinary,
) -> st.SearchStrategy[Tensor]:
    """Tensors of one shape."""
    arrays = hnp.arrays(np.float64, shape, elements=elements, fill=st.nothing())
    return arrays.map(lambda a: torch.from_numpy(a.copy()).to(dtype))


shapes = st.sampled_from([(), (0,), (1,), (3,), (2, 2), (2, 0), (1, 3, 1)])


@st.composite
def parameter_shapes(
    draw: st.DrawFn, least: int = 1, most: int = 3
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a few parameters."""
    names = ["a.weight", "a.bias", "b.weight", "norm"]
    count = draw(st.integers(least, most), label="number of parameters")
    return {name: draw(shapes, label=f"shape of {name}") for name in names[:count]}


@st.composite
def maps(
    draw: st.DrawFn,
    of: dict[str, tuple[int, ...]],
    dtype: torch.dtype = torch.float64,
    elements: st.SearchStrategy[float] = ordinary,
) -> fo.TensorMap:
    """Tensor maps with given names and shapes."""
    return {
        name: draw(tensors(shape, dtype, elements), label=name)
        for name, shape in of.items()
    }


@st.composite
def runs(
    draw: st.DrawFn,
    of: dict[str, tuple[int, ...]],
    steps: int,
    dtype: torch.dtype = torch.float64,
    elements: st.SearchStrategy[float] = ordinary,
    *,
    omit: bool = True,
) -> list[fo.TensorMap]:
    """Gradients of some steps, drawn from a small pool; names may be missing."""
    pool = draw(
        st.lists(maps(of, dtype, elements), min_size=1, max_size=3), label="pool"
    )
    order = draw(
        st.lists(st.integers(0, len(pool) - 1), min_size=steps, max_size=steps),
        label="order",
    )
    missing = [frozenset[str]()] * steps
    if omit:
        some = st.frozensets(st.sampled_from(list(of)), max_size=max(len(of) - 1, 0))
        missing = draw(st.lists(some, min_size=steps, max_size=steps), label="missing")
    return [
        {name: g.clone() for name, g in pool[i].items() if name not in gone}
        for i, gone in zip(order, missing, strict=True)
    ]


@st.composite
def examples(
    draw: st.DrawFn,
    dtype: torch.dtype = torch.float64,
    elements: st.SearchStrategy[float] = ordinary,
    of: dict[str, tuple[int, ...]] | None = None,
    *,
    omit: bool = True,
) -> Example:
    """Parameters and gradients of one to four steps."""
    of = draw(parameter_shapes()) if of is None else of
    params = draw(maps(of, dtype, elements), label="params")
    steps = draw(st.integers(1, 4), label="steps")
    grads = draw(runs(of, steps, dtype, elements, omit=omit), label="gradients")
    return Example(params, [(g, fo.Context()) for g in grads])

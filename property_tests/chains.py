"""Chains that run in place: at most one `Accumulate`, the first member."""

from __future__ import annotations

from hypothesis import strategies as st

import functional_optim as fo
from functional_optim.testing import strategies


def in_place_chains(names: list[str]) -> st.SearchStrategy[fo.Chain]:
    """Return a strategy for chains over these names."""
    return strategies.chains(names).map(_window_first)


def _window_first(transform: fo.Chain) -> fo.Chain:
    windows = [m for m in transform.members if isinstance(m, fo.Accumulate)]
    others = [m for m in transform.members if not isinstance(m, fo.Accumulate)]
    return fo.chain(*windows[:1], *others)

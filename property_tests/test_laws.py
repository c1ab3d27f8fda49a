"""The laws on every public transform, with parameters and gradients by hypothesis."""

from __future__ import annotations

import laws
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from law_examples import SHAPES
from transform_cases import CASES, Case

import functional_optim as fo

LAWS = [laws.purity, laws.determinism, laws.structure, laws.omitted_names, laws.hold]
cases = st.sampled_from(CASES)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@given(case=cases, data=strategies.examples(of=SHAPES, elements=strategies.hostile))
def test_law(law, case: Case, data: laws.Example) -> None:
    """The law holds whatever the numbers are, NaN and infinity included."""
    law(case.transform, data)


@given(case=cases, data=strategies.examples(of=SHAPES, omit=False))
def test_scope(case: Case, data: laws.Example) -> None:
    """An update on any legal cut, totals shared, equals the update on the whole."""
    laws.scope(case.transform, data)


@given(case=cases, data=strategies.examples(of=SHAPES))
def test_plain_data(case: Case, data: laws.Example) -> None:
    """A state survives plain data on disk."""
    laws.plain_data(case.transform, data)


@given(
    parts=st.lists(cases, max_size=3),
    data=strategies.examples(torch.float32, strategies.finite, SHAPES),
)
def test_chains(parts: list[Case], data: laws.Example) -> None:
    """Chains of any transforms that chain accepts are lawful and associative."""
    transforms = [case.transform for case in parts]
    try:
        chained = fo.chain(*transforms)
    except ValueError:
        return  # A refused order, tested by itself.
    for split in range(len(transforms) + 1):
        left, right = fo.chain(*transforms[:split]), fo.chain(*transforms[split:])
        assert fo.chain(left, right) == chained
    laws.purity(chained, data)
    laws.structure(chained, data)
    laws.omitted_names(chained, data)

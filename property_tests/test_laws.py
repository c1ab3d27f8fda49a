"""Every law on every public transform, combinator and preset, and on random chains.

Writes docs/laws.md with `pytest property_tests/test_laws.py --write-laws-table`.
"""

from __future__ import annotations

import itertools
import re

import laws_table
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transform_cases import CASES, Case

import functional_optim as fo
from functional_optim.testing import Law, laws, strategies
from functional_optim.testing._examples import SHAPES, fixed_examples

PARAMS = fixed_examples(None)[0].params
ROWS: dict[str, list[Case]] = {}
for one in sorted(CASES, key=lambda case: case.label.lower()):
    ROWS.setdefault(one.label, []).append(one)

each_law = pytest.mark.parametrize("law", laws.ALL, ids=lambda law: law.name)


def _cases(row: str, law: Law) -> list[Case]:
    """Return the cases of a row that a law speaks of."""
    cases = ROWS.get(row, CASES)
    return [c for c in cases if c.smooth or law is not laws.differentiable]


@each_law
@pytest.mark.parametrize("row", ROWS)
def test_law(row: str, law: Law) -> None:
    """The law holds whatever the numbers are, NaN and infinity included."""
    cases = _cases(row, law)
    examples = settings().max_examples
    tried = [
        law(
            case.transform,
            params=PARAMS,
            contexts=case.contexts,
            elements=strategies.hostile,
            max_examples=-(-examples // len(cases)),
        )
        for case in cases
    ]
    laws_table.record(row, law, sum(tried))


@pytest.mark.parametrize("law", [law for law in laws.ALL if law.drawn], ids=repr)
@given(data=st.data())
def test_random_chains(law: Law, data: st.DataObject) -> None:
    """The law holds for chains of any transforms, with any hyperparameters."""
    names = list(SHAPES)
    chain = data.draw(strategies.chains(names, smooth=law is laws.differentiable))
    elements = strategies.away_from_zero if law.away_from_zero else strategies.finite
    example = data.draw(strategies.examples(PARAMS, elements=elements, omit=law.omit))
    laws_table.record("random chains", law, law(chain, example), add=True)


@pytest.mark.parametrize("law", [laws.plain_data, laws.compiled], ids=repr)
@settings(max_examples=5)
@given(chain=strategies.chains(list(SHAPES)))
def test_random_chains_on_fixed_examples(law: Law, chain) -> None:
    """They can be saved at any step, and compile without graph breaks."""
    laws_table.record("random chains", law, law(chain, params=PARAMS), add=True)


@given(data=st.data())
def test_chaining_is_associative(data: st.DataObject) -> None:
    """However a chain is put together, it is the same chain."""
    members = data.draw(strategies.chains(list(SHAPES))).members
    for i, j in itertools.combinations_with_replacement(range(len(members) + 1), 2):
        parts = members[:i], members[i:j], members[j:]
        nested = fo.chain(*(fo.chain(*part) for part in parts))
        assert nested == fo.chain(*members)


def test_table_is_current() -> None:
    """docs/laws.md is what a run writes, whatever the numbers in it are."""
    tried = {
        (row, law.name): len(_cases(row, law))
        for row in [*ROWS, "random chains"]
        for law in laws.ALL
    }
    wanted, written = laws_table.text(tried, laws.ALL), laws_table.PAGE.read_text()
    assert re.sub(r"\b\d+\b", "n", written) == re.sub(r"\b\d+\b", "n", wanted)

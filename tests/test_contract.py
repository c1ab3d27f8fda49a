"""Every public transform against every law, on fixed examples."""

from __future__ import annotations

import math
import pickle
import re
import types

import laws
import pytest
import torch
import transform_cases
from transform_cases import CASES, Case

import functional_optim as fo
from law_examples import example
from functional_optim import schedules

# The names that a repr is written with.
WRITTEN = types.SimpleNamespace(
    **vars(fo),
    **{name: getattr(schedules, name) for name in schedules.__all__},
    tensor=torch.tensor,
    torch=torch,
    re=re,
    inf=math.inf,
    is_matrix=transform_cases.is_matrix,
    by_shape=transform_cases.by_shape,
    halving=transform_cases.halving,
)

pytestmark = pytest.mark.parametrize("case", CASES, ids=repr)


@pytest.mark.parametrize(
    "law",
    [
        laws.purity,
        laws.determinism,
        laws.structure,
        laws.omitted_names,
        laws.hold,
        laws.plain_data,
        laws.no_graph,
        laws.chaining,
    ],
    ids=lambda law: law.__name__,
)
def test_law(case: Case, law) -> None:
    """Every transform obeys every law."""
    law(case.transform, example())


def test_scope(case: Case) -> None:
    """An update on any legal cut, totals shared, equals the update on the whole."""
    laws.scope(case.transform, example(full=True))
    if "Accumulate" not in repr(case):  # A window closes for all names or for none.
        laws.scope(case.transform, example())


def test_vmap(case: Case) -> None:
    """vmap over init and update equals the loop over members."""
    laws.vmapped(case.transform, [example(seed) for seed in range(3)])


def test_compile(case: Case) -> None:
    """The compiled update equals the eager one and needs no new graphs."""
    laws.compiled(case.transform, example(full=True), case.graphs)


def test_differentiable(case: Case) -> None:
    """Derivatives through three updates are those of finite differences."""
    if case.smooth:
        laws.differentiable(case.transform, example())


def test_is_transform(case: Case) -> None:
    """It satisfies the protocol, with a scope that executors can rely on."""
    assert isinstance(case.transform, fo.Transform)
    assert case.transform.scope in set(fo.Scope)


def test_value_semantics(case: Case) -> None:
    """It is immutable, hashable, and equal to its pickled copy."""
    copy = pickle.loads(pickle.dumps(case.transform))
    assert copy == case.transform
    assert hash(copy) == hash(case.transform)
    assert case.transform != fo.Scale(123.0)
    with pytest.raises(AttributeError, match="cannot assign"):
        case.transform.anything = 1


def test_resolved_is_the_same_rule(case: Case) -> None:
    """What a transform resolves to for one name updates that name the same way."""
    if isinstance(case.transform, fo.Partition) or "Global" in repr(case):
        return  # Sees other names through labels or reduce, tested by the scope law.
    data = example(full=True)
    for name, param in data.params.items():
        resolved = fo.resolve(case.transform, name, param)
        assert fo.resolve(resolved, name, param) == resolved
        state, all_state = (
            resolved.init({name: param}),
            case.transform.init(data.params),
        )
        for updates, _ in data.steps:
            out, state = resolved.update({name: updates[name]}, state, {name: param})
            whole, all_state = case.transform.update(updates, all_state, data.params)
            expected = {name: whole[name]} if name in whole else {}
            laws.assert_same(expected, out, "resolved update")


def test_prints_as_written(case: Case) -> None:
    """Its repr is the call that makes it."""
    assert eval(repr(case.transform), vars(WRITTEN)) == case.transform

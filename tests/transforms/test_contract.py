"""Every public transform against every law, on fixed examples."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
import types

import pytest
import torch
import transform_cases
from comparison import assert_same
from law_examples import example
from transform_cases import CASES, Case

import functional_optim as fo
from functional_optim import schedules
from functional_optim.testing import laws
from functional_optim.testing._compare import tensors
from functional_optim.testing.laws._scope import part_of

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
    by_letter=transform_cases.by_letter,
    halving=transform_cases.halving,
    the_parameter=transform_cases.the_parameter,
    magnitude=transform_cases.magnitude,
    is_small=transform_cases.is_small,
)

pytestmark = pytest.mark.parametrize("case", CASES, ids=repr)


@pytest.mark.parametrize(
    "law",
    [law for law in laws.ALL if law not in {laws.compiled, laws.differentiable}],
    ids=repr,
)
def test_law(case: Case, law) -> None:
    """Every transform obeys every law on one fixed example.

    Compiling takes long: property_tests/test_laws.py does it.
    """
    law(case.transform, example(contexts=case.contexts, full=not law.omit))


def test_differentiable(case: Case) -> None:
    """Derivatives through three updates are those of finite differences."""
    if case.smooth:
        laws.differentiable(case.transform, example())


def test_is_transform(case: Case) -> None:
    """It satisfies the protocol, with a scope that executors can rely on."""
    assert isinstance(case.transform, fo.Transform)
    assert case.transform.scope in set(fo.Scope)


def test_value_semantics(case: Case) -> None:
    """It is immutable, hashable, equal to its copy, and unequal to a changed one."""
    copy = pickle.loads(pickle.dumps(case.transform))
    assert copy == case.transform
    assert hash(copy) == hash(case.transform)
    with pytest.raises(AttributeError, match="cannot assign"):
        case.transform.anything = 1
    for field in dataclasses.fields(case.transform):
        changed = pickle.loads(pickle.dumps(case.transform))
        object.__setattr__(changed, field.name, "something else")
        assert changed != case.transform


def test_resolved_is_the_same_rule(case: Case) -> None:
    """What it resolves to for one name updates the state of that name the same way."""
    data = example(contexts=case.contexts, full=True)
    whole_state = case.transform.init(data.params)
    resolved = {
        name: fo.resolve(case.transform, name, p) for name, p in data.params.items()
    }
    states = {
        name: part_of(whole_state, [(name, slice(None))], data.params)
        for name in data.params
    }
    for updates, context in data.steps:
        whole, whole_state = case.transform.update(
            updates, whole_state, data.params, context=context
        )
        for name, param in data.params.items():
            assert fo.resolve(resolved[name], name, param) == resolved[name]
            if "Global" in repr(case):
                continue  # Its norm ranges over other names too.
            out, states[name] = resolved[name].update(
                {name: updates[name]}, states[name], {name: param}, context=context
            )
            expected = {name: whole[name]} if name in whole else {}
            assert_same(expected, out, "resolved update")


def test_runs_on_any_device(case: Case) -> None:
    """Nothing is made on the CPU for parameters elsewhere, and nothing is read."""
    data = example(contexts=case.contexts)
    params = {name: p.to("meta") for name, p in data.params.items()}
    state = case.transform.init(params)
    for updates, context in data.steps:
        given = {name: u.to("meta") for name, u in updates.items()}
        out, state = case.transform.update(given, state, params, context=context)
        for place, x in tensors((out, state)):
            assert x.device.type == "meta", place


def test_prints_as_written(case: Case) -> None:
    """Its repr is the call that makes it."""
    assert eval(repr(case.transform), vars(WRITTEN)) == case.transform

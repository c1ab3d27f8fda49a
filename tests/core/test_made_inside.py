"""Transforms that are made inside torch.compile and vmap: a hyperparameter each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_same
from law_examples import example
from transform_cases import CASES, Case

import functional_optim as fo

# What forward mode and Inductor import warns of what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile into one graph, without what earlier tests left."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="eager")


def _maker(value: Any) -> Callable[[], Any]:
    """Return a function that makes a transform again, with all that is inside."""
    if isinstance(value, dict):
        entries = {key: _maker(part) for key, part in value.items()}
        return lambda: {key: make() for key, make in entries.items()}
    if type(value) is tuple:
        parts = [_maker(part) for part in value]
        return lambda: tuple(make() for make in parts)
    if not hasattr(value, "update") or not dataclasses.is_dataclass(value):
        return lambda: value
    kind = type(value)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    makers = {name: _maker(getattr(value, name)) for name in fields}
    keywords = [name for name, field in fields.items() if field.kw_only]
    places = [name for name in fields if name not in keywords]
    return lambda: kind(
        *[makers[name]() for name in places], **{n: makers[n]() for n in keywords}
    )


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_made_inside_a_compiled_function(case: Case) -> None:
    """A transform that is made, starts and steps inside is one graph, with its bits."""
    make, data = _maker(case.transform), example(contexts=case.contexts)
    assert make() == case.transform

    def run(params, steps):
        transform, out = make(), []
        state = transform.init(params)
        for updates, context in steps:
            result = transform.update(updates, state, params, context=context)
            out.append(result)
            state = result[1]
        return out

    given = data.params, data.steps[:2]
    assert_same(run(*given), _compiled(run)(*given), "step ")


def test_the_context_may_be_left_out_in_a_compiled_function() -> None:
    """Every transform runs without a context where it is compiled."""
    members = {name: torch.randn(3) for name in ("a", "b")}
    inside = fo.chain(fo.Observe("norm"), fo.ZeroNans(), fo.ClipByGlobalNorm(1.0))
    for transform in (
        *inside.members,
        fo.Accumulate(1),
        fo.Masked(inside, "a"),
        fo.Named("inside", inside),
        fo.Partition({"x": inside, "y": fo.Identity()}, {"a": "x", "*": "y"}),
        fo.SkipNonfinite(inside),
        inside,
    ):
        make = _maker(transform)

        def run(u, make=make):
            transform = make()
            return transform.update(u, transform.init(u), u)

        assert_same(run(members), _compiled(run)(members), f"{transform} ")


RATES = {
    "preset": fo.adamw,
    "chain in a chain": lambda lr: fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(lr)),
    "SkipNonfinite": lambda lr: fo.SkipNonfinite(fo.sgd(lr, momentum=0.9)),
    "Masked": lambda lr: fo.chain(fo.Masked(fo.adam(lr), fo.exclude("b"))),
    "Partition": lambda lr: fo.Partition(
        {"x": fo.sgd(lr), "y": fo.chain(fo.Centralize(), fo.adamw(lr))},
        lambda name, p: "y" if p.ndim > 1 else "x",
    ),
    "Named": lambda lr: fo.Named("outer", fo.chain(fo.Accumulate(1), fo.adamw(lr))),
    "a rate for each name": lambda lr: fo.sgd({"w": lr, "b": 0.1}),
    "a schedule": lambda lr: fo.sgd(lambda step: lr * 0.5**step),
}


@pytest.mark.parametrize("kind", RATES)
def test_an_ensemble_compiles_with_a_rate_for_each_member(kind: str) -> None:
    """The ensemble step of the README is one graph, with any combinator in it."""
    make = RATES[kind]
    members = {"w": torch.randn(3, 4, 2).double(), "b": torch.randn(3, 4).double()}
    rates = torch.tensor([0.1, 0.01, 0.001], dtype=torch.float64)
    states = torch.func.vmap(lambda p: make(0.1).init(p))(members)

    def one_step(lr, grads, state, params):
        updates, state = make(lr).update(grads, state, params)
        return fo.apply_updates(params, updates), state

    step = torch.func.vmap(one_step)
    expected = step(rates, members, states, members)
    assert_same(expected, _compiled(step)(rates, members, states, members), "step ")
    for index in range(3):  # Each has its own rate.
        one, state = torch.utils._pytree.tree_map(
            lambda x, i=index: x[i], (members, states)
        )
        alone, _ = one_step(rates[index], one, state, one)
        together = {name: p[index] for name, p in expected[0].items()}
        assert_same(alone, together, "member ", rtol=1e-12)


@dataclasses.dataclass(frozen=True)
class _Signs:
    """A user's transform with the default that `update` had before."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params):
        """Return the empty state."""
        return ()

    def update(self, updates, state, params, *, context=fo.Context()):
        """Return the sign, or the value of the loss."""
        weight = 1.0 if context.weight is None else context.weight
        return {name: weight * u.sign() for name, u in updates.items()}, state


def test_a_transform_with_a_default_context_runs_everywhere() -> None:
    """`context=Context()` in a user's `update` works, alone and inside all of ours."""
    p = {"a": torch.tensor([2.0, -3.0]), "b": torch.tensor([-1.0])}
    signs, own = {name: x.sign() for name, x in p.items()}, _Signs()
    assert_same(own.update(p, (), p)[0], signs, "alone ")
    for transform in (
        fo.chain(own),
        fo.Masked(own, "*"),
        fo.Named("own", own),
        fo.Partition({"x": own}, "x"),
        fo.SkipNonfinite(own),
    ):
        assert_same(transform.update(p, transform.init(p), p)[0], signs, "inside ")
    step = _compiled(lambda u: fo.chain(_Signs(), fo.Scale(2.0)).update(u, ((), ()), u))
    assert_same(step(p)[0], {n: 2 * s for n, s in signs.items()}, "compiled ")
    q = torch.nn.Parameter(torch.zeros(2))
    q.grad = p["a"]
    optimizer = fo.TransformOptimizer([q], fo.chain(own, fo.ScaleByLearningRate(0.5)))
    optimizer.step()
    assert q.tolist() == [-0.5, 0.5]

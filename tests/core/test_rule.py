"""A rule is its formula on one parameter, in every way of running."""

from __future__ import annotations

import importlib.util
import math
import pathlib
import sys
from typing import Any, NamedTuple

import pytest
import torch
from comparison import assert_same
from torch import Tensor, zeros_like

import functional_optim as fo
from functional_optim import Pair, Scalar, hyperparameter, number
from functional_optim.testing import check_transform

PARAMS = {"a": torch.linspace(-1, 1, 6).view(2, 3), "b": torch.ones(())}
GRADS = {"a": torch.linspace(2, -1, 6).view(2, 3), "b": torch.tensor(0.5)}


def _example(name: str) -> Any:
    path = pathlib.Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LaProp = _example("own_rule").LaProp


class MeanState(NamedTuple):
    """The state of a mean."""

    count: Any
    mean: Any


class SignedMean(fo.Rule, scope=fo.Scope.ELEMENTWISE, role=fo.Role.MOMENT):
    """The sign of a mean with a correction."""

    decay: Scalar = hyperparameter(default=0.9, ge=0.0, lt=1.0)

    def init_param(self, p):
        """Return the start."""
        return MeanState(number(0.0), zeros_like(p))

    def update_param(self, u, s, p):
        """Return the formula."""
        t = s.count + 1
        mean = fo.lerp(s.mean, u, 1 - self.decay)
        return (mean / (1 - self.decay**t)).sign(), MeanState(t, mean)


class Normalized(fo.Rule, scope=fo.Scope.PER_TENSOR):
    """An update of norm `size` in each tensor, and a count."""

    size: Scalar = hyperparameter(default=1.0, ge=0.0)

    def init_param(self, p):
        """Return the start."""
        return MeanState(number(0.0), zeros_like(p))

    def update_param(self, u, s, p):
        """Return the formula."""
        norm = torch.linalg.vector_norm(u)
        mean = s.mean + u
        return u / (norm + 1e-6) * self.size, MeanState(s.count + 1, mean)


class Balanced(fo.Rule, scope=fo.Scope.ELEMENTWISE):
    """A sum over all parameters, and a norm that depends on it."""

    def update_param(self, u, s, p):
        """Return the formula."""
        mean = fo.total(u * p, "sum")
        norm = fo.total(u * (1 + mean), fo.Norm(2.0))
        return u / (norm + 1), s


class Steps(fo.Rule, scope=fo.Scope.ELEMENTWISE):
    """Clamps, comparisons, powers, and numbers on the left."""

    bounds: Pair = hyperparameter(default=(-0.5, 0.5))

    def update_param(self, u, s, p):
        """Return the formula."""
        low, high = self.bounds
        bent = torch.where(u > p, 1 - u, 2.0 / (u.abs() + 1))
        return bent.clamp(low, high) + abs(low) ** 2 * u.square(), s


@pytest.mark.parametrize(
    "rule",
    [
        LaProp(),
        LaProp((0.9, lambda step: 0.99 - 0.5 / (step + 2)), signed=True),
        LaProp((torch.tensor(0.8), 0.99), eps={"a": 1e-3, "b": 1e-2}),
        SignedMean(),
        Normalized(2.0),
        Normalized(lambda step: 1 / (step + 1)),
        Balanced(),
        Steps(),
        fo.chain(Balanced(), Steps((-1.0, 1.0)), SignedMean(0.5), Normalized()),
    ],
    ids=repr,
)
def test_rules_obey_the_laws(rule: fo.Transform) -> None:
    """Pure, in place, cut, compiled, in vmap: users' rules as ours."""
    params = None
    if "eps={" in repr(rule):
        params = {"a": torch.ones(2, 3).double(), "b": torch.ones(2).double()}
    check_transform(rule, params=params)


def test_a_formula_is_what_it_says() -> None:
    """LaProp over five steps, with a name missing, is the plain loop in float64."""
    params = {name: p.double() for name, p in PARAMS.items()}
    rule = LaProp((0.8, 0.95), eps=1e-8)
    state = rule.init(params)
    m = {name: zeros_like(p) for name, p in params.items()}
    v = {name: zeros_like(p) for name, p in params.items()}
    t = dict.fromkeys(params, 0)
    for step in range(5):
        grads = {n: (1 + step) * g.double() for n, g in GRADS.items()}
        if step == 2:
            del grads["b"]
        moved, state = rule.update(grads, state, params)
        for name, g in grads.items():
            t[name] += 1
            v[name] = v[name] * 0.95 + 0.05 * g * g
            root = (v[name] / (1 - 0.95 ** t[name])).sqrt()
            m[name] = m[name] + 0.2 * (g / (root + 1e-8) - m[name])
            wanted = m[name] / (1 - 0.8 ** t[name])
            # A few roundings apart: torch fuses products and sums.
            torch.testing.assert_close(moved[name], wanted, rtol=1e-14, atol=0)
    assert [c.item() for c in state.step.values()] == [5.0, 4.0]


def test_nothing_that_was_given_comes_back() -> None:
    """An update that is its input, or an entry of the state, is a copy."""

    class Delay(fo.Rule, scope=fo.Scope.ELEMENTWISE):
        def init_param(self, p):
            return MeanState(number(0.0), p)

        def update_param(self, u, s, p):
            return s.mean, MeanState(s.count, u)

    state = Delay().init(PARAMS)
    moved, new = Delay().update(GRADS, state, PARAMS)
    assert_same(moved, PARAMS, "moved")
    assert_same(new.mean, GRADS, "mean")
    given = {t.data_ptr() for t in [*GRADS.values(), *PARAMS.values()]}
    given |= {t.data_ptr() for t in state.mean.values()}
    assert given.isdisjoint(t.data_ptr() for t in [*moved.values(), *new.mean.values()])
    assert {t.data_ptr() for t in state.mean.values()}.isdisjoint(
        t.data_ptr() for t in PARAMS.values()
    )


def test_counts_are_shared() -> None:
    """Parameters with one history have one count, also where a rate differs by name."""
    rule = SignedMean({"a": 0.9, "b": 0.8})
    _, state = rule.update(GRADS, rule.init(PARAMS), PARAMS)
    assert state.count["a"] is state.count["b"]


def _rule(formula: Any, *, scope: Any = fo.Scope.ELEMENTWISE, state: Any = None) -> Any:
    """Return a rule with one hyperparameter and a formula."""
    members = {
        "__annotations__": {"lr": "Scalar"},
        "__module__": __name__,
        "lr": hyperparameter(default=0.1),
        "update_param": formula,
    }
    if state is not None:
        members["init_param"] = state
    return type("Mine", (fo.Rule,), members, scope=scope)()


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (lambda self, u, s, p: (u / u.norm(), s), "norm is not elementwise; declare"),
        (lambda self, u, s, p: (u - u.mean(), s), "mean is not .*scope=Scope.PER_TENS"),
        (lambda self, u, s, p: (u.reshape(-1), s), "reshape is not elementwise"),
        (lambda self, u, s, p: (u[0], s), "getitem is not elementwise"),
        (lambda self, u, s, p: (u @ p, s), "matmul is not elementwise"),
        (lambda self, u, s, p: (u.max(), s), "max is not elementwise"),
        (lambda self, u, s, p: (u if self.lr > 0 else p, s), "reads a value on the ho"),
        (lambda self, u, s, p: (u if u.sign() == 1 else p, s), "by torch.where, or as"),
        (lambda self, u, s, p: (u * float(self.lr), s), "reads a value on the host"),
        (lambda self, u, s, p: (u * math.sqrt(self.lr), s), "reads a value on the hos"),
        (lambda self, u, s, p: (u * u.item(), s), "item reads a value on the host"),
        (lambda self, u, s, p: (u + torch.rand_like(u), s), "rand_like draws random"),
        (lambda self, u, s, p: (u.mul_(2), s), r"mul_ writes .*; write x\.mul\("),
        (lambda self, u, s, p: (u * torch.ones(3), s), "neither an input nor a number"),
        (lambda self, u, s, p: u, r"must return \(update, state\), got one tensor"),
        (lambda self, u, s, p: (self.lr, s), "tensor as the update, got a number"),
        (lambda self, u, s, p: (u, MeanState(u, u)), "define init_param"),
    ],
)
def test_what_is_not_elementwise_is_refused(formula: Any, message: str) -> None:
    """At the first use, with the file and the line of the formula."""
    rule = _rule(formula)
    with pytest.raises(TypeError, match=message) as caught:
        rule.init(PARAMS)
    assert f"Mine.update_param ({__file__}:" in str(caught.value)


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (lambda self, u, s, p: (u, ()), r"must return a MeanState as init_param"),
        (lambda self, u, s, p: (u, MeanState(u, u)), "count must stay a number"),
        (lambda self, u, s, p: (u, MeanState(s.count, 1.0)), "mean must stay a tensor"),
        (lambda self, u, s, p: (u, MeanState(s.count, ())), r"mean must be \(\) in bo"),
        (lambda self, u, s, p: (u, MeanState(number(1.0), u)), "count must be compute"),
    ],
)
def test_a_state_of_another_kind_is_refused(formula: Any, message: str) -> None:
    """What `init_param` made stays what it is."""

    def start(self: Any, p: Tensor) -> MeanState:
        return MeanState(number(0.0), zeros_like(p))

    with pytest.raises(TypeError, match=message):
        _rule(formula, state=start).init(PARAMS)


def test_bad_classes() -> None:
    """A rule has a formula, and a scope that rules may have."""
    with pytest.raises(TypeError, match="Empty must define update_param"):
        type("Empty", (fo.Rule,), {}, scope=fo.Scope.ELEMENTWISE)
    with pytest.raises(TypeError, match="ELEMENTWISE or PER_TENSOR, got .*GLOBAL"):
        _rule(lambda self, u, s, p: (u, s), scope=fo.Scope.GLOBAL)
    whole = _rule(lambda self, u, s, p: (u.t(), s), scope=fo.Scope.PER_TENSOR)
    with pytest.raises(TypeError, match="t is neither elementwise nor a norm"):
        whole.init(PARAMS)
    with pytest.raises(TypeError, match="total is for the formula of a rule"):
        fo.total(torch.ones(2), "sum")


def test_a_state_of_before_loads() -> None:
    """The count of schedules once stood inside a state; on its own without one."""
    params = {"w": torch.ones(2)}
    count = torch.tensor(3.0, dtype=torch.float64)
    inner = {"type": "ScheduleState", "fields": {"num_updates": count}}
    scale = fo.Scale(lambda step: 0.5**step)
    loaded = fo.load_state_dict(scale.init(params), {"format": 1, "state": inner})
    assert scale.update(params, loaded, params)[0]["w"].tolist() == [0.125, 0.125]
    trace = fo.Trace(lambda step: 0.5 + 0 * step)
    data = fo.state_dict(trace.init(params))
    fields = dict(data["state"]["fields"]["state"]["fields"], schedule=inner)
    old = {"format": 1, "state": {"type": "TraceState", "fields": fields}}
    assert fo.load_state_dict(trace.init(params), old).num_updates == 3
    plain = fo.Trace(0.9)
    old["state"]["fields"]["schedule"] = []
    assert fo.load_state_dict(plain.init(params), old).started == ()


def test_a_total_of_parameters_is_of_those_that_move() -> None:
    """A parameter without an update takes no part, in a norm of parameters either."""

    class Relative(fo.Rule, scope=fo.Scope.ELEMENTWISE, role=fo.Role.LEARNING_RATE):
        lr: Scalar = hyperparameter(ge=0.0)
        damping: Scalar = hyperparameter(default=0.0)

        def update_param(self, u, s, p):
            return u * (-self.lr * fo.total(p, fo.Norm(2.0)) + self.damping), s

    params = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}
    rule = Relative(lambda step: 0.5**step)
    state = rule.init(params)
    assert fo.readings(rule, state)["lr"] == 1
    moved, _ = rule.update({"a": torch.ones(2)}, state, params)
    assert moved["a"].tolist() == [-5.0, -5.0]


def test_a_factor_that_is_a_tensor_rounds_as_a_number() -> None:
    """`add`, `addcmul` and `lerp` on tensors: no factor is rounded to 16 bits."""
    x, narrow = torch.zeros(2), torch.full((2,), 1e-2, dtype=torch.float16)
    for factor in (1e-6, torch.tensor(1e-6)):
        # 1e-8 is below the least float16, and 1e-2 is rounded to 2^-11 relative.
        assert fo.add(x, narrow, factor)[0].item() == pytest.approx(1e-8, rel=2**-11)
        product = fo.addcmul(x, narrow, torch.ones(2), factor)[0].item()
        assert product == pytest.approx(1e-8, rel=2**-11)
    begin, end = torch.ones(2).bfloat16(), torch.full((2,), 4.0).bfloat16()
    moved = [fo.lerp(begin, end, w) for w in (0.3, torch.tensor(0.3))]
    assert torch.equal(*moved)

"""compile=True with rules of users: what code cannot do runs without, and is right.

Each is the smallest case of what a trace, or the compiler, once got wrong in silence.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import warnings
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import Parameter

import functional_optim as fo
from functional_optim.execution._executor import Executor
from functional_optim.execution._units import ExecutionOptions
from functional_optim.execution.compiled import _kernels as _codes


class _One(NamedTuple):
    n: Any


class _Two(NamedTuple):
    a: Any
    b: Any


def _rule(update: Any, init: Any = lambda params: ()) -> Any:
    class Rule:
        scope = fo.Scope.ELEMENTWISE
        rate = 0.1

        def init(self, params: Any) -> Any:
            return init(params)

        def update(self, u: Any, s: Any, p: Any, *, context: Any = None) -> Any:
            return update(self, u, s, p, context)

    return Rule()


@dataclasses.dataclass(frozen=True)
class _Plain:
    lr: float = 0.1
    scope = fo.Scope.ELEMENTWISE
    hyperparameters = ("lr",)

    def init(self, params: Any) -> tuple[()]:
        return ()

    def update(self, u: Any, s: Any, p: Any, *, context: Any = None) -> Any:
        return {k: -v * self.lr for k, v in u.items()}, ()


@dataclasses.dataclass(frozen=True)
class _Root(_Plain):
    def update(self, u: Any, s: Any, p: Any, *, context: Any = None) -> Any:
        return {k: -v * math.sqrt(self.lr) for k, v in u.items()}, ()


@dataclasses.dataclass(frozen=True)
class _Half:
    lr: float = 0.1
    scope = fo.Scope.ELEMENTWISE
    hyperparameters = ("lr",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr", self.lr / 2)

    def init(self, params: Any) -> tuple[()]:
        return ()

    def update(self, u: Any, s: Any, p: Any, *, context: Any = None) -> Any:
        return {k: -self.lr * v for k, v in u.items()}, ()


def _number(params: Any) -> _One:
    return _One(torch.zeros((), dtype=torch.float64))


def _in_place(self: Any, u: Any, s: Any, p: Any, c: Any) -> Any:
    n = s.n + 1
    out = {k: -v / n for k, v in u.items()}
    n += 1
    return out, _One(n)


def _partial(self: Any, u: Any, s: Any, p: Any, c: Any) -> Any:
    t = torch.zeros(len(u), dtype=torch.float64)
    for index, v in enumerate(u.values()):
        t[index] = (v * v).sum()
    return {k: -v / c.reduce(t, "sum").sqrt() for k, v in u.items()}, s


def _heavy_ball(self: Any, u: Any, s: Any, p: Any, c: Any) -> Any:
    moved = {k: -0.1 * v + 0.5 * (p[k] - s.n[k]) for k, v in u.items()}
    return moved, _One(s.n | {k: p[k] for k in u})


def _swap(self: Any, u: Any, s: Any, p: Any, c: Any) -> Any:
    return {k: -0.1 * v * s.b[k] for k, v in u.items()}, _Two(s.b, s.a)


RULES: dict[str, Any] = {
    "a schedule by int": lambda: fo.sgd(lambda step: 0.1 * 0.5 ** int(step)),
    "a schedule by item": lambda: fo.sgd(lambda s: 0.1 if s.item() < 2 else 0.3),
    "a root of a rate": _Root,
    "a number halved when built": _Half,
    "in place on a new number": lambda: _rule(_in_place, _number),
    "in place on a partial": lambda: _rule(_partial),
    "the last parameters": lambda: _rule(
        _heavy_ball, lambda ps: _One({k: x.clone() for k, x in ps.items()})
    ),
    "states that change places": lambda: _rule(
        _swap,
        lambda ps: _Two(
            {k: 0 * x for k, x in ps.items()}, {k: 0 * x + 1 for k, x in ps.items()}
        ),
    ),
    "a vector for all": lambda: _rule(
        lambda self, u, s, p, c: (
            {k: -v * s.n.mean() for k, v in u.items()},
            _One(s.n + 1),
        ),
        lambda ps: _One(torch.ones(3, dtype=torch.float64)),
    ),
    "a number by value": lambda: fo.sgd(lambda step: torch.full((), 0.1) * step),
    "windows": lambda: fo.chain(fo.Accumulate(2), fo.sgd(0.1)),
    "a loss": lambda: _rule(
        lambda self, u, s, p, c: (
            {k: -0.01 * v * (1.0 if c.loss is None else c.loss) for k, v in u.items()},
            s,
        )
    ),
    "an attribute": lambda: _rule(
        lambda self, u, s, p, c: ({k: -v * self.rate for k, v in u.items()}, s)
    ),
}


@pytest.mark.filterwarnings("ignore:compile=True", "ignore:.*scalar may lead")
@pytest.mark.parametrize("size", [5, 50_000])
@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_the_numbers_are_those_without(make: Any, size: int) -> None:
    found = []
    for is_compiled in (False, True):
        params = [
            Parameter(torch.arange(1.0, size + 1, dtype=torch.float64)),
            Parameter(torch.ones(3, dtype=torch.float64)),
        ]
        rule = make()
        optimizer = fo.TransformOptimizer(params, rule, compile=is_compiled)
        for step in range(4):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + step)
            options: dict[str, Any] = {}
            if "lr" in optimizer.param_groups[0] and make in {_Root, _Half}:
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            if hasattr(rule, "rate"):
                rule.rate = 0.1 * (step + 1)
            if make is RULES["windows"]:
                options["weight"] = [1, 2, 1, 0.1][step]
            if make is RULES["a loss"] and step:
                kind = [torch.float32, torch.float64, torch.float32][step - 1]
                options["closure"] = lambda kind=kind: torch.tensor(2.0, dtype=kind)
            optimizer.step(**options)
        found.append([p.detach() for p in params])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12 * float(a.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_dtype_is_part_of_the_code(dtype: torch.dtype) -> None:
    """A number made of nothing has it: torch.full((), 0.1)."""
    rule = _rule(
        lambda self, u, s, p, c: (
            {k: -v * torch.full((), 0.1) * 3 for k, v in u.items()},
            s,
        )
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        p = Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = fo.TransformOptimizer([p], rule, compile=True)
        p.grad = torch.ones_like(p)
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    number = float(torch.full((), 0.1, dtype=dtype))
    torch.testing.assert_close(p.detach(), torch.full_like(p, 1.0 - 3 * number))


def test_the_warning_names_rule_and_reason_once() -> None:
    p = Parameter(torch.ones(3))
    optimizer = fo.TransformOptimizer([p], _Root(), compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 * (step + 1)
            p.grad = torch.ones(3)
            optimizer.step()
    (told,) = [str(w.message) for w in caught if "compile=True" in str(w.message)]
    assert "_Root" in told
    assert "it reads the value of a tensor on the host" in told


@pytest.mark.parametrize("name", ["the last parameters", "states that change places"])
def test_a_state_that_takes_the_place_of_another_is_named(name: str) -> None:
    """The compiler would write the one before it reads the other."""
    p = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = fo.TransformOptimizer([p], RULES[name](), compile=True)
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="it keeps what another tensor was"):
        optimizer.step()


def test_random_numbers_are_drawn_in_every_step() -> None:
    rule = _rule(
        lambda self, u, s, p, c: ({k: torch.randn_like(v) for k, v in u.items()}, s)
    )
    p = Parameter(torch.zeros(3))
    optimizer = fo.TransformOptimizer([p], rule, compile=True)
    seen = []
    p.grad = torch.ones(3)
    with pytest.warns(UserWarning, match="it draws random numbers"):
        optimizer.step()
    for _ in range(3):
        seen.append(p.detach().clone())
        optimizer.step()
    assert not torch.equal(seen[1] - seen[0], seen[2] - seen[1])


def test_rules_that_change_at_every_step_run_without_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A look through all kinds there were must not grow with the steps."""
    monkeypatch.setattr(_codes, "_MOST", 3)
    rule = RULES["an attribute"]()
    p = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = fo.TransformOptimizer([p], rule, compile=True)
    expected = p.detach().clone()
    for step in range(6):
        rule.rate = 0.1 * (step + 1)
        p.grad = torch.ones_like(p)
        optimizer.step()
        expected -= 0.1 * (step + 1)
    torch.testing.assert_close(p.detach(), expected)
    assert "not compiled (it is the transform of kind 4)" in fo.explain(optimizer)


def test_code_that_computes_something_else_is_not_run() -> None:
    """Compilers have bugs, too: what is made is tried once, on numbers of its own."""

    def runs_twice(graph: Any) -> Any:
        def run(tensors: list[torch.Tensor]) -> Any:
            graph.module(*tensors)
            return graph.module(*tensors)

        return run

    p = torch.ones(3, dtype=torch.float64)
    executor = Executor(
        {"p": p},
        [fo.chain(fo.sgd(0.1))],
        {"p": 0},
        fo.chain(fo.sgd(0.1)).init({"p": p}),
        options=ExecutionOptions(kernels=_codes.KernelCache(runs_twice)),
    )
    with pytest.warns(UserWarning, match="computes something else"):
        executor.step({"p": torch.ones_like(p)}, context=fo.Context())
    assert torch.equal(p, torch.full_like(p, 0.9))


def test_a_gradient_of_another_size_is_not_read_beyond_its_end() -> None:
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(3))]
    optimizer = fo.TransformOptimizer(params, fo.sgd(0.1), compile=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert params[0].grad is not None
    params[0].grad.data = torch.ones(2)
    with pytest.raises(RuntimeError, match="size of tensor"):
        optimizer.step()
    assert torch.equal(params[0], torch.full((4,), 0.9))


# -- what a step must let go of --------------------------------------------------------


def test_nothing_of_a_step_is_kept() -> None:
    """No loss with its graph, and no gradients, in whatever form they came."""
    params = [Parameter(torch.ones(64)) for _ in range(4)]
    optimizer = fo.TransformOptimizer(params, fo.adamw(1e-2), compile=True)
    kept: list[weakref.ref[Any]] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(p.sum() for p in params)
        loss.backward(retain_graph=True)
        if not kept:
            params[0].grad = params[0].grad.to_sparse().to_dense()
        kept.extend(weakref.ref(x) for x in (loss, *(p.grad for p in params)))
        return loss

    for _ in range(3):
        optimizer.step(closure)
    optimizer.zero_grad()
    assert [ref() for ref in kept] == [None] * len(kept)


def test_a_plan_that_is_over_is_freed_at_once() -> None:
    """No cycle keeps its buffers until somebody collects garbage."""
    params = [Parameter(torch.ones(64)) for _ in range(4)]
    optimizer = fo.TransformOptimizer(params, fo.adamw(1e-2), compile=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    unit = weakref.ref(optimizer._engine.executor.buckets[0].units[0])
    gc.disable()
    try:
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert unit() is None
    finally:
        gc.enable()


class _Undecorated(_Plain):
    pass


def test_a_subclass_that_is_no_dataclass_itself() -> None:
    for rule in (_Plain(0.2), _Undecorated(0.2)):
        p = Parameter(torch.ones(3))
        optimizer = fo.TransformOptimizer([p], rule, compile=True)
        for _ in range(2):
            p.grad = torch.ones(3)
            optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), 0.6))


def test_a_gradient_that_is_taken_away_during_the_step_is_named() -> None:
    """No memory is read that others have by then."""
    params = [Parameter(torch.ones(3)) for _ in range(3)]

    def update(_: Any, u: Any, s: Any, p: Any, context: Any) -> Any:
        params[1].grad = None
        return {k: -v for k, v in u.items()}, s

    tx = fo.chain(_rule(update), fo.Scale(1.0))
    optimizer = fo.TransformOptimizer(params, tx, compile=True)
    for p in params:
        p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="'1' was set to None during the step"):
        optimizer.step()

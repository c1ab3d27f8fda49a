"""Each law rejects a transform that breaks it: a test that cannot fail is a defect."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import laws
import pytest
import torch
from law_examples import example
from torch.autograd.gradcheck import GradcheckError

import functional_optim as fo


class Broken:
    """A doubling with one thing wrong, given as its `init` and `update`."""

    def __init__(
        self,
        update: Callable[..., Any],
        init: Callable[..., Any] = lambda params: (),
        scope: fo.Scope = fo.Scope.ELEMENTWISE,
    ) -> None:
        self._init, self._update, self.scope = init, update, scope

    def init(self, params: fo.TensorMap) -> Any:
        """Return the state."""
        return self._init(params)

    def update(self, updates, state, params, *, context=fo.Context()) -> Any:
        """Return what the broken function returns."""
        return self._update(updates, state, params, context)


class Buffer(NamedTuple):
    """A state with one map."""

    buffer: fo.TensorMap


def _each(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda u, s, p, c: ({name: function(x) for name, x in u.items()}, s)


def _writes_updates(u, s, p, c):
    return {name: x.mul_(2.0) for name, x in u.items()}, s


def _writes_params(u, s, p, c):
    for x in p.values():
        x.add_(0.0)  # The numbers stay; the write is found by the version counter.
    return {name: 2 * x for name, x in u.items()}, s


def _writes_state(u, s, p, c):
    return {n: s.buffer[n].add_(x).clone() for n, x in u.items()}, s


def _keeps_updates(u, s, p, c):
    return {n: 2 * x for n, x in u.items()}, Buffer(s.buffer | u)


def _returns_state(u, s, p, c):
    new = {n: s.buffer[n] + x for n, x in u.items()}
    return new, Buffer(s.buffer | new)


class Counting:
    """Memory outside of the state."""

    scope: ClassVar[fo.Scope] = fo.Scope.ELEMENTWISE

    def __init__(self) -> None:
        self.calls = 0

    def init(self, params: fo.TensorMap) -> tuple[()]:
        """Return the empty state."""
        return ()

    def update(self, updates, state, params, *, context=fo.Context()) -> Any:
        """Multiply by the number of calls so far."""
        self.calls += 1
        return {name: self.calls * u for name, u in updates.items()}, state


def _grows(u, s, p, c):
    more = {f"{name}{len(s.buffer)}": x.clone() for name, x in u.items()}
    return {name: 2 * x for name, x in u.items()}, Buffer(s.buffer | more)


def _decays_all(u, s, p, c):
    new = {name: 0.9 * b + u.get(name, 0.0) for name, b in s.buffer.items()}
    return {name: new[name].clone() for name in u}, Buffer(new)


def _fills_in(u, s, p, c):
    return {name: u.get(name, torch.zeros_like(x)) * 2 for name, x in p.items()}, s


def _joint_norm(u, s, p, c):
    norm = sum(x.square().sum() for x in u.values()).sqrt()
    return {name: x / norm for name, x in u.items()}, s


def _branches(u, s, p, c):
    return {n: 2 * x if x.sum() > 0 else x.clone() for n, x in u.items()}, s


def _counts_on_the_host(u, s, p, c):
    return {n: s.value * x for n, x in u.items()}, fo.Static(s.value + 1)


def _ticks_on_nothing(u, s, p, c):
    return {n: 2 * x for n, x in u.items()}, fo.Static(s.value + 1)


def _remembers_a_random_number(u, s, p, c):
    return {n: 2 * x for n, x in u.items()}, fo.Static(random.random())


class Count(NamedTuple):
    """A state with one number."""

    number: torch.Tensor


def _counts_on_one_part(u, s, p, c):
    return {n: 2 * x for n, x in u.items()}, Count(s.number + ("scale" in u))


class Shared(NamedTuple):
    """A state that plain data cannot carry."""

    buffer: torch.Tensor
    kind: str


def _zeros(params: fo.TensorMap) -> Buffer:
    return Buffer({name: torch.zeros_like(p) for name, p in params.items()})


def _position(x: torch.Tensor) -> torch.Tensor:
    return x * torch.arange(1, x.numel() + 1).reshape(x.shape)


BROKEN = [
    ("writes to updates", laws.purity, Broken(_writes_updates)),
    ("writes to params", laws.purity, Broken(_writes_params)),
    ("writes to the state", laws.purity, Broken(_writes_state, _zeros)),
    ("returns its input", laws.purity, Broken(_each(lambda x: x))),
    ("returns a view", laws.purity, Broken(_each(lambda x: x.view(x.shape)))),
    ("keeps its input", laws.purity, Broken(_keeps_updates, _zeros)),
    ("returns its state", laws.purity, Broken(_returns_state, _zeros)),
    ("state is params", laws.purity, Broken(_each(torch.neg), lambda p: Buffer(p))),
    ("hidden memory", laws.determinism, Counting()),
    ("unseeded", laws.determinism, Broken(_each(lambda x: x * torch.rand(())))),
    ("changes shape", laws.structure, Broken(_each(lambda x: x.reshape(-1, 1)))),
    ("grows", laws.structure, Broken(_grows, _zeros)),
    ("fills in", laws.omitted_names, Broken(_fills_in)),
    ("decays what is omitted", laws.omitted_names, Broken(_decays_all, _zeros)),
    ("acts on nothing", laws.hold, Broken(_fills_in)),
    (
        "ticks on nothing",
        laws.hold,
        Broken(_ticks_on_nothing, lambda p: fo.Static(0)),
    ),
    (
        "hidden randomness",
        laws.determinism,
        Broken(_remembers_a_random_number, lambda p: fo.Static(0.0)),
    ),
    (
        "counts on one part",
        laws.scope,
        Broken(_counts_on_one_part, lambda p: Count(torch.zeros(()))),
    ),
    ("subtracts the mean", laws.scope, Broken(_each(lambda x: x - x.mean()))),
    ("knows positions", laws.scope, Broken(_each(_position))),
    ("joint norm", laws.scope, Broken(_joint_norm)),
    (
        "joint norm, per tensor",
        laws.scope,
        Broken(_joint_norm, scope=fo.Scope.PER_TENSOR),
    ),
]


@pytest.mark.parametrize(
    ("law", "transform"), [(b[1], b[2]) for b in BROKEN], ids=[b[0] for b in BROKEN]
)
def test_law_rejects(law, transform: Broken) -> None:
    """The law fails for the transform that breaks it."""
    with pytest.raises(AssertionError):
        law(transform, example())


def test_vmap_law_rejects_branches_on_values() -> None:
    """A host read in the update cannot be batched."""
    with pytest.raises(RuntimeError, match="data-dependent"):
        laws.vmapped(Broken(_branches), [example(seed) for seed in range(2)])


def test_compile_law_rejects_python_counters() -> None:
    """A Python number that changes makes a new graph every few steps."""
    counter = Broken(_counts_on_the_host, lambda params: fo.Static(1))
    limit = torch._dynamo.exc.FailOnRecompileLimitHit
    with pytest.raises((AssertionError, limit), match="graphs|recompile"):
        laws.compiled(counter, example(full=True), graphs=1)


def test_differentiable_law_rejects_detached_results() -> None:
    """A derivative that is silently zero is found."""
    with pytest.raises(GradcheckError):
        laws.differentiable(Broken(_each(lambda x: x.detach() * x)), example(full=True))


def test_plain_data_law_rejects_what_cannot_be_saved() -> None:
    """A string in a state is neither tensor nor Static."""
    made = Broken(_each(torch.neg), lambda p: Shared(torch.zeros(()), "sum"))
    with pytest.raises(TypeError, match=r"state.kind must be a tensor.*Static"):
        laws.plain_data(made, example())


def test_no_graph_law_needs_chain() -> None:
    """Without the chain's grad mode a graph would be kept."""
    data = example(full=True)
    grads = {n: g.clone().requires_grad_() for n, g in data.steps[0][0].items()}
    out, _ = fo.Scale(2.0).update(grads, (), data.params)
    assert all(u.requires_grad for u in out.values())
    out, _ = fo.chain(fo.Scale(2.0)).update(grads, ((),), data.params)
    assert not any(u.requires_grad for u in out.values())


def test_chaining_law_rejects_unequal_results() -> None:
    """A transform that counts its calls does not chain."""
    with pytest.raises(AssertionError):
        laws.chaining(Counting(), example())

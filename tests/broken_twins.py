"""Transforms with one thing wrong, each with the law that it breaks."""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch

import functional_optim as fo
from functional_optim.core._apply import added


class Buffer(NamedTuple):
    """A state with one map."""

    buffer: fo.TensorMap


class Count(NamedTuple):
    """A state with one number."""

    number: Any


def zeros(params: fo.TensorMap) -> Buffer:
    """Return a buffer like the parameters."""
    return Buffer({name: torch.zeros_like(p) for name, p in params.items()})


def nothing(params: fo.TensorMap) -> tuple[()]:
    """Return the empty state."""
    return ()


@dataclasses.dataclass
class Twin:
    """A transform given as its `update` and `init`."""

    called: str
    function: Callable[..., Any]
    start: Callable[[fo.TensorMap], Any] = nothing
    scope: fo.Scope = fo.Scope.ELEMENTWISE

    def __repr__(self) -> str:
        return f"twin({self.called!r})"

    def init(self, params: fo.TensorMap) -> Any:
        """Return the state."""
        return self.start(params)

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return what the broken function returns."""
        return self.function(updates, state, params, context)


def each(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """Return an update of every tensor by itself, without a state."""
    return lambda u, s, p, c: ({name: function(x) for name, x in u.items()}, s)


def doubled(u: fo.TensorMap) -> fo.TensorMap:
    """Return what a correct twin would."""
    return {name: 2 * x for name, x in u.items()}


# -- purity ------------------------------------------------------------------------


def writes_params(u, s, p, c):
    for x in p.values():
        x.add_(0.0)  # The numbers stay; the write is found by the version counter.
    return doubled(u), s


def writes_state(u, s, p, c):
    return {n: s.buffer[n].add_(x).clone() for n, x in u.items()}, s


def writes_behind_the_counter(u, s, p, c):
    for x in u.values():
        x.data.add_(1.0)
    return doubled(u), s


def removes_a_name(u, s, p, c):
    out = doubled(u)
    u.clear()
    return out, s


def keeps_updates(u, s, p, c):
    return doubled(u), Buffer(s.buffer | u)


def returns_state(u, s, p, c):
    new = {n: s.buffer[n] + x for n, x in u.items()}
    return new, Buffer(s.buffer | new)


def asks_for_gradients(u, s, p, c):
    for x in u.values():
        if not torch._C._functorch.is_batchedtensor(x):
            x.requires_grad_()
    return {n: (2 * x).detach() for n, x in u.items()}, s


def turns_recording_off(u, s, p, c):
    torch.set_grad_enabled(False)
    return doubled(u), s


# -- determinism -------------------------------------------------------------------


class CountsCalls:
    """Memory outside of the state."""

    scope: ClassVar[fo.Scope] = fo.Scope.ELEMENTWISE

    def __init__(self) -> None:
        self.calls = 0

    def init(self, params: fo.TensorMap) -> tuple[()]:
        """Return the empty state."""
        return ()

    def update(self, updates, state, params, *, context=None) -> Any:
        """Multiply by the number of calls so far."""
        self.calls += 1
        return {name: self.calls * u for name, u in updates.items()}, state


class UsesStatesUp:
    """Takes it that each state is used once, and knows the last one again."""

    scope: ClassVar[fo.Scope] = fo.Scope.ELEMENTWISE

    def __init__(self) -> None:
        self.last: Any = None

    def init(self, params: fo.TensorMap) -> Count:
        """Return a state that is not shared."""
        return Count(torch.zeros(()))

    def update(self, updates, state, params, *, context=None) -> Any:
        """Multiply by 2, or by 3 if the state was used before."""
        factor = 2
        if not torch.compiler.is_compiling():
            factor = 3 if updates and state is self.last else 2
            self.last = state
        return {name: factor * u for name, u in updates.items()}, Count(
            state.number.clone()
        )


def seeds(u, s, p, c):
    if not torch._C._are_functorch_transforms_active():
        torch.manual_seed(0)
    return doubled(u), s


def remembers_a_random_number(u, s, p, c):
    return doubled(u), fo.Static(random.random())


# -- structure ---------------------------------------------------------------------


def grows(u, s, p, c):
    return doubled(u), (*s, torch.zeros(()))


def gets_new_names(u, s, p, c):
    more = {f"{name}{len(s.buffer)}": x.clone() for name, x in u.items()}
    return doubled(u), Buffer(s.buffer | more)


def drops_small_ones(u, s, p, c):
    return {n: 2 * x for n, x in u.items() if x.ndim}, s


def holds_for_ever(u, s, p, c):
    return {}, fo.Static((s.value + 1) % 3 if u else s.value)


def counts_in_python(u, s, p, c):
    return doubled(u), Count(s.number + bool(u))


def reorders(u, s, p, c):
    return dict(reversed(doubled(u).items())), s


def on_the_cpu(params: fo.TensorMap) -> Buffer:
    return Buffer(
        {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in params.items()}
    )


def adds_the_buffer(u, s, p, c):
    return {name: x + s.buffer[name] for name, x in u.items()}, s


# -- names and holds ---------------------------------------------------------------


def decays_all(u, s, p, c):
    if not u:
        return {}, s
    new = {name: 0.9 * b + u.get(name, 0.0) for name, b in s.buffer.items()}
    return {name: new[name].clone() for name in u}, Buffer(new)


def needs_all(u, s, p, c):
    return {name: 2 * u[name] for name in p} if u else {}, s


def ticks_on_nothing(u, s, p, c):
    return doubled(u), Count(s.number + 1)


def stacks(u, s, p, c):
    torch.stack([x.sum() for x in u.values()])
    return doubled(u), s


# -- scope -------------------------------------------------------------------------


def joint_norm(u, s, p, c):
    norm = sum(x.square().sum() for x in u.values()).sqrt() + 1.0 if u else 1.0
    return {name: x / norm for name, x in u.items()}, s


def counts_on_one_part(u, s, p, c):
    return doubled(u), Count(s.number + ("a.weight" in u))


def knows_positions(x: torch.Tensor) -> torch.Tensor:
    return x * torch.arange(1, x.numel() + 1, device=x.device).reshape(x.shape)


def sums_without_reduce(u, s, p, c):
    total = sum((x.sum().double() for x in u.values()), torch.zeros(()).double())
    return doubled(u), Count(s.number + total)


def reduces_sometimes(u, s, p, c):
    factor = 1.0
    if any(x.ndim > 1 for x in u.values()):
        partial = torch.stack([x.sum().double() for x in u.values()])
        factor = c.reduce(partial, "sum")
    return {name: (factor * x).to(x.dtype) for name, x in u.items()}, s


def counted(params: fo.TensorMap) -> Count:
    return Count(torch.zeros((), dtype=torch.float64))


# -- in place ----------------------------------------------------------------------


def knows_names(u, s, p, c):
    return {n: x * (0.5 if n.endswith("bias") else 2.0) for n, x in u.items()}, s


def knows_shapes(u, s, p, c):
    return {n: x * (2.0 if p[n].ndim > 1 else 0.5) for n, x in u.items()}, s


class ReadsWhatItGaveUp:
    """Says that it reads each entry of its state once, and reads it twice."""

    scope: ClassVar[fo.Scope] = fo.Scope.ELEMENTWISE
    consumes_state: ClassVar[bool] = True

    def init(self, params: fo.TensorMap) -> Buffer:
        """Return a buffer like the parameters."""
        return zeros(params)

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return how the buffer moved."""
        before = {name: state.buffer[name] for name in updates}
        ours = type(state.buffer)({name: state.buffer[name] for name in updates})
        now = added(ours, updates)
        moved = {name: now[name] - before[name] for name in updates}
        return moved, Buffer(state.buffer | now)


# -- torch -------------------------------------------------------------------------


def branches(x: torch.Tensor) -> torch.Tensor:
    return 2 * x if x.device.type == "meta" or x.sum() > 0 else x.clone()


def by_foreach(u, s, p, c):
    return dict(
        zip(u, torch._foreach_mul(list(u.values()), 2.0), strict=True)
    ) if u else {}, s


def decays_by_a_python_count(u, s, p, c):
    factor = 0.9**s.value
    return {n: factor * x for n, x in u.items()}, fo.Static(s.value + bool(u))


def records_anyway(u, s, p, c):
    with torch.enable_grad():
        return doubled(u), s


def records_in_a_batch(u, s, p, c):
    if torch._C._are_functorch_transforms_active():
        return records_anyway(u, s, p, c)
    return doubled(u), s


def only_while_recording(u, s, p, c):
    factor = 2.0 if torch.is_grad_enabled() else 1.0
    return {name: factor * x for name, x in u.items()}, s


class Phase(enum.Enum):
    """What no file loads with weights_only=True."""

    START = 1


def keeps_an_enum(params: fo.TensorMap) -> fo.Static:
    return fo.Static(Phase.START)


PER_TENSOR = fo.Scope.PER_TENSOR

TWINS: list[tuple[str, Any]] = [
    ("purity", Twin("writes updates", each(lambda x: x.mul_(2.0).clone()))),
    ("purity", Twin("writes params", writes_params)),
    ("purity", Twin("writes the state", writes_state, zeros)),
    ("purity", Twin("writes through .data", writes_behind_the_counter)),
    ("purity", Twin("removes a name", removes_a_name)),
    ("purity", Twin("asks for gradients", asks_for_gradients)),
    ("purity", Twin("returns its input", each(lambda x: x))),
    ("purity", Twin("returns a view", each(lambda x: x.view(x.shape)))),
    ("purity", Twin("keeps its input", keeps_updates, zeros)),
    ("purity", Twin("returns its state", returns_state, zeros)),
    ("purity", Twin("its state is params", each(torch.neg), lambda p: Buffer(p))),
    ("purity", Twin("leaves grad mode off", turns_recording_off)),
    ("determinism", Twin("seeds torch", seeds)),
    ("determinism", CountsCalls()),
    ("determinism", UsesStatesUp()),
    ("determinism", Twin("unseeded", each(lambda x: x * torch.rand(())))),
    (
        "determinism",
        Twin(
            "remembers a random number",
            remembers_a_random_number,
            lambda p: fo.Static(0.0),
        ),
    ),
    (
        "determinism",
        Twin(
            "starts anywhere",
            adds_the_buffer,
            lambda p: Buffer({n: torch.rand_like(x) for n, x in p.items()}),
        ),
    ),
    ("structure", Twin("drops a name", drops_small_ones)),
    ("structure", Twin("holds for ever", holds_for_ever, lambda p: fo.Static(0))),
    ("structure", Twin("changes dtype", each(lambda x: (2 * x).float()))),
    ("structure", Twin("widens", each(lambda x: 2 * x.double()))),
    ("structure", Twin("changes shape", each(lambda x: (2 * x).reshape(-1, 1)))),
    ("structure", Twin("changes device", each(lambda x: (2 * x).to("meta")))),
    ("structure", Twin("stays on the CPU", adds_the_buffer, on_the_cpu)),
    ("structure", Twin("grows", grows)),
    ("structure", Twin("gets new names", gets_new_names, zeros)),
    ("structure", Twin("counts in Python", counts_in_python, lambda p: Count(0))),
    ("structure", Twin("reorders", reorders)),
    ("structure", Twin("returns no pair", lambda u, s, p, c: doubled(u))),
    ("hold", Twin("ticks on nothing", ticks_on_nothing, counted)),
    ("hold", Twin("needs a tensor", stacks, scope=PER_TENSOR)),
    ("omitted_names", Twin("takes nothing for zero", decays_all, zeros)),
    ("omitted_names", Twin("needs all names", needs_all)),
    ("scope", Twin("subtracts the mean", each(lambda x: x - x.mean()))),
    (
        "scope",
        Twin(
            "subtracts the mean of rows",
            each(lambda x: x - x.mean(-1, keepdim=True) if x.ndim > 1 else x.clone()),
        ),
    ),
    ("scope", Twin("reduces now and then", reduces_sometimes, scope=PER_TENSOR)),
    ("scope", Twin("knows positions", each(knows_positions))),
    ("scope", Twin("joint norm", joint_norm)),
    ("scope", Twin("joint norm, per tensor", joint_norm, scope=PER_TENSOR)),
    ("scope", Twin("counts on one part", counts_on_one_part, counted)),
    ("scope", Twin("sums without reduce", sums_without_reduce, counted)),
    ("in_place", Twin("knows names", knows_names)),
    ("in_place", Twin("knows shapes", knows_shapes)),
    ("in_place", ReadsWhatItGaveUp()),
    ("vmapped", Twin("branches on a value", each(branches), scope=PER_TENSOR)),
    (
        "vmapped",
        Twin(
            "reads on the host",
            each(lambda x: x * (1.0 if x.is_meta else float(x.sum() < 0) + 1)),
            scope=PER_TENSOR,
        ),
    ),
    ("vmapped", Twin("no batching rule", by_foreach)),
    ("plain_data", Twin("an enum", each(torch.neg), keeps_an_enum)),
    ("chaining", Twin("grad mode", only_while_recording)),
    ("no_graph", Twin("records anyway", records_anyway)),
    ("no_graph", Twin("records in a batch", records_in_a_batch)),
    (
        "compiled",
        Twin("a Python count", decays_by_a_python_count, lambda p: fo.Static(0)),
    ),
    ("differentiable", Twin("detaches", each(lambda x: x.detach() * x))),
]

ONLY = {
    "purity": "returns its state",
    "determinism": "UsesStatesUp",
    "structure": "widens",
    "hold": "ticks on nothing",
    "omitted_names": "takes nothing for zero",
    "scope": "subtracts the mean",
    "in_place": "ReadsWhatItGaveUp",
    "vmapped": "no batching rule",
    "plain_data": "an enum",
    "chaining": "grad mode",
    "no_graph": "records anyway",
    "compiled": "a Python count",
    "differentiable": "detaches",
}
"""For each law a twin that no other law finds anything wrong with."""

"""Check that torch can batch, compile and differentiate an update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils import _pytree

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._apply import apply_updates
from functional_optim.core._chain import chain
from functional_optim.core._context import Context
from functional_optim.core._transform import Transform
from functional_optim.testing._compare import tensors
from functional_optim.testing._examples import Example, map_tensors, numbers_like
from functional_optim.testing._law import (
    ROUNDING,
    ViolationError,
    law,
    require,
    require_equal,
    run,
)
from functional_optim.testing.laws._structure import has_static

_HOST = (
    "a value is read on the host: `if tensor`, float(t), t.item(), t.tolist(), "
    "t.nonzero(), x[mask]. Select with torch.where and keep numbers in tensors. Or a "
    "function without a batching rule, such as torch._foreach_*"
)
_BATCHED = (
    "the result depends on the other members of a batch: a shape was read that vmap "
    "hides, or a tensor was made outside and written to"
)
_UNTRACEABLE = (
    "a value is read on the host (`if tensor`, float(t), t.item()), or Python that "
    "torch.compile cannot trace; see the error above"
)
_RECOMPILED = (
    "a Python number changes from step to step, in Static, an attribute or a closure: "
    "each value is a constant of another graph. Count in a tensor of the state; Static "
    "is for a position that returns, as in an accumulation window"
)
_RECORDS = (
    "the transform turns recording on by itself (torch.enable_grad, requires_grad_). "
    "Leave grad mode as it is: chain decides it from Context(differentiable=...)"
)
_NO_DERIVATIVE = (
    "a part of the formula is hidden from autograd (detach, .data, no_grad, float(t)), "
    "or has no derivative: a rounding, a maximum, a sign. In that case leave "
    "smooth=False"
)


@law(omit=False, rounds=True, hint=_HOST)
def vmapped(transform: Transform, example: Example) -> None:
    """Init and update under vmap equal the loop over members."""
    members = [  # Of other numbers and signs.
        map_tensors(functools.partial(torch.mul, other=factor), example)
        for factor in (1.0, -0.5, 3.0)
    ]
    params = _stacked([member.params for member in members])
    state = torch.func.vmap(transform.init)(params)
    singles = [transform.init(member.params) for member in members]
    require_equal("vmap(init): member", _variants_of(state), singles, _BATCHED)
    for step, (_, context) in enumerate(example.steps):
        update = functools.partial(transform.update, context=context)
        given = [member.updates[step] for member in members]
        out, state = torch.func.vmap(update)(_stacked(given), state, params)
        results = [
            update(u, s, member.params)
            for u, s, member in zip(given, singles, members, strict=True)
        ]
        outs, singles = [u for u, _ in results], [s for _, s in results]
        what = f"step {step}, vmap(update)"
        at = f"{what}: updates, member"
        require_equal(at, _variants_of(out), outs, _BATCHED, ROUNDING)
        at = f"{what}: state, member"
        require_equal(at, _variants_of(state), singles, _BATCHED, ROUNDING)


def _stacked(trees: Sequence[Any]) -> Any:
    return _pytree.tree_map(lambda *xs: torch.stack(xs), *trees)


def _variants_of(tree: Any) -> list[Any]:
    return [_pytree.tree_map(lambda x, i=i: x[i], tree) for i in range(3)]


@law(
    drawn=False,
    omit=False,
    rounds=True,
    hint=_UNTRACEABLE,
    before=torch.compiler.reset,
)
def compiled(transform: Transform, example: Example) -> None:
    """A compiled update equals the eager one, without graph breaks or recompiling."""
    # A window of any length needs three graphs: torch makes the position a symbol when
    # it sees the second one. And each context has its own Python numbers.
    allowed = 3 if _static_returns(transform, example) else 1
    allowed *= max(1, len(set(map(repr, example.contexts))))
    before = _num_graphs()
    update = torch.compile(transform.update, fullgraph=True, backend="aot_eager")
    state = other = transform.init(example.params)
    steps = example.steps * 3
    for step, (updates, context) in enumerate(steps):
        out, state = transform.update(updates, state, example.params, context=context)
        try:
            got, other = update(updates, other, example.params, context=context)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            what = f"step {step}: recompiled at every step"
            raise ViolationError(what, _RECOMPILED) from None
        what = f"step {step}, compiled"
        require_equal(f"{what}: updates", got, out, _UNTRACEABLE, ROUNDING)
        require_equal(f"{what}: state", other, state, _UNTRACEABLE, ROUNDING)
    made = _num_graphs() - before
    what = f"{len(steps)} steps made {made} graphs, not {allowed}"
    require(made <= allowed, what, _RECOMPILED)


def _num_graphs() -> int:
    """Return the number of graphs that torch.compile has made in this process."""
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def _static_returns(transform: Transform, example: Example) -> bool:
    """Whether the `Static` values return to the initial ones within 100 rounds."""
    start = transform.init(example.params)
    if not has_static(start):
        return False
    rounds = dataclasses.replace(example, updates=[*example.updates] * 100)
    moved = False
    for _, state in run(transform, rounds):
        equal = _pytree.tree_structure(state) == _pytree.tree_structure(start)
        if moved and equal:
            return True
        moved = moved or not equal
    return False


@law(omit=False, hint="chain could not run it on tensors that require gradients")
def no_graph(transform: Transform, example: Example) -> None:
    """A chain keeps no autograd graph, unless it is to be differentiable."""
    chained = chain(transform)
    for batched in (False, True):
        wrap: Callable[..., Any] = torch.func.vmap if batched else lambda call: call
        place = "under vmap, " if batched else ""
        params = _leaves(example.params, batched=batched)
        state = wrap(chained.init)(params)
        for updates, context in example.steps:
            update = functools.partial(chained.update, context=context)
            given = _leaves(updates, batched=batched)
            out, state = wrap(update)(given, state, params)
            for result, tree in (("updates", out), ("state", state)):
                for at, x in tensors(tree):
                    what = f"{place}{result}{at} keeps a graph"
                    require(not x.requires_grad, what, _RECORDS)
            for name, x in apply_updates(params, out).items():
                what = f"{place}the new parameter {name!r} keeps a graph"
                recorded = x is not params[name] and x.requires_grad
                require(not recorded, what, _RECORDS)


def _leaves(given: TensorMap, *, batched: bool) -> TensorMap:
    """Return tensors that require gradients, or a batch of one of each."""
    return {
        name: torch.nn.Parameter(x[None] if batched else x.clone())
        for name, x in given.items()
    }


_FACTORS = (1.0, -0.61, 1.73)
"""Of the updates of three steps: no common momentum makes a sum 0."""


@law(
    omit=False,
    rounds=True,
    away_from_zero=True,
    hint="autograd does not know a function that was used",
)
def differentiable(transform: Transform, example: Example) -> None:
    """Derivatives with respect to updates and parameters are those of differences."""
    given = {
        "updates": _in_general_position(example.updates[0], 2),
        "params": _in_general_position(example.params, 1),
    }
    _, context = example.steps[0]
    places = [(kind, name) for kind in given for name in given[kind]]
    gap = _derivative_gap(transform, given, places, context)
    if gap:
        wrong = (
            at for at in places if _derivative_gap(transform, given, [at], context)
        )
        kind, name = next(wrong, places[0])
        what = f"the derivative with respect to {kind}[{name!r}]: {gap}"
        raise ViolationError(what, _NO_DERIVATIVE)


def _derivative_gap(
    transform: Transform,
    given: dict[str, TensorMap],
    places: list[tuple[str, str]],
    context: Context,
) -> str | None:
    """Return how derivatives at some places differ from finite differences.

    All places are one vector and all results one number, so that it is one backward.
    """
    sizes = [given[kind][name].numel() for kind, name in places]
    if not sum(sizes):
        return None
    context = dataclasses.replace(context, differentiable=True)

    def total(flat: Tensor) -> Tensor:
        at = {kind: dict(tensors) for kind, tensors in given.items()}
        pieces = torch.split(flat, sizes)
        for (kind, name), piece in zip(places, pieces, strict=True):
            at[kind][name] = piece.reshape(at[kind][name].shape)
        state = transform.init(at["params"])
        sums = [flat.new_zeros(())]
        for factor in _FACTORS:
            updates = {name: factor * x for name, x in at["updates"].items()}
            out, state = transform.update(updates, state, at["params"], context=context)
            for name, u in out.items():
                weights = numbers_like({name: u.detach()}, len(sums))[name]
                sums.append((weights * u).sum())
        return torch.stack(sums).sum()

    flat = torch.cat([given[kind][name].reshape(-1) for kind, name in places])
    try:
        # Central differences of 1e-6 in float64 leave about 1e-9 / 1e-6 relative.
        torch.autograd.gradcheck(
            total,
            torch.nn.Parameter(flat),
            eps=1e-6,
            atol=1e-5,
            rtol=1e-4,
            fast_mode=True,
        )
    except GradcheckError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return " ".join(lines[:3])
    return None


def _in_general_position(given: TensorMap, key: int) -> TensorMap:
    """Move every number by at most 0.1: kinks are at round and at equal numbers."""
    wide = {name: x.double() for name, x in given.items()}
    moves = numbers_like(wide, key)
    # All the same way, so that sums move, too.
    return {name: x + 0.05 * moves[name].abs() for name, x in wide.items()}

"""What torch does with an update: batches it, compiles it, differentiates it."""

from __future__ import annotations

import dataclasses
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
from functional_optim.testing._compare import difference, tensors
from functional_optim.testing._examples import Example, numbers_like
from functional_optim.testing._law import law, refuse, require

_ROUNDING = 1e-12
"""Sums in another order, relative to the largest: n * eps of float64, n < 4000."""

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


@law(omit=False, rounds=True, hint=_HOST)
def vmapped(transform: Transform, example: Example) -> None:
    """Init and update under vmap equal the loop over members."""
    members = [example, *(_variant(example, factor) for factor in (-0.5, 3.0))]
    params = _stacked([member.params for member in members])
    state = torch.func.vmap(transform.init)(params)
    singles = [transform.init(member.params) for member in members]
    gap = difference(_members(state), singles)
    require(not gap, f"vmap(init): member{gap}", _BATCHED)
    for step, (_, context) in enumerate(example.steps):

        def update(u: Any, s: Any, p: Any, c: Context = context) -> Any:
            return transform.update(u, s, p, context=c)

        given = [member.updates[step] for member in members]
        out, state = torch.func.vmap(update)(_stacked(given), state, params)
        results = [
            transform.update(u, s, member.params, context=context)
            for u, s, member in zip(given, singles, members, strict=True)
        ]
        singles = [new for _, new in results]
        gap = difference(_members(out), [u for u, _ in results], _ROUNDING)
        require(not gap, f"step {step}, vmap(update): updates, member{gap}", _BATCHED)
        gap = difference(_members(state), singles, _ROUNDING)
        require(not gap, f"step {step}, vmap(update): state, member{gap}", _BATCHED)


def _variant(example: Example, factor: float) -> Example:
    """Return another member of a batch: other numbers, other signs."""

    def scaled(given: TensorMap) -> TensorMap:
        return {name: factor * x for name, x in given.items()}

    return dataclasses.replace(
        example,
        params=scaled(example.params),
        updates=[scaled(updates) for updates in example.updates],
    )


def _stacked(trees: Sequence[Any]) -> Any:
    return _pytree.tree_map(lambda *xs: torch.stack(xs), *trees)


def _members(tree: Any, count: int = 3) -> list[Any]:
    return [_pytree.tree_map(lambda x, i=i: x[i], tree) for i in range(count)]


@law(
    drawn=False,
    omit=False,
    rounds=True,
    hint=_UNTRACEABLE,
    before=torch.compiler.reset,
)
def compiled(transform: Transform, example: Example) -> None:
    """A compiled update equals the eager one, without graph breaks or recompiling."""
    allowed = 3 if _static_returns(transform, example) else 1
    # Each context has its own Python numbers.
    allowed *= max(1, len(set(map(repr, example.contexts))))
    before = _num_graphs()
    update = torch.compile(transform.update, fullgraph=True, backend="aot_eager")
    state = other = transform.init(example.params)
    for step, (updates, context) in enumerate(example.steps * 3):
        out, state = transform.update(updates, state, example.params, context=context)
        try:
            got, other = update(updates, other, example.params, context=context)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            refuse(f"step {step}: recompiled at every step", _RECOMPILED)
        gap = difference(got, out, _ROUNDING)
        require(not gap, f"step {step}, compiled: updates{gap}", _UNTRACEABLE)
        gap = difference(other, state, _ROUNDING)
        require(not gap, f"step {step}, compiled: state{gap}", _UNTRACEABLE)
    made = _num_graphs() - before
    what = f"{len(example.updates) * 3} steps made {made} graphs, not {allowed}"
    require(made <= allowed, what, _RECOMPILED)


def _num_graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def _static_returns(transform: Transform, example: Example, most: int = 100) -> bool:
    """Whether the state holds Static values that come back to where they were.

    A window of any length needs three graphs: torch makes the position a symbol when it
    sees the second one.
    """
    state = transform.init(example.params)
    start = _pytree.tree_structure(state)
    moved = False
    for _ in range(most):
        for updates, context in example.steps:
            state = transform.update(updates, state, example.params, context=context)[1]
            now = _pytree.tree_structure(state)
            if moved and now == start:
                return True
            moved = moved or now != start
        if not moved:
            return False
    return False


@law(omit=False, hint="chain could not run it on tensors that require gradients")
def no_graph(transform: Transform, example: Example) -> None:
    """A chain keeps no autograd graph unless it is asked to."""
    cause = (
        "the transform turns recording on by itself (torch.enable_grad, "
        "requires_grad_). Leave grad mode as it is: chain decides it from "
        "Context(differentiable=...)"
    )
    chained = chain(transform)
    for batched in (False, True):
        ensemble = torch.func.vmap if batched else _alone
        place = "under vmap, " if batched else ""
        params = _leaves(example.params, batched=batched)
        state = ensemble(chained.init)(params)
        for updates, context in example.steps:

            def update(u: Any, s: Any, p: Any, c: Context = context) -> Any:
                return chained.update(u, s, p, context=c)

            given = _leaves(updates, batched=batched)
            out, state = ensemble(update)(given, state, params)
            for what, tree in (("updates", out), ("state", state)):
                for at, x in tensors(tree):
                    kept = f"{place}{what}{at} keeps a graph"
                    require(not x.requires_grad, kept, cause)
            for name, x in apply_updates(params, out).items():
                kept = f"{place}the new parameter {name!r} keeps a graph"
                is_new = x is not params[name]
                require(not (is_new and x.requires_grad), kept, cause)


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _leaves(given: TensorMap, *, batched: bool) -> TensorMap:
    """Return tensors that require gradients, or a batch of one of each."""
    return {
        name: torch.nn.Parameter(x[None] if batched else x.clone())
        for name, x in given.items()
    }


_FACTORS = (1.0, -0.61, 1.73)
"""Of the updates of three steps: no momentum that anybody writes makes a sum 0."""


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
    contexts = [(example.contexts or [Context()])[0]] * 3
    places = [(kind, name) for kind in given for name in given[kind]]
    gap = _derivative_gap(transform, given, places, contexts)
    if gap:
        wrong = [
            at for at in places if _derivative_gap(transform, given, [at], contexts)
        ]
        kind, name = (wrong or places)[0]
        cause = (
            "a part of the formula is hidden from autograd (detach, .data, no_grad, "
            "float(t)), or has no derivative: a rounding, a maximum, a sign. In that "
            "case leave smooth=False"
        )
        refuse(f"the derivative with respect to {kind}[{name!r}]: {gap}", cause)


def _derivative_gap(
    transform: Transform,
    given: dict[str, TensorMap],
    places: list[tuple[str, str]],
    contexts: list[Context],
) -> str | None:
    """Say how derivatives at some places differ from differences; None if they agree.

    All places are one vector and all results one number, so that it is one backward.
    """
    sizes = [given[kind][name].numel() for kind, name in places]
    if not sum(sizes):
        return None

    def total(flat: Tensor) -> Tensor:
        at = {kind: dict(tensors) for kind, tensors in given.items()}
        pieces = torch.split(flat, sizes)
        for (kind, name), piece in zip(places, pieces, strict=True):
            at[kind][name] = piece.reshape(at[kind][name].shape)
        state = transform.init(at["params"])
        sums = [flat.new_zeros(())]
        for factor, context in zip(_FACTORS, contexts, strict=True):
            scaled = {name: factor * x for name, x in at["updates"].items()}
            asked = dataclasses.replace(context, differentiable=True)
            out, state = transform.update(scaled, state, at["params"], context=asked)
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
    """Move every number by at most 0.1: kinks lie at round and at equal numbers."""
    wide = {name: x.double() for name, x in given.items()}
    moves = numbers_like(wide, key)
    # All the same way, so that sums move, too.
    return {name: x + 0.05 * moves[name].abs() for name, x in wide.items()}

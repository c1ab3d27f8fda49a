"""Scope: an update on parts of the parameters is the update on the whole."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._context import Context, ReduceOp, Reducer, reduce_locally
from functional_optim.core._transform import Scope, Static, Transform
from functional_optim.core._traversal import children_of
from functional_optim.testing._compare import close, difference, same_bits, tensors
from functional_optim.testing._examples import Example
from functional_optim.testing._law import law, require
from functional_optim.testing.laws._purity import run
from functional_optim.testing.laws._structure import has_static

_ROUNDING = 1e-12
"""Cuts inside a tensor change the order of sums: n * eps of float64, n < 4000."""


@law(
    rounds=True,
    hint="a piece of a tensor has another shape than the whole; look at no position",
)
def scope(transform: Transform, example: Example) -> None:
    """An update on any legal cut, totals shared, equals the update on the whole."""
    declared = transform.scope
    if declared == Scope.GLOBAL:
        return
    if declared == Scope.ELEMENTWISE:
        example = _as_columns(transform, example)
    params = example.params
    if has_static(transform.init(params)):
        example = _with_all_names(example)
    for cut in _cuts(declared, params):
        state = transform.init(params)
        for updates, context in example.steps:
            whole = transform.update(updates, state, params, context=context)
            # A part that is given nothing is not run.
            parts = [part for part in cut if any(name in updates for name, _ in part)]
            new = update_parts(
                transform,
                parts,
                updates,
                state,
                params,
                context=context,
                may_branch=_may_branch(transform),
            )
            strict = not _may_branch(transform)
            _compare_parts(whole, state, new, params, _cause(declared), strict=strict)
            state = whole[1]
    if declared == Scope.ELEMENTWISE:
        _commutes_with_permutation(transform, example)


def _as_columns(transform: Transform, example: Example) -> Example:
    """Return the example with all elements of a tensor along dimension 0.

    So a cut along dimension 0 is a cut anywhere. Requires that the update does not
    depend on which elements stand in one row. The number of dimensions stays, because
    masks and labels may look at it.
    """

    def columns(given: TensorMap) -> TensorMap:
        return {
            name: x.reshape(-1, *[1] * (x.ndim - 1)) if x.ndim else x
            for name, x in given.items()
        }

    other = dataclasses.replace(
        example,
        params=columns(example.params),
        updates=[columns(updates) for updates in example.updates],
    )
    pairs = zip(run(transform, example), run(transform, other), strict=True)
    for step, ((out, _), (out_columns, _)) in enumerate(pairs):
        gap = difference(out_columns, columns(out), _ROUNDING)
        what = f"step {step} with the elements of each tensor in one column: updates"
        require(not gap, f"{what}{gap}", _cause(Scope.ELEMENTWISE))
    return other


def _with_all_names(example: Example) -> Example:
    """Give every name an update in every step.

    A part that is given nothing in a step is not run, so an open window of that part
    stands still; whoever cuts a pipeline runs what holds once for all parts.
    """
    updates = [
        {name: step.get(name, p) for name, p in example.params.items()}
        for step in example.updates
    ]
    return dataclasses.replace(example, updates=updates)


def _may_branch(transform: object) -> bool:
    """Whether a part may be run without a transform inside that has none of its names.

    Then the scalars of that one stay as they were in this part.
    """
    inner = list(children_of(transform).values())
    if hasattr(transform, "stands_for"):
        return any(map(_may_branch, inner))
    for value in getattr(transform, "__dict__", {}).values():
        held = value if isinstance(value, (list, tuple)) else (value,)
        inner += [part for part in held if isinstance(part, Transform)]
    return bool(inner)


def _cause(declared: Scope) -> str:
    looks = "other tensors (a joint norm, a sum over all)"
    wider = Scope.GLOBAL
    if declared == Scope.ELEMENTWISE:
        looks = f"its whole tensor (x.mean(), x.norm(), a position) or {looks}"
        wider = Scope.PER_TENSOR
    return (
        f"it is declared {declared.name}, but looks at {looks}. Declare "
        f"scope = Scope.{wider.name} if that is what it needs; learn one number about "
        "all tensors through context.reduce(torch.stack(one value per tensor), op)"
    )


def _cuts(declared: Scope, params: TensorMap) -> list[list[Shard]]:
    """Return the legal cuts that are tried: lists of parts."""
    everything = slice(None)
    by_name: list[Shard] = [[(name, everything)] for name in params]
    if declared != Scope.ELEMENTWISE:
        return [by_name]
    # Every part holds some elements of most names, as ranks do: unequal pieces.
    across: list[Shard] = [[], [], []]
    for name, p in params.items():
        count = len(p) if p.ndim else 1
        if count <= 1:
            across[0].append((name, everything))
            continue
        ends = [0, 1, min(count // 2 + 1, count), count]
        for shard, start, stop in zip(across, ends, ends[1:], strict=False):
            if start < stop:
                shard.append((name, slice(start, stop)))
    return [by_name, across]


def _compare_parts(
    whole: tuple[TensorMap, Any],
    before: Any,
    parts: list[tuple[Shard, TensorMap, Any]],
    params: TensorMap,
    cause: str,
    *,
    strict: bool,
) -> None:
    """Require that the parts together are the whole."""

    def compare(what: str, got: Any, wanted: Any) -> None:
        gap = difference(got, wanted, _ROUNDING)
        require(not gap, f"{_shown_cut(parts)}: {what}{gap}", cause)

    found = [out for _, out, _ in parts]
    # A name of which some pieces are missing was not run on all its parts.
    held = {n: u for n, u in whole[0].items() if any(n in out for out in found)}
    compare("updates", _glued(held, found, params), held)
    require(held.keys() == whole[0].keys(), "the parts dropped names", cause)
    fields: list[TensorMap] = []
    map_fields(fields.append, whole[1])
    part_fields: list[list[TensorMap]] = []
    for _, _, new in parts:
        part_fields.append([])
        map_fields(part_fields[-1].append, new)
    for index, entries in enumerate(fields):
        got = [some[index] for some in part_fields]
        seen = {n: x for n, x in entries.items() if any(n in some for some in got)}
        if is_elementwise(entries, params):
            seen = {n: x for n, x in seen.items() if _is_covered(n, got, params)}
            compare("state", _glued(seen, got, params), seen)
        else:
            for some in got:
                compare("state", some, {n: entries[n] for n in some})
    for part, _, new in parts:
        others = params.keys() - {name for name, _ in part}
        rest, rest_before, scalars = (
            _global_part(state, others) for state in (whole[1], before, new)
        )
        gap = difference(scalars, rest, _ROUNDING)
        # A part without any name of a branch leaves the branch as it was.
        allowed = not strict and _is_mixture(scalars, rest, rest_before)
        what = f"{_shown_cut(parts)}: a scalar of the state{gap}"
        require(not gap or allowed, what, cause)


def _shown_cut(parts: list[tuple[Shard, TensorMap, Any]]) -> str:
    """Say how the parameters were cut."""
    shown = []
    for part, _, _ in parts:
        pieces = [
            name if where == slice(None) else f"{name}[{where.start or 0}:...]"
            for name, where in part
        ]
        shown.append(" + ".join(pieces))
    rest = f" | ... ({len(shown)} parts)" if len(shown) > 4 else ""
    return f"cut into {' | '.join(shown[:4])}{rest}"


def _is_covered(name: str, got: Sequence[TensorMap], params: TensorMap) -> bool:
    """Whether the parts that ran hold all of a name."""
    pieces = [some[name] for some in got if name in some]
    whole = params[name]
    return not whole.ndim or sum(len(piece) for piece in pieces) == len(whole)


def _glued(like: TensorMap, parts: Sequence[TensorMap], params: TensorMap) -> TensorMap:
    """Put the pieces of each name together."""
    made = {}
    for name in like:
        pieces = [part[name] for part in parts if name in part]
        made[name] = torch.cat(pieces) if params[name].ndim else pieces[0]
    return made


def _is_mixture(got: Any, new: Any, old: Any) -> bool:
    """Whether every scalar is the new one or the old one."""
    triples = zip(tensors(got), tensors(new), tensors(old), strict=True)
    return all(
        same_bits(g, o) or close(g, n, _ROUNDING) for (_, g), (_, n), (_, o) in triples
    )


def _global_part(state: Any, others: Set[str]) -> Any:
    """Return a state without its fields by name: its scalars and what is Static.

    A part may not know which of the other names were seen.
    """
    if isinstance(state, Static) and isinstance(state.value, tuple):
        return Static(tuple(told for told in state.value if told not in others))
    if isinstance(state, tuple):
        parts = [_global_part(part, others) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return () if isinstance(state, dict) else state


def _commutes_with_permutation(transform: Transform, example: Example) -> None:
    """Require that the place of an element does not matter."""

    def turned(given: TensorMap) -> TensorMap:
        return {n: x.reshape(-1).flip(0).reshape(x.shape) for n, x in given.items()}

    other = dataclasses.replace(
        example,
        params=turned(example.params),
        updates=[turned(updates) for updates in example.updates],
    )
    pairs = zip(run(transform, example), run(transform, other), strict=True)
    for step, ((out, _), (out_turned, _)) in enumerate(pairs):
        gap = difference(turned(out_turned), out, _ROUNDING)
        what = f"step {step} with the elements of each tensor reversed: updates{gap}"
        require(not gap, what, _cause(Scope.ELEMENTWISE))


Shard = list[tuple[str, slice]]
"""Pieces of some names, along dimension 0; in the order of the parameters."""


def _piece(x: Tensor, where: slice) -> Tensor:
    return x[where].clone() if x.ndim else x.clone()


class _MissingTotalError(Exception):  # It carries a partial out of an update.
    def __init__(self, key: tuple[Any, ...], partial: Tensor, op: ReduceOp) -> None:
        super().__init__(key)
        self.key, self.partial, self.op = key, partial, op


def update_parts(
    transform: Transform,
    parts: list[Shard],
    updates: TensorMap,
    state: Any,
    params: TensorMap,
    *,
    context: Context,
    may_branch: bool,
) -> list[tuple[Shard, TensorMap, Any]]:
    """Run `update` on every part by itself, with totals shared."""
    given = []
    for part in parts:
        u = {name: _piece(updates[name], w) for name, w in part if name in updates}
        p = {name: _piece(params[name], w) for name, w in part}
        given.append((u, part_of(state, part, params), p))
    order: list[tuple[Any, ...]] = []
    cause = "calls of context.reduce must not depend on names, shapes or values"
    totals: dict[tuple[Any, ...], Tensor] = {}
    while True:
        results, stopped = [], []
        for u, s, p in given:
            reducer = _supplied(totals)
            part_context = dataclasses.replace(context, reducer=reducer)
            try:
                results.append(transform.update(u, s, p, context=part_context))
            except _MissingTotalError as total:
                stopped.append(total)
        if not stopped:
            return [(part, *r) for part, r in zip(parts, results, strict=True)]
        order = order or _order_of_calls(transform, updates, state, params, context)
        keys = {total.key for total in stopped}
        everywhere = may_branch or (len(stopped) == len(given) and len(keys) == 1)
        require(everywhere, "not every part calls context.reduce", cause)
        require(
            keys <= set(order), "a part calls context.reduce in other places", cause
        )
        # A part without any name of a branch is ahead of those that have some.
        key = min(keys, key=order.index)
        joined = [total for total in stopped if total.key == key]
        partial = torch.cat([total.partial for total in joined])
        totals[key] = reduce_locally(partial, joined[0].op)


def _order_of_calls(
    transform: Transform,
    updates: TensorMap,
    state: Any,
    params: TensorMap,
    context: Context,
) -> list[tuple[Any, ...]]:
    """Return the keys of the calls of `reduce` in an update on the whole."""
    order: list[tuple[Any, ...]] = []

    def reducer(path: tuple[Any, ...], partial: Tensor, op: ReduceOp) -> Tensor:
        order.append((path, [seen for seen, _ in order].count(path)))
        return reduce_locally(partial, op)

    counting = dataclasses.replace(context, reducer=reducer)
    transform.update(updates, state, params, context=counting)
    return order


def _supplied(totals: dict[tuple[Any, ...], Tensor]) -> Reducer:
    """Return a reducer that knows some totals and stops at the first it does not."""
    calls: dict[tuple[Any, ...], Iterator[int]] = {}

    def reducer(path: tuple[Any, ...], partial: Tensor, op: ReduceOp) -> Tensor:
        key = (path, next(calls.setdefault(path, itertools.count())))
        if key not in totals:
            raise _MissingTotalError(key, partial, op)
        return totals[key]

    return reducer


def is_elementwise(entries: TensorMap, params: TensorMap) -> bool:
    """Whether a field of a state has its parameters' shapes, so that it can be cut."""
    return all(entries[name].shape == params[name].shape for name in entries)


def map_fields(function: Callable[[TensorMap], Any], state: Any) -> Any:
    """Apply a function to every dict of a state."""
    if isinstance(state, dict):
        return function(state)
    if isinstance(state, tuple):
        parts = [map_fields(function, part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def part_of(state: Any, part: Shard, params: TensorMap) -> Any:
    """Return the state of one part."""

    def cut(entries: TensorMap) -> TensorMap:
        elementwise = is_elementwise(entries, params)
        return {
            name: _piece(entries[name], where) if elementwise else entries[name]
            for name, where in part
            if name in entries
        }

    return map_fields(cut, state)

"""Check that an update on parts of the parameters equals the update on the whole."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._context import Context, ReduceOp, Reducer, reduce_locally
from functional_optim.core._transform import Scope, Static, Transform
from functional_optim.core._traversal import children_of
from functional_optim.testing._compare import (
    close,
    difference,
    map_nodes,
    nodes,
    same_bits,
    tensors,
)
from functional_optim.testing._examples import Example, map_tensors
from functional_optim.testing._law import ROUNDING, law, require, require_equal, run
from functional_optim.testing.laws._structure import has_static

Part: TypeAlias = list[tuple[str, slice]]
"""Slices of parameters along dimension 0, in the order of the parameters."""
Call: TypeAlias = tuple[tuple[int | str, ...], int]
"""The path of a call of `Context.reduce`, and its number on this path."""
PartResult: TypeAlias = tuple[Part, TensorMap, Any]
"""A part with its updates and state."""


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
        # Now a cut along dimension 0 is a cut anywhere.
        example = _check_rearranged(transform, example, "in one column", _column)
    params = example.params
    if has_static(transform.init(params)):
        # A part without updates does not run: its accumulation window would lag behind.
        full = [{n: u.get(n, p) for n, p in params.items()} for u in example.updates]
        example = dataclasses.replace(example, updates=full)
    cause, may_branch = _cause(declared), _may_branch(transform)
    for cut in _cuts(declared, params):
        state = transform.init(params)
        for updates, context in example.steps:
            whole = transform.update(updates, state, params, context=context)
            parts = [part for part in cut if any(name in updates for name, _ in part)]
            results = _update_parts(
                transform,
                parts,
                updates,
                state,
                params,
                context=context,
                may_branch=may_branch,
            )
            old = state if may_branch else None
            _check_parts(results, whole, old, params, cause)
            state = whole[1]
    if declared == Scope.ELEMENTWISE:
        _check_rearranged(transform, example, "reversed", _reversed)


def _check_rearranged(
    transform: Transform,
    example: Example,
    how: str,
    rearrange: Callable[[Tensor], Tensor],
) -> Example:
    """Require that the places of elements do not matter; return the other example."""
    other = map_tensors(rearrange, example)
    pairs = zip(run(transform, example), run(transform, other), strict=True)
    for step, ((out, _), (rearranged, _)) in enumerate(pairs):
        what = f"step {step} with the elements of each tensor {how}: updates"
        wanted = {name: rearrange(u) for name, u in out.items()}
        require_equal(what, rearranged, wanted, _cause(Scope.ELEMENTWISE), ROUNDING)
    return other


def _column(x: Tensor) -> Tensor:
    # The number of dimensions stays, because masks and labels may depend on it.
    return x.reshape(-1, *[1] * (x.ndim - 1)) if x.ndim else x


def _reversed(x: Tensor) -> Tensor:
    return x.reshape(-1).flip(0).reshape(x.shape)


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


def _cuts(declared: Scope, params: TensorMap) -> list[list[Part]]:
    """Return the legal cuts that are tried."""
    everything = slice(None)
    by_name: list[Part] = [[(name, everything)] for name in params]
    if declared != Scope.ELEMENTWISE:
        return [by_name]
    # Every part has some elements of most names, as ranks do: unequal pieces.
    across: list[Part] = [[], [], []]
    for name, p in params.items():
        count = len(p) if p.ndim else 1
        if count <= 1:
            across[0].append((name, everything))
            continue
        ends = [0, 1, min(count // 2 + 1, count), count]
        for part, start, stop in zip(across, ends, ends[1:], strict=False):
            if start < stop:
                part.append((name, slice(start, stop)))
    return [by_name, across]


def _check_parts(
    results: list[PartResult],
    whole: tuple[TensorMap, Any],
    old: Any,
    params: TensorMap,
    cause: str,
) -> None:
    """Require that the results of the parts together are those of the whole.

    With an old state, each scalar of a part may also be the old one.
    """
    cut = _cut_text([part for part, _, _ in results])
    states = [state for _, _, state in results]

    def compare(what: str, got: TensorMap, entries: TensorMap) -> None:
        wanted = {name: entries[name] for name in got}
        require_equal(f"{cut}: {what}", got, wanted, cause, ROUNDING)

    updates = _glued(whole[0], [out for _, out, _ in results], params)
    compare("updates", updates, whole[0])
    require(updates.keys() == whole[0].keys(), "the parts dropped names", cause)
    for entries, *pieces in zip(*map(_maps, (whole[1], *states)), strict=True):
        elementwise = _is_elementwise(entries, params)
        glued = [_glued(entries, pieces, params)] if elementwise else pieces
        for some in glued:
            compare("state", some, entries)
    for part, _, state in results:
        others = params.keys() - {name for name, _ in part}
        scalars, wanted = _scalars(state, others), _scalars(whole[1], others)
        gap = difference(scalars, wanted, ROUNDING)
        # A part without any name of a branch leaves the branch as it was.
        if gap and old is not None and _is_mix(scalars, wanted, _scalars(old, others)):
            continue
        require(not gap, f"{cut}: a scalar of the state{gap}", cause)


def _cut_text(parts: Sequence[Part]) -> str:
    """Return how the parameters were cut, for an error message."""
    texts = []
    for part in parts[:4]:
        pieces = [
            name if where == slice(None) else f"{name}[{where.start}:...]"
            for name, where in part
        ]
        texts.append(" + ".join(pieces))
    rest = f" | ... ({len(parts)} parts)" if len(parts) > 4 else ""
    return f"cut into {' | '.join(texts)}{rest}"


def _maps(state: Any) -> list[TensorMap]:
    return [node for _, node in nodes(state) if isinstance(node, dict)]


def _is_elementwise(entries: TensorMap, params: TensorMap) -> bool:
    """Whether a field of a state has its parameters' shapes, so that it can be cut."""
    return all(entries[name].shape == params[name].shape for name in entries)


def _glued(
    names: Iterable[str], parts: Sequence[TensorMap], params: TensorMap
) -> TensorMap:
    """Concatenate the pieces of each name, unless some are missing."""
    made = {}
    for name in names:
        pieces, param = [part[name] for part in parts if name in part], params[name]
        if pieces and (not param.ndim or sum(map(len, pieces)) == len(param)):
            made[name] = torch.cat(pieces) if param.ndim else pieces[0]
    return made


def _is_mix(got: Any, new: Any, old: Any) -> bool:
    """Whether every scalar is the new one or the old one."""
    triples = zip(tensors(got), tensors(new), tensors(old), strict=True)
    return all(
        same_bits(g, o) or close(g, n, ROUNDING) for (_, g), (_, n), (_, o) in triples
    )


def _scalars(state: Any, others: Set[str]) -> Any:
    """Return a state without its maps, and without other names in `Static` values."""

    def keep(node: Any) -> Any:
        if isinstance(node, Static) and isinstance(node.value, tuple):
            # A part may not know which of the other names had updates.
            return Static(tuple(value for value in node.value if value not in others))
        return () if isinstance(node, dict) else node

    return map_nodes(keep, state)


def part_of(state: Any, part: Part, params: TensorMap) -> Any:
    """Return one part of each map in a state."""

    def cut(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        entries = {name: node[name] for name, _ in part if name in node}
        if not _is_elementwise(node, params):
            return entries
        slices = dict(part)
        return {n: (x[slices[n]] if x.ndim else x).clone() for n, x in entries.items()}

    return map_nodes(cut, state)


class _MissingTotalError(Exception):
    """Carries a call of `Context.reduce` out of an update: key, partial, operation."""


def _update_parts(
    transform: Transform,
    parts: list[Part],
    updates: TensorMap,
    state: Any,
    params: TensorMap,
    *,
    context: Context,
    may_branch: bool,
) -> list[PartResult]:
    """Run `update` on each part alone, with the totals of `Context.reduce` shared."""
    given = [part_of((updates, state, params), part, params) for part in parts]
    order: list[Call] = []
    totals: dict[Call, Tensor] = {}

    def record(call: Call, partial: Tensor, op: ReduceOp) -> Tensor:
        order.append(call)
        return reduce_locally(partial, op)

    def supply(call: Call, partial: Tensor, op: ReduceOp) -> Tensor:
        if call not in totals:
            raise _MissingTotalError(call, partial, op)
        return totals[call]

    cause = "calls of context.reduce must not depend on names, shapes or values"
    while True:
        results, stops = [], []
        for u, s, p in given:
            supplied = context.with_reducer(_numbered(supply))
            try:
                results.append(transform.update(u, s, p, context=supplied))
            except _MissingTotalError as error:
                stops.append(error.args)
        if not stops:
            return [
                (part, *result) for part, result in zip(parts, results, strict=True)
            ]
        if not order:
            recorded = context.with_reducer(_numbered(record))
            transform.update(updates, state, params, context=recorded)
        calls = {call for call, _, _ in stops}
        everywhere = may_branch or (len(stops) == len(given) and len(calls) == 1)
        require(everywhere, "not every part calls context.reduce", cause)
        what = "a part calls context.reduce in other places"
        require(calls <= set(order), what, cause)
        # A part without any name of a branch is ahead of those that have some.
        first = min(calls, key=order.index)
        partials = [partial for call, partial, _ in stops if call == first]
        op = next(op for call, _, op in stops if call == first)
        totals[first] = reduce_locally(torch.cat(partials), op)


def _numbered(reduce: Callable[[Call, Tensor, ReduceOp], Tensor]) -> Reducer:
    """Return a reducer that numbers the calls on each path."""
    counts: Counter[tuple[int | str, ...]] = Counter()

    def reducer(path: tuple[int | str, ...], partial: Tensor, op: ReduceOp) -> Tensor:
        counts[path] += 1
        return reduce((path, counts[path]), partial, op)

    return reducer

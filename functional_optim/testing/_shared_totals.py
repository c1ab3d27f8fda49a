"""Running an update on parts of the parameters, with the totals of all parts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from functional_optim.core._context import Context, ReduceOp, Reducer, local_total
from functional_optim.core._transform import TensorMap, Transform
from functional_optim.testing._broken import require

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
        totals[key] = local_total(partial, joined[0].op)


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
        return local_total(partial, op)

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

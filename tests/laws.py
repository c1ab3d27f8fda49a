"""The laws every transform obeys, ours or a user's, each callable by itself.

A law takes a transform and an `Example`, uses only the protocol (`init`, `update`,
`scope`), and raises `AssertionError` with what is broken and where.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

import functional_optim as fo

Step = tuple[fo.TensorMap, fo.Context]


@dataclasses.dataclass(frozen=True)
class Example:
    """Parameters and the updates of some steps, with what the loop knows at each."""

    params: fo.TensorMap
    steps: Sequence[Step]


class _Total(Exception):  # noqa: N818 - no error: it carries a partial out of an update
    def __init__(self, key: tuple[Any, ...], partial: Tensor, op: Any) -> None:
        super().__init__(key)
        self.key, self.partial, self.op = key, partial, op


# -- comparing ---------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype, device and every bit."""
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    a, b = a.detach().contiguous(), b.detach().contiguous()
    if a.dtype is torch.bool:
        return torch.equal(a, b)
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def leaves(tree: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors of a state or map with their places."""
    found, _ = _pytree.tree_flatten_with_path(tree)
    return [(_pytree.keystr(path), leaf) for path, leaf in found]


def assert_same(a: Any, b: Any, what: str, rtol: float | None = None) -> None:
    """Assert that two trees agree: bit for bit, or relative to their largest number."""
    forms = _pytree.tree_structure(a), _pytree.tree_structure(b)
    # The structure holds the names, and what is Static.
    assert forms[0] == forms[1], f"{what}: {forms[0]} / {forms[1]}"
    left, right = leaves(a), leaves(b)
    for (place, x), (_, y) in zip(left, right, strict=True):
        if rtol is None:
            assert same_bits(x, y), f"{what}{place}: {x} / {y}"
        else:
            assert x.shape == y.shape, f"{what}{place}: shapes {x.shape} / {y.shape}"
            assert x.dtype == y.dtype, f"{what}{place}: dtypes {x.dtype} / {y.dtype}"
            # Relative to the largest number, because sums cancel; equal_nan for guards.
            scale = x.double().abs().nan_to_num(0.0).max() if x.numel() else 0.0
            close = torch.allclose(
                x.double(), y.double(), rtol, rtol * float(scale), equal_nan=True
            )
            assert close, f"{what}{place}: {x} / {y}"


def storages(tree: Any) -> set[int]:
    """Return where the numbers of a tree lie in memory."""
    return {
        leaf.untyped_storage().data_ptr() for _, leaf in leaves(tree) if leaf.numel()
    }


def run(transform: fo.Transform, example: Example) -> Iterator[tuple[Any, Any]]:
    """Yield the output and the new state of every step."""
    state = transform.init(example.params)
    for updates, context in example.steps:
        out, state = transform.update(updates, state, example.params, context=context)
        yield out, state


# -- the laws ----------------------------------------------------------------------


def purity(transform: fo.Transform, example: Example) -> None:
    """Inputs keep every bit, and outputs share no memory with them."""
    params = example.params
    state = _watched("init", lambda: transform.init(params), params=params)
    assert not storages(state) & storages(params), "init returned a caller's tensor"
    for updates, context in example.steps:
        out, new = _watched(
            "update",
            lambda u=updates, s=state, c=context: transform.update(
                u, s, params, context=c
            ),
            updates=updates,
            state=state,
            params=params,
        )
        given = storages(updates) | storages(params)
        assert not storages(out) & given, "update returned a caller's tensor"
        assert not storages(new) & given, "the state holds a caller's tensor"
        assert not storages(out) & (storages(state) | storages(new)), (
            "update returned a tensor of the state"
        )
        state = new


def _watched(what: str, call: Callable[[], Any], **inputs: Any) -> Any:
    before = {
        name: [(place, x.clone(), x._version) for place, x in leaves(tree)]
        for name, tree in inputs.items()
    }
    result = call()
    for name, tree in inputs.items():
        after = leaves(tree)
        places = [place for place, _, _ in before[name]]
        assert places == [p for p, _ in after], f"{what} changed the names of {name}"
        for (place, old, version), (_, x) in zip(before[name], after, strict=True):
            assert x._version == version, f"{what} wrote to {name}{place} in place"
            assert same_bits(old, x), f"{what} changed {name}{place}"
    return result


def determinism(transform: fo.Transform, example: Example) -> None:
    """The same inputs give the same bits, also when calls are repeated."""
    state = transform.init(example.params)
    assert_same(state, transform.init(example.params), "init")
    for updates, context in example.steps:
        first = transform.update(updates, state, example.params, context=context)
        again = transform.update(updates, state, example.params, context=context)
        assert_same(first, again, "update")
        state = first[1]


def structure(transform: fo.Transform, example: Example) -> None:
    """Names, shapes and devices are the parameters'; dtypes and state are stable."""
    params = example.params
    state = transform.init(params)
    form = _form(state)
    dtypes: dict[str, torch.dtype] = {}
    for out, new in run(transform, example):
        assert list(out) == [name for name in params if name in out], "order of names"
        for name, u in out.items():
            assert u.shape == params[name].shape, f"shape of {name}"
            assert u.device == params[name].device, f"device of {name}"
            assert dtypes.setdefault(name, u.dtype) == u.dtype, f"dtype of {name}"
        assert _form(new) == form, f"the state changed: {form} / {_form(new)}"


def _form(state: Any) -> Any:
    """Return the structure of a state, whatever its Static values are."""
    masked = _without_static(state)
    kinds = [(x.shape, x.dtype, x.device) for _, x in leaves(masked)]
    return _pytree.tree_structure(masked), kinds


def _without_static(state: Any) -> Any:
    if isinstance(state, fo.Static):
        return fo.Static(None)
    if isinstance(state, tuple):
        parts = [_without_static(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def omitted_names(transform: fo.Transform, example: Example) -> None:
    """A name without updates keeps its state, and gets no update."""
    start = transform.init(example.params)
    _, used = list(run(transform, example))[-1]
    for missing, before in itertools.product(example.params, (start, used)):
        now = before
        for updates, context in example.steps:
            rest = {name: u for name, u in updates.items() if name != missing}
            out, now = transform.update(rest, now, example.params, context=context)
            # An open window may still hold what the name got before.
            ours = before is start
            assert not (ours and missing in out), (
                f"{missing} got an update from nothing"
            )
        for (place, old), (_, new) in zip(leaves(before), leaves(now), strict=True):
            if place.endswith(f"[{missing!r}]"):
                assert same_bits(old, new), f"state{place} changed without a gradient"


def hold(transform: fo.Transform, example: Example) -> None:
    """An empty map in is an empty map out, and the state stays."""
    for _, state in run(transform, example):
        out, after = transform.update({}, state, example.params)
        assert out == {}, f"an empty map gave {out}"
        assert_same(state, after, "state after an empty map")


def scope(transform: fo.Transform, example: Example) -> None:
    """An update on any legal cut, totals shared, equals the update on the whole."""
    params = example.params
    if transform.scope == fo.Scope.GLOBAL:
        return
    for cut in _cuts(transform.scope, params):
        state = transform.init(params)
        for updates, context in example.steps:
            whole = transform.update(updates, state, params, context=context)
            # A part that is given nothing is not run.
            parts = [part for part in cut if any(name in updates for name, _ in part)]
            new = _update_parts(transform, parts, updates, state, params, context)
            _compare_parts(whole, state, new, params, strict=_is_across(cut, params))
            state = whole[1]
    if transform.scope == fo.Scope.ELEMENTWISE:
        _commutes_with_permutation(transform, example)


Part = list[tuple[str, slice]]
"""Pieces of some names, along dimension 0; in the order of the parameters."""


def _cuts(scope: fo.Scope, params: fo.TensorMap) -> list[list[Part]]:
    """Return the legal cuts that are tried: lists of parts."""
    everything = slice(None)
    by_name = [[(name, everything)] for name in params]
    if scope != fo.Scope.ELEMENTWISE:
        return [by_name]
    rows: list[Part] = []
    for name, p in params.items():
        count = p.shape[0] if p.ndim else 0
        rows += [[(name, slice(i, i + 1))] for i in range(count)] or [
            [(name, everything)]
        ]
    # Every part holds some elements of every name, as ranks do.
    across: list[Part] = [
        [(n, slice(None, 1) if p.ndim else everything) for n, p in params.items()],
        [(n, slice(1, None)) for n, p in params.items() if p.ndim],
    ]
    return [by_name, rows, across]


def _is_across(cut: list[Part], params: fo.TensorMap) -> bool:
    return len(cut) == 2 and len(cut[0]) == len(params)


def _piece(x: Tensor, where: slice) -> Tensor:
    return x[where].clone() if x.ndim else x.clone()


def _update_parts(
    transform: fo.Transform,
    parts: list[Part],
    updates: fo.TensorMap,
    state: Any,
    params: fo.TensorMap,
    context: fo.Context,
) -> list[tuple[Part, fo.TensorMap, Any]]:
    """Run `update` on every part by itself, with totals shared."""
    given = []
    for part in parts:
        u = {name: _piece(updates[name], w) for name, w in part if name in updates}
        p = {name: _piece(params[name], w) for name, w in part}
        given.append((u, _part_of(state, part, params), p))
    order = _order_of_calls(transform, updates, state, params, context)
    totals: dict[tuple[Any, ...], Tensor] = {}
    while True:
        results, stopped = [], []
        for u, s, p in given:
            reducer = _supplied(totals)
            part_context = dataclasses.replace(context, reducer=reducer)
            try:
                results.append(transform.update(u, s, p, context=part_context))
            except _Total as total:
                stopped.append(total)
        if not stopped:
            return [(part, *r) for part, r in zip(parts, results, strict=True)]
        keys = {total.key for total in stopped}
        assert keys <= set(order), "parts reduce differently"
        # A part without any name of a branch is ahead of those that have some.
        key = min(keys, key=order.index)
        joined = [total for total in stopped if total.key == key]
        partial = torch.cat([total.partial for total in joined])
        totals[key] = fo.Context().reduce(partial, joined[0].op)


def _order_of_calls(
    transform: fo.Transform,
    updates: fo.TensorMap,
    state: Any,
    params: fo.TensorMap,
    context: fo.Context,
) -> list[tuple[Any, ...]]:
    """Return the keys of the calls of `reduce` in an update on the whole."""
    order: list[tuple[Any, ...]] = []

    def reducer(path: tuple[Any, ...], partial: Tensor, op: Any) -> Tensor:
        order.append((path, [seen for seen, _ in order].count(path)))
        return fo.Context().reduce(partial, op)

    counting = dataclasses.replace(context, reducer=reducer)
    transform.update(updates, state, params, context=counting)
    return order


def _supplied(totals: dict[tuple[Any, ...], Tensor]) -> Any:
    """Return a reducer that knows some totals and stops at the first it does not."""
    calls: dict[tuple[Any, ...], Iterator[int]] = {}

    def reducer(path: tuple[Any, ...], partial: Tensor, op: Any) -> Tensor:
        key = (path, next(calls.setdefault(path, itertools.count())))
        if key not in totals:
            raise _Total(key, partial, op)
        return totals[key]

    return reducer


def _is_elementwise(entries: fo.TensorMap, params: fo.TensorMap) -> bool:
    """Whether a field of a state has its parameters' shapes, so that it can be cut."""
    return all(entries[name].shape == params[name].shape for name in entries)


def _map_fields(function: Callable[[fo.TensorMap], Any], state: Any) -> Any:
    """Apply a function to every dict of a state."""
    if isinstance(state, dict):
        return function(state)
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(_map_fields(function, part) for part in state))
    if isinstance(state, tuple):
        return tuple(_map_fields(function, part) for part in state)
    return state


def _part_of(state: Any, part: Part, params: fo.TensorMap) -> Any:
    """Return the state of one part."""

    def cut(entries: fo.TensorMap) -> fo.TensorMap:
        elementwise = _is_elementwise(entries, params)
        return {
            name: _piece(entries[name], where) if elementwise else entries[name]
            for name, where in part
            if name in entries
        }

    return _map_fields(cut, state)


def _compare_parts(
    whole: tuple[fo.TensorMap, Any],
    before: Any,
    parts: list[tuple[Part, fo.TensorMap, Any]],
    params: fo.TensorMap,
    *,
    strict: bool,
) -> None:
    """Assert that the parts together are the whole.

    Cuts inside a tensor change the order of sums: n * eps of float64.
    """
    found = [out for _, out, _ in parts]
    assert_same(whole[0], _glued(whole[0], found, params), "update of the parts", 1e-12)
    fields: list[fo.TensorMap] = []
    _map_fields(fields.append, whole[1])
    part_fields: list[list[fo.TensorMap]] = []
    for _, _, new in parts:
        part_fields.append([])
        _map_fields(part_fields[-1].append, new)
    for index, entries in enumerate(fields):
        got = [some[index] for some in part_fields]
        seen = {n: x for n, x in entries.items() if any(n in some for some in got)}
        if _is_elementwise(entries, params):
            seen = {n: x for n, x in seen.items() if _is_covered(n, got, params)}
            assert_same(seen, _glued(seen, got, params), "state of the parts", 1e-12)
        else:
            for some in got:
                assert_same(
                    {n: entries[n] for n in some}, some, "state of a part", 1e-12
                )
    rest, rest_before = _global_part(whole[1]), _global_part(before)
    for _, _, new in parts:
        try:
            assert_same(rest, _global_part(new), "global scalars of a part", 1e-12)
        except AssertionError:
            # A part without any name of a branch leaves the branch as it was.
            if strict or not _is_mixture(_global_part(new), rest, rest_before):
                raise


def _is_covered(name: str, got: list[fo.TensorMap], params: fo.TensorMap) -> bool:
    """Whether the parts that ran hold all of a name."""
    return sum(some[name].numel() for some in got if name in some) == (
        params[name].numel()
    )


def _glued(
    like: fo.TensorMap, parts: list[fo.TensorMap], params: fo.TensorMap
) -> fo.TensorMap:
    """Put the pieces of each name together."""
    made = {}
    for name in like:
        pieces = [part[name] for part in parts if name in part]
        made[name] = torch.cat(pieces) if params[name].ndim else pieces[0]
    return made


def _is_mixture(got: Any, new: Any, old: Any) -> bool:
    """Whether every scalar is the new one or the old one."""
    triples = zip(leaves(got), leaves(new), leaves(old), strict=True)
    return all(
        same_bits(g, o) or torch.allclose(g.double(), n.double(), 1e-12, equal_nan=True)
        for (_, g), (_, n), (_, o) in triples
    )


def _global_part(state: Any) -> Any:
    """Return a state without its fields by name: its scalars and what is Static."""
    return _map_fields(lambda _: (), state)


def _commutes_with_permutation(transform: fo.Transform, example: Example) -> None:
    """Assert that the place of an element does not matter."""

    def reversed_map(tensors: fo.TensorMap) -> fo.TensorMap:
        return {n: x.reshape(-1).flip(0).reshape(x.shape) for n, x in tensors.items()}

    params = reversed_map(example.params)
    turned = Example(params, [(reversed_map(u), c) for u, c in example.steps])
    pairs = zip(run(transform, example), run(transform, turned), strict=True)
    for (out, _), (out_turned, _) in pairs:
        assert_same(out, reversed_map(out_turned), "update of reversed tensors", 1e-12)


def vmapped(transform: fo.Transform, examples: Sequence[Example]) -> None:
    """vmap over init and update equals the loop over members."""

    def stacked(trees: list[Any]) -> Any:
        return _pytree.tree_map(lambda *xs: torch.stack(xs), *trees)

    def members(tree: Any) -> list[Any]:
        return [
            _pytree.tree_map(lambda x, i=i: x[i], tree) for i in range(len(examples))
        ]

    params = stacked([example.params for example in examples])
    state = torch.func.vmap(transform.init)(params)
    singles = [transform.init(example.params) for example in examples]
    assert_same(singles, members(state), "vmap(init)")
    for index, (_, context) in enumerate(examples[0].steps):
        given = [example.steps[index][0] for example in examples]

        def update(u: Any, s: Any, p: Any, c: fo.Context = context) -> Any:
            return transform.update(u, s, p, context=c)

        out, state = torch.func.vmap(update)(stacked(given), state, params)
        results = [
            transform.update(u, s, example.params, context=context)
            for u, s, example in zip(given, singles, examples, strict=True)
        ]
        singles = [new for _, new in results]
        # Norms over a batch may sum in another order: n * eps of float64.
        assert_same([o for o, _ in results], members(out), "vmap(update)", 1e-12)
        assert_same(singles, members(state), "state of vmap(update)", 1e-12)


def compiled(transform: fo.Transform, example: Example, graphs: int) -> None:
    """A compiled update without graph breaks equals the eager one, without recompiling.

    Args:
        transform: The transform.
        example: Its steps are run three times over, so that states and schedules move.
        graphs: How many graphs are allowed in all.
    """
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    update = torch.compile(transform.update, fullgraph=True, backend="aot_eager")
    state = other = transform.init(example.params)
    for updates, context in [*example.steps] * 3:
        out, state = transform.update(updates, state, example.params, context=context)
        got, other = update(updates, other, example.params, context=context)
        assert_same(out, got, "compiled update", 1e-12)
        assert_same(state, other, "state of the compiled update", 1e-12)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert made <= graphs, f"{made} graphs, not {graphs}"


def plain_data(transform: fo.Transform, example: Example) -> None:
    """A state survives plain data on disk, and training goes on with the same bits."""
    state = transform.init(example.params)
    for updates, context in example.steps:
        file = io.BytesIO()
        torch.save(fo.state_dict(state), file)
        file.seek(0)
        data = torch.load(file, weights_only=True)
        loaded = fo.load_state_dict(transform.init(example.params), data)
        assert type(loaded) is type(state)
        assert_same(state, loaded, "loaded state")
        kept = transform.update(updates, state, example.params, context=context)
        resumed = transform.update(updates, loaded, example.params, context=context)
        assert_same(kept, resumed, "update after loading")
        state = kept[1]


def no_graph(transform: fo.Transform, example: Example) -> None:
    """A chain keeps no autograd graph when it was not asked to."""
    chained = fo.chain(transform)
    params = {n: p.clone().requires_grad_() for n, p in example.params.items()}
    state = chained.init(params)
    for updates, context in example.steps:
        given = {n: u.clone().requires_grad_() for n, u in updates.items()}
        out, state = chained.update(given, state, params, context=context)
        for place, x in [*leaves(out), *leaves(state)]:
            assert not x.requires_grad, f"{place} keeps a graph"
        for name, x in fo.apply_updates(params, out).items():
            assert x is params[name] or not x.requires_grad, f"{name} keeps a graph"


def differentiable(transform: fo.Transform, example: Example) -> None:
    """Derivatives with respect to updates and parameters are those of differences."""
    params = example.params
    names = [name for name in params if params[name].numel()]
    asked = dataclasses.replace(fo.Context(), differentiable=True)

    def steps(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors[: len(names)], strict=True))
        now = params | dict(zip(names, tensors[len(names) :], strict=True))
        state, outs = transform.init(params), []
        for factor in (1.0, -0.5, 2.0):
            scaled = {name: factor * u for name, u in given.items()}
            out, state = transform.update(scaled, state, now, context=asked)
            outs += [out[name] for name in names if name in out]
        return tuple(outs)

    first = example.steps[0][0]
    inputs = [first[n].clone().requires_grad_() for n in names]
    inputs += [params[n].clone().requires_grad_() for n in names]
    if steps(*inputs):
        # Central differences of 1e-6 in float64 leave about 1e-9 / 1e-6 relative.
        torch.autograd.gradcheck(steps, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


def chaining(transform: fo.Transform, example: Example) -> None:
    """Chaining is associative, flattens, and has Identity as its identity."""
    a, b = fo.Identity(), fo.Identity()
    assert fo.chain(fo.chain(a, b), transform) == fo.chain(a, fo.chain(b, transform))
    plain = [out for out, _ in run(transform, example)]
    for chained in (
        fo.chain(transform),
        fo.chain(fo.Identity(), transform),
        fo.chain(fo.chain(), fo.chain(transform)),
    ):
        assert_same(plain, [out for out, _ in run(chained, example)], "chained update")

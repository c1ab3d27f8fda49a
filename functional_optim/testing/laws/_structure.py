"""Structure: what results are made of, whatever their numbers are."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._transform import Static, Transform
from functional_optim.core._traversal import children_of
from functional_optim.testing._compare import difference, leaves, same_bits, tensors
from functional_optim.testing._examples import Example
from functional_optim.testing._law import law, refuse, require
from functional_optim.testing.laws._purity import run

_KINDS = "a state is (), or a NamedTuple of tensors and dicts of tensors by name"

_STABLE = (
    "the state is built from what this step had. Make all of it in init, with its "
    "final names, shapes and dtypes; torch.compile needs a graph for each form"
)

_DROPPED = (
    "the result was built only from some of the updates. Return every name that was "
    "given (x.clone() for what passes through), or an empty map to hold"
)

_DTYPE = (
    "a tensor of another dtype took part (torch.tensor(...), arange, torch.ones "
    "default to float32; float64 tensors widen). Make it with dtype=x.dtype, or cast "
    "the result with .to(u.dtype). A transform that widens on purpose says so with an "
    "attribute `dtype`"
)

_SHAPE = "broadcasting, or a reduction without keepdim=True"

_DEVICE = "a tensor was made without device=x.device: torch.zeros_like(x) has it"


@law(omit=False, wide=True, hint="an operation that a dtype, shape or device refuses")
def structure(transform: Transform, example: Example) -> None:
    """Names, shapes, dtypes and devices stay, of updates and of the state."""
    params = example.params
    start = transform.init(params)
    _check_kinds("init", start, params)
    form = _form(start)
    may_hold = has_static(start)
    given: set[str] = set()
    for (updates, _), (out, new) in zip(
        example.steps, _checked_run(transform, example), strict=True
    ):
        given |= updates.keys()
        _check_names(out, updates, given, params, may_hold=may_hold)
        for name, u in out.items():
            _check_tensor(name, u, params[name], transform)
        _check_kinds("update", new, params)
        changed = _changed(form, _form(new))
        require(not changed, f"the state changes its form: {changed}", _STABLE)
    if may_hold:
        _check_emits(transform, example)
    _check_device(transform, example)


def _checked_run(transform: Transform, example: Example) -> Iterator[tuple[Any, Any]]:
    """Yield the output and the new state of every step, after a look at the pair."""
    state = transform.init(example.params)
    for updates, context in example.steps:
        result = transform.update(updates, state, example.params, context=context)
        pair = isinstance(result, tuple) and len(result) == 2
        what = f"update returned a {type(result).__name__}, not a pair"
        require(pair, what, "write: return new_updates, new_state")
        out, state = result
        what = f"update returned updates as a {type(out).__name__}"
        require(type(out) is dict, what, "return a dict from name to tensor")
        yield out, state


def _check_names(
    out: TensorMap,
    updates: TensorMap,
    given: set[str],
    params: TensorMap,
    *,
    may_hold: bool,
) -> None:
    """Require the names of the updates; fewer, or earlier ones, if it can hold."""
    extra = [name for name in out if name not in (given if may_hold else updates)]
    what = f"update returned names that it was not given: {extra}"
    cause = "the result has a name for every parameter: take the names of the updates"
    require(not extra, what, cause)
    missing = [name for name in updates if name not in out]
    # Without anything Static in the state nothing can hold: it would not know when.
    what = f"update dropped {missing} of {list(updates)}"
    require(may_hold or not missing, what, _DROPPED)
    ordered = list(out) == [name for name in params if name in out]
    what = f"update returned the names in another order: {list(out)}"
    require(ordered, what, "build the result in the order of the updates")


def _check_tensor(name: str, u: Any, param: Tensor, transform: Transform) -> None:
    what = f"the update of {name!r} is a {type(u).__name__}, not a tensor"
    require(isinstance(u, Tensor), what, "return torch.zeros_like(u) for no change")
    what = (
        f"the update of {name!r} got shape {tuple(u.shape)} from {tuple(param.shape)}"
    )
    require(u.shape == param.shape, what, _SHAPE)
    what = f"the update of {name!r} moved from {param.device} to {u.device}"
    require(u.device == param.device, what, _DEVICE)
    allowed = {param.dtype, *_declared_dtypes(transform)}
    if param.dtype in {torch.float16, torch.bfloat16}:
        allowed.add(torch.float32)  # Sums of 16-bit numbers are kept in 32 bits.
    what = f"the update of {name!r} got dtype {u.dtype} from {param.dtype}"
    require(u.dtype in allowed, what, _DTYPE)


def _declared_dtypes(transform: object) -> Iterator[torch.dtype]:
    """Yield the dtypes that a transform, or one inside it, is told to compute in."""
    declared = getattr(transform, "dtype", None)
    if isinstance(declared, torch.dtype):
        yield declared
    for inner in children_of(transform).values():
        yield from _declared_dtypes(inner)


def _check_kinds(method: str, state: Any, params: TensorMap, place: str = "") -> None:
    """Require tensors, dicts by name, tuples and Static, and nothing else."""
    at = f"{method}: state{place}"
    if isinstance(state, (Tensor, Static)):
        return
    if isinstance(state, dict):
        unknown = [name for name in state if name not in params]
        cause = "dicts in a state are keyed by parameter names; use a NamedTuple"
        require(not unknown, f"{at} has keys that are no parameters: {unknown}", cause)
        for name, part in state.items():
            what = f"{at}[{name!r}] is a {type(part).__name__}, not a tensor"
            require(isinstance(part, Tensor), what, _KINDS)
        return
    if isinstance(state, tuple):
        fields = getattr(state, "_fields", range(len(state)))
        for field, part in zip(fields, state, strict=True):
            step = f".{field}" if isinstance(field, str) else f"[{field}]"
            _check_kinds(method, part, params, place + step)
        return
    kind = type(state).__name__
    cause = _KINDS
    if isinstance(state, (bool, int, float)):
        cause = (
            f"a Python {kind} is a constant for torch.compile, which makes a new graph "
            "whenever it changes, and vmap refuses it. Make it a tensor: "
            "torch.zeros((), dtype=torch.float64, device=...), or Static(...) if the "
            "*structure* of results depends on it"
        )
    refuse(f"{at} is a {kind}", cause)


def without_static(state: Any) -> Any:
    """Return a state with nothing in its Static nodes."""
    if isinstance(state, Static):
        return Static(None)
    if isinstance(state, tuple):
        parts = [without_static(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def has_static(state: Any) -> bool:
    """Whether the host knows something about a state, so that it can hold."""
    if isinstance(state, tuple):
        return any(map(has_static, state))
    return isinstance(state, Static)


def _form(state: Any) -> tuple[Any, dict[str, tuple[Any, ...]]]:
    """Return what must not change in a state."""
    bare = without_static(state)
    kinds = {
        place: (tuple(x.shape), x.dtype, x.device.type) for place, x in leaves(bare)
    }
    return _pytree.tree_structure(bare), kinds


def _changed(old: tuple[Any, Any], new: tuple[Any, Any]) -> str | None:
    """Say what changed between two forms."""
    for place in old[1] | new[1]:
        before, after = old[1].get(place), new[1].get(place)
        if before != after:
            kinds = (before or "nothing", after or "nothing")
            return f"state{place} was {kinds[0]} and is {kinds[1]}"
    return None if old[0] == new[0] else f"{old[0]} and then {new[0]}"


def _check_emits(transform: Transform, example: Example, most: int = 300) -> None:
    """Require that a transform that holds emits every name sooner or later."""
    missing = set(example.updates[0])
    state = transform.init(example.params)
    for _ in range(most):
        for updates, context in example.steps:
            out, state = transform.update(
                updates, state, example.params, context=context
            )
            missing -= out.keys()
        if not missing:
            return
    what = f"update never returned {sorted(missing)} in {most} rounds"
    refuse(what, _DROPPED)


def _check_device(transform: Transform, example: Example) -> None:
    """Require that nothing is made on the CPU for parameters elsewhere.

    The meta device stands for any other. A host read fails there, too: that is the
    business of the law `vmapped`.
    """

    def moved(tensors: TensorMap) -> TensorMap:
        return {name: x.to("meta") for name, x in tensors.items()}

    params = moved(example.params)
    first = [moved(updates) for updates in example.updates[:1]]
    away = dataclasses.replace(example, params=params, updates=first)
    try:
        for out, _ in run(transform, away):
            for name, u in out.items():
                where = f"of parameters on {params[name].device}, on {u.device}"
                what = f"the update of {name!r} lies, {where}"
                require(u.device == params[name].device, what, _DEVICE)
    except (RuntimeError, NotImplementedError) as error:
        if "on cpu" in str(error) or "on device cpu" in str(error):
            what = f"on another device than the CPU: {str(error).splitlines()[0]}"
            refuse(what, _DEVICE)


_AS_ZERO = (
    "a missing update was taken for zero. Loop over the updates, not over the "
    "parameters, and keep the entries of the other names: {**state.field, **new}"
)

_NOT_A_HOLD = (
    "an empty map means hold: an accumulation window is open. Return {} and the state "
    "as it was"
)


@law(hint="a lookup, such as updates[name], for every parameter; loop over the updates")
def omitted_names(transform: Transform, example: Example) -> None:
    """A name without an update keeps its state, and gets no update."""
    start = transform.init(example.params)
    used = [state for _, state in run(transform, example)][-1]
    # An open window still holds what a name got before, and passes it on.
    befores = (start,) if has_static(start) else (start, used)
    for missing, before in itertools.product(example.params, befores):
        now = before
        for updates, context in example.steps:
            rest = {name: u for name, u in updates.items() if name != missing}
            if not rest:  # That is a hold.
                continue
            out, now = transform.update(rest, now, example.params, context=context)
            what = f"{missing!r} got an update without a gradient"
            require(missing not in out, what, _AS_ZERO)
        new = dict(tensors(now))
        for place, old in tensors(before):
            if place.endswith(f"[{missing!r}]"):
                kept = place in new and same_bits(old, new[place])
                require(kept, f"state{place} changed without a gradient", _AS_ZERO)


@law(
    omit=False, hint="an operation that needs at least one tensor, such as torch.stack"
)
def hold(transform: Transform, example: Example) -> None:
    """An empty map in is an empty map out, and the state stays."""
    results = zip(run(transform, example), example.steps, strict=True)
    for (_, state), (_, context) in results:
        out, after = transform.update({}, state, example.params, context=context)
        require(out == {}, f"an empty map gave updates for {list(out)}", _NOT_A_HOLD)
        gap = difference(after, state)
        require(not gap, f"an empty map changed state{gap}", _NOT_A_HOLD)

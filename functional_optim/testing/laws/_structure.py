"""Check the structure of updates and states, whatever their numbers are."""

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
from functional_optim.testing._compare import (
    leaves,
    map_nodes,
    nodes,
    same_bits,
    tensors,
)
from functional_optim.testing._examples import Example, map_tensors
from functional_optim.testing._law import (
    ViolationError,
    law,
    require,
    require_equal,
    run,
)

_KINDS = "a state is (), or a NamedTuple of tensors and dicts of tensors by name"
_KEYS = "dicts in a state are keyed by parameter names; use a NamedTuple"
_NUMBER = (
    "is a constant for torch.compile, which makes a new graph whenever it changes, and "
    "vmap refuses it. Make it a tensor: torch.zeros((), dtype=torch.float64, "
    "device=...), or Static(...) if the *structure* of results depends on it"
)
_EXTRA = "the result has a name for every parameter: take the names of the updates"
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
_AS_ZERO = (
    "a missing update was taken for zero. Loop over the updates, not over the "
    "parameters, and keep the entries of the other names: {**state.field, **new}"
)
_NOT_A_HOLD = (
    "an empty map means hold: an accumulation window is open. Return {} and the state "
    "as it was"
)


@law(omit=False, wide=True, hint="an operation that a dtype, shape or device refuses")
def structure(transform: Transform, example: Example) -> None:
    """Names, shapes, dtypes and devices stay, of updates and of the state."""
    params = example.params
    start = transform.init(params)
    _check_state("init", start, params)
    may_hold = has_static(start)
    known: set[str] = set()
    for (updates, _), (out, new) in zip(
        example.steps, run(transform, example), strict=True
    ):
        # A transform that can hold may emit the names of earlier steps.
        known = known | updates.keys() if may_hold else set(updates)
        extra = [name for name in out if name not in known]
        what = f"update returned names that it was not given: {extra}"
        require(not extra, what, _EXTRA)
        missing = [name for name in updates if name not in out]
        what = f"update dropped {missing} of {list(updates)}"
        require(may_hold or not missing, what, _DROPPED)
        what = f"update returned the names in another order: {list(out)}"
        ordered = list(out) == [name for name in params if name in out]
        require(ordered, what, "build the result in the order of the updates")
        for name, u in out.items():
            _check_update(name, u, params[name], transform)
        _check_state("update", new, params)
        _check_form(start, new)
    if may_hold:
        _check_emits(transform, example)
    _check_device(transform, example)


def _check_update(name: str, u: Any, param: Tensor, transform: Transform) -> None:
    """Require the shape, the device and, unless declared, the dtype of a parameter."""
    what = f"the update of {name!r} is a {type(u).__name__}, not a tensor"
    require(isinstance(u, Tensor), what, "return torch.zeros_like(u) for no change")
    was, now = tuple(param.shape), tuple(u.shape)
    require(was == now, f"the update of {name!r} got shape {now} from {was}", _SHAPE)
    what = f"the update of {name!r} moved from {param.device} to {u.device}"
    require(u.device == param.device, what, _DEVICE)
    allowed = {param.dtype, *_declared_dtypes(transform)}
    if param.dtype in {torch.float16, torch.bfloat16}:
        allowed.add(torch.float32)  # Sums of 16-bit numbers are kept in 32 bits.
    what = f"the update of {name!r} got dtype {u.dtype} from {param.dtype}"
    require(u.dtype in allowed, what, _DTYPE)


def _declared_dtypes(transform: object) -> Iterator[torch.dtype]:
    """Yield the attributes `dtype` of a transform and of the transforms inside."""
    declared = getattr(transform, "dtype", None)
    if isinstance(declared, torch.dtype):
        yield declared
    for inner in children_of(transform).values():
        yield from _declared_dtypes(inner)


def _check_state(method: str, state: Any, params: TensorMap) -> None:
    """Require tensors, dicts by name, tuples and Static, and nothing else."""
    for place, node in nodes(state):
        at, kind = f"{method}: state{place}", type(node).__name__
        if isinstance(node, dict):
            unknown = [name for name in node if name not in params]
            what = f"{at} has keys that are no parameters: {unknown}"
            require(not unknown, what, _KEYS)
            for name, entry in node.items():
                what = f"{at}[{name!r}] is a {type(entry).__name__}, not a tensor"
                require(isinstance(entry, Tensor), what, _KINDS)
        elif isinstance(node, (bool, int, float)):
            raise ViolationError(f"{at} is a {kind}", f"a Python {kind} {_NUMBER}")
        else:
            require(isinstance(node, (Tensor, Static)), f"{at} is a {kind}", _KINDS)


def has_static(state: Any) -> bool:
    """Whether a state has a `Static` value, so that the transform can hold."""
    return any(isinstance(node, Static) for _, node in nodes(state))


def _check_form(old: Any, new: Any) -> None:
    """Require that two states differ in numbers and `Static` values only."""
    bare = [map_nodes(_without_value, state) for state in (old, new)]
    before, after = (
        {at: (tuple(x.shape), x.dtype, x.device.type) for at, x in leaves(state)}
        for state in bare
    )
    for place in before | after:
        was, now = before.get(place, "nothing"), after.get(place, "nothing")
        what = f"the state changes its form: state{place} was {was} and is {now}"
        require(was == now, what, _STABLE)
    forms = [_pytree.tree_structure(state) for state in bare]
    what = f"the state changes its form: {forms[0]} and then {forms[1]}"
    require(forms[0] == forms[1], what, _STABLE)


def _without_value(node: Any) -> Any:
    return Static(None) if isinstance(node, Static) else node


def _check_emits(transform: Transform, example: Example) -> None:
    """Require that a transform that holds emits every name within 300 rounds."""
    missing = set(example.updates[0])
    rounds = dataclasses.replace(example, updates=[*example.updates] * 300)
    for out, _ in run(transform, rounds):
        missing -= out.keys()
        if not missing:
            return
    what = f"update never returned {sorted(missing)} in 300 rounds"
    raise ViolationError(what, _DROPPED)


def _check_device(transform: Transform, example: Example) -> None:
    """Require that nothing is made on the CPU for parameters on the meta device.

    A host read fails there, too: that is the business of the law `vmapped`.
    """
    first = dataclasses.replace(example, updates=example.updates[:1])
    away = map_tensors(lambda x: x.to("meta"), first)
    try:
        for out, _ in run(transform, away):
            for name, u in out.items():
                devices = u.device, away.params[name].device
                what = f"the update of {name!r} is on {devices[0]}, its parameter on "
                require(devices[0] == devices[1], f"{what}{devices[1]}", _DEVICE)
    except (RuntimeError, NotImplementedError) as error:
        if "on cpu" in str(error) or "on device cpu" in str(error):
            what = f"on another device than the CPU: {str(error).splitlines()[0]}"
            raise ViolationError(what, _DEVICE) from None


@law(hint="a lookup, such as updates[name], for every parameter; loop over the updates")
def omitted_names(transform: Transform, example: Example) -> None:
    """A name without an update keeps its state, and gets no update."""
    start = transform.init(example.params)
    *_, (_, used) = run(transform, example)
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
        require_equal("an empty map changed state", after, state, _NOT_A_HOLD)

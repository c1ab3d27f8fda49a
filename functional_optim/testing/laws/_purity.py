"""Purity and determinism: what is read and written besides arguments and results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from functional_optim.core._transform import Transform
from functional_optim.testing._compare import (
    difference,
    same_bits,
    storages,
    tensors,
)
from functional_optim.testing._examples import Example
from functional_optim.testing._law import HIDDEN, law, require

_IN_PLACE = (
    "an operation in place (x.mul_, x += ..., out=, x[...] = ..., .data, .grad) on a "
    "tensor that was given. Make a new tensor: x.mul(2), x + y, torch.where"
)
_ALIAS = (
    "a given tensor, or a view of it (view, reshape, x[...], .data, detach), was "
    "returned as it is. A caller that changes one changes both: return a new tensor, "
    "x.clone() if the numbers stay"
)
_SHARED = (
    "one tensor stands both in the updates and in the state. Whoever changes an update "
    "in place changes the memory of the transform: return x.clone() as the update"
)


@law(omit=False, hint="an operation in place on a tensor that does not allow it")
def purity(transform: Transform, example: Example) -> None:
    """Inputs keep every bit, and outputs share no memory with them."""
    params = example.params
    state = _watched("init", lambda: transform.init(params), params=params)
    _share("init put a tensor that it was given into the state", state, params=params)
    for updates, context in example.steps:
        call = _bound(transform, updates, state, params, context)
        out, new = _watched("update", call, updates=updates, state=state, params=params)
        _share(
            "update returned a tensor that it was given",
            out,
            updates=updates,
            params=params,
            state=state,
        )
        _share(
            "update put a tensor that it was given into the state",
            new,
            updates=updates,
            params=params,
        )
        shared = storages(out) & storages(new)
        place = next((at for at, x in tensors(out) if storages(x) & shared), "")
        require(not shared, f"updates{place} and the new state share memory", _SHARED)
        state = new


def _bound(transform: Transform, *arguments: Any) -> Callable[[], Any]:
    *given, context = arguments
    return lambda: transform.update(*given, context=context)


def _watched(what: str, call: Callable[[], Any], **inputs: Any) -> Any:
    """Call, and require that no input changed: no bit, no version, no name."""
    before = {
        name: [
            (at, x, x.clone(), x._version, x.requires_grad) for at, x in tensors(tree)
        ]
        for name, tree in inputs.items()
    }
    around = torch.is_grad_enabled(), torch.get_default_dtype()
    result = call()
    now = torch.is_grad_enabled(), torch.get_default_dtype()
    torch.set_grad_enabled(around[0])
    torch.set_default_dtype(around[1])
    cause = "a global switch of torch was set and not set back: use a with statement"
    require(now == around, f"{what} changed grad mode or the default dtype", cause)
    for name, tree in inputs.items():
        after = dict(tensors(tree))
        places = [place for place, *_ in before[name]]
        cause = "a given dict was changed: build a new one, {**updates, name: x}"
        require(places == list(after), f"{what} changed the names of its {name}", cause)
        for place, x, old, version, needs_grad in before[name]:
            wrote = f"{what} wrote to {name}{place} in place"
            require(after[place] is x, f"{what} replaced {name}{place}", cause)
            require(same_bits(old, x) and x._version == version, wrote, _IN_PLACE)
            changed = f"{what} changed requires_grad or .grad of {name}{place}"
            require(
                x.requires_grad == needs_grad and x.grad is None, changed, _IN_PLACE
            )
    return result


def _share(what: str, result: Any, **inputs: Any) -> None:
    """Require that a result shares no memory with inputs."""
    made = storages(result)
    for name, tree in inputs.items():
        for place, x in tensors(tree):
            require(not storages(x) & made, f"{what}: {name}{place}", _ALIAS)


@law(omit=False, hint="memory outside of the state that the second call found changed")
def determinism(transform: Transform, example: Example) -> None:
    """The same inputs give the same bits, also when calls are repeated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20_011)  # A state that nobody would seed by chance.
        before = torch.get_rng_state()
        _calls_agree(transform, example)
        drew = not torch.equal(before, torch.get_rng_state())
    require(not drew, "torch's global random numbers were drawn or seeded", HIDDEN)


def _calls_agree(transform: Transform, example: Example) -> None:
    state = transform.init(example.params)
    gap = difference(state, transform.init(example.params))
    require(not gap, f"two calls of init differ: state{gap}", HIDDEN)
    for step, (updates, context) in enumerate(example.steps):
        call = _bound(transform, updates, state, example.params, context)
        first, again = call(), call()
        gap = difference(first[0], again[0])
        require(not gap, f"step {step}, two calls differ: updates{gap}", HIDDEN)
        gap = difference(first[1], again[1])
        require(not gap, f"step {step}, two calls differ: state{gap}", HIDDEN)
        state = first[1]


def run(transform: Transform, example: Example) -> Iterator[tuple[Any, Any]]:
    """Yield the output and the new state of every step."""
    state = transform.init(example.params)
    for updates, context in example.steps:
        out, state = transform.update(updates, state, example.params, context=context)
        yield out, state

"""Check what a transform reads and writes besides its arguments and results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from functional_optim.core._transform import Transform
from functional_optim.testing._compare import same_bits, storages, tensors
from functional_optim.testing._examples import Example
from functional_optim.testing._law import HIDDEN, law, require, require_equal

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
    "one tensor is both in the updates and in the state. Whoever changes an update "
    "in place changes the memory of the transform: return x.clone() as the update"
)
_SWITCH = "a global switch of torch was set and not set back: use a with statement"
_DICT = "a given dict was changed: build a new one, {**updates, name: x}"


@law(omit=False, hint="an operation in place on a tensor that does not allow it")
def purity(transform: Transform, example: Example) -> None:
    """Inputs keep every bit, and outputs share no memory with them."""
    params = example.params
    inputs = {"params": params}
    state = _watched("init", lambda: transform.init(params), inputs)
    _share_nothing("init put a tensor that it was given into the state", state, inputs)
    for updates, context in example.steps:
        inputs = {"updates": updates, "params": params}
        call = functools.partial(
            transform.update, updates, state, params, context=context
        )
        out, new = _watched("update", call, {**inputs, "state": state})
        what = "update returned a tensor that it was given"
        _share_nothing(what, out, {**inputs, "state": state})
        what = "update put a tensor that it was given into the state"
        _share_nothing(what, new, inputs)
        shared = storages(out) & storages(new)
        place = next((at for at, x in tensors(out) if storages(x) & shared), "")
        require(not shared, f"updates{place} and the new state share memory", _SHARED)
        state = new


def _watched(method: str, call: Callable[[], Any], inputs: dict[str, Any]) -> Any:
    """Call a method, and require that its inputs keep their bits and names."""
    before = {
        name: [
            (place, x, x.clone(), x._version, x.requires_grad)
            for place, x in tensors(tree)
        ]
        for name, tree in inputs.items()
    }
    switches = torch.is_grad_enabled(), torch.get_default_dtype()
    result = call()
    now = torch.is_grad_enabled(), torch.get_default_dtype()
    torch.set_grad_enabled(switches[0])
    torch.set_default_dtype(switches[1])
    what = f"{method} changed grad mode or the default dtype"
    require(now == switches, what, _SWITCH)
    for name, tree in inputs.items():
        after = dict(tensors(tree))
        places = [place for place, *_ in before[name]]
        what = f"{method} changed the names of its {name}"
        require(places == list(after), what, _DICT)
        for place, x, old, version, needs_grad in before[name]:
            at = f"{name}{place}"
            require(after[place] is x, f"{method} replaced {at}", _DICT)
            kept = same_bits(old, x) and x._version == version
            require(kept, f"{method} wrote to {at} in place", _IN_PLACE)
            kept = x.requires_grad == needs_grad and x.grad is None
            what = f"{method} changed requires_grad or .grad of {at}"
            require(kept, what, _IN_PLACE)
    return result


def _share_nothing(what: str, result: Any, inputs: dict[str, Any]) -> None:
    """Require that a result shares no memory with inputs."""
    memory = storages(result)
    for name, tree in inputs.items():
        for place, x in tensors(tree):
            require(not storages(x) & memory, f"{what}: {name}{place}", _ALIAS)


@law(omit=False, hint="memory outside of the state that the second call found changed")
def determinism(transform: Transform, example: Example) -> None:
    """The same inputs give the same bits, also when calls are repeated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20_011)  # Hardly a seed that a transform uses.
        before = torch.get_rng_state()
        params = example.params
        state = transform.init(params)
        what = "two calls of init differ: state"
        require_equal(what, state, transform.init(params), HIDDEN)
        for step, (updates, context) in enumerate(example.steps):
            out, new = transform.update(updates, state, params, context=context)
            again = transform.update(updates, state, params, context=context)
            what = f"step {step}, two calls differ"
            require_equal(f"{what}: updates", out, again[0], HIDDEN)
            require_equal(f"{what}: state", new, again[1], HIDDEN)
            state = new
        drew = not torch.equal(before, torch.get_rng_state())
    require(not drew, "torch's global random numbers were drawn or seeded", HIDDEN)

"""In place is pure: in single and half precision, whatever lies where in memory.

In float64 it is a law, `laws.in_place`, tried on every transform by test_laws.py.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from chains import in_place_chains
from hypothesis import event, given
from hypothesis import strategies as st

import functional_optim as fo
from functional_optim.core._context import reduce_locally
from functional_optim.execution import _units
from functional_optim.execution._executor import Executor
from functional_optim.execution._units import ExecutionOptions
from functional_optim.testing import Example, strategies
from functional_optim.testing._compare import largest_gap, same_bits
from functional_optim.testing._examples import SHAPES, fixed_examples

PARAMS = fixed_examples(None)[0].params
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _executor(
    transform: fo.Transform, params: fo.TensorMap, state: Any, elements: int
) -> Executor:
    itemsize = max(p.dtype.itemsize for p in params.values())
    groups = dict.fromkeys(params, 0)
    size = elements * itemsize
    options = ExecutionOptions(unit_bytes=size)
    return Executor(params, [transform], groups, state, options=options)


def _copied(state: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, state)


@given(
    transform=in_place_chains(list(SHAPES)),
    example=strategies.examples(PARAMS, elements=strategies.finite),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    elements=st.sampled_from([1, 3, 1000]),
    scratch=st.sampled_from([0, 40, 10_000]),
)
def test_one_step_from_the_same_state(
    transform: fo.Chain,
    example: Example,
    dtypes: list[torch.dtype],
    elements: int,
    scratch: int,
) -> None:
    """All bits agree without totals; with them 2 ulp of max(|p|, |p'|, |u|)."""
    kinds = dict(zip(SHAPES, dtypes, strict=True))
    params = {name: p.to(kinds[name]) for name, p in example.params.items()}
    state = transform.init(params)
    for updates, context in example.steps:
        grads = {name: u.to(kinds[name]) for name, u in updates.items()}
        own = {name: p.clone() for name, p in params.items()}
        # Units that gather share one piece of memory when this is used up.
        with mock.patch.object(_units, "SCRATCH_BYTES", scratch):
            executor = _executor(transform, own, _copied(state), elements)
        executor.step({n: g.clone() for n, g in grads.items()}, context=context)
        totals = []

        def reducer(path: Any, partial: Any, op: Any, totals: Any = totals) -> Any:
            totals.append(path)
            return reduce_locally(partial, op)

        moved, state = transform.update(
            grads, state, params, context=fo.Context(reducer=reducer)
        )
        new = fo.apply_updates(params, moved)
        event(f"totals: {bool(totals)}")
        for name, p in new.items():
            if not totals:
                assert same_bits(own[name], p), (name, own[name], p)
            else:
                # A norm of pieces is rounded at most once more than that of the whole.
                gap, at = largest_gap(own[name], p, params[name])
                assert gap <= 2, (name, at, gap)
        params = new


def _laid_out(draw: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the same numbers that lies in memory in some way."""
    kinds = ["contiguous", "transposed", "apart", "part"]
    kind = draw(st.sampled_from(kinds)) if tensor.ndim else "contiguous"
    if kind == "transposed":
        # A new one: contiguous() would return a vector itself, and share its memory.
        turned = tensor.transpose(0, -1).clone(memory_format=torch.contiguous_format)
        return turned.transpose(0, -1)
    if kind == "apart":  # Every second element of larger memory.
        memory = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7.0)
        memory[..., ::2] = tensor
        return memory[..., ::2]
    if kind == "part":  # A view into the middle of larger memory.
        memory = tensor.new_full((tensor.numel() + 10,), 7.0)
        inside = memory[5:-5].view(tensor.shape)
        return inside.copy_(tensor)
    return tensor.clone()


@given(
    data=st.data(),
    transform=in_place_chains(list(SHAPES)),
    example=strategies.examples(PARAMS, elements=strategies.finite),
    elements=st.sampled_from([1, 3, 1000]),
)
def test_wherever_tensors_lie(
    data: st.DataObject, transform: fo.Chain, example: Example, elements: int
) -> None:
    """Strides change no number; what lies around parameters and gradients stays."""
    plain = {name: p.clone() for name, p in example.params.items()}
    laid = {name: _laid_out(data.draw, p) for name, p in plain.items()}
    first = _executor(transform, plain, transform.init(plain), elements)
    second = _executor(transform, laid, transform.init(laid), elements)
    for updates, context in example.steps:
        grads = {name: _laid_out(data.draw, u) for name, u in updates.items()}
        around = [x.untyped_storage().tolist() for x in grads.values()]
        first.step({n: u.clone() for n, u in updates.items()}, context=context)
        second.step(grads, context=context)
        assert [x.untyped_storage().tolist() for x in grads.values()] == around
        for name, p in plain.items():
            # Only the order of sums may differ.
            torch.testing.assert_close(
                laid[name],
                p,
                rtol=1e-12,
                atol=1e-12 * float(p.abs().max()) if p.numel() else 0.0,
                equal_nan=True,
            )
    for name, p in laid.items():
        memory = p.new_empty(0).set_(p.untyped_storage())
        strided = memory.new_full(memory.shape, 7.0).as_strided(
            p.shape, p.stride(), p.storage_offset()
        )
        base = strided.new_empty(0).set_(strided.untyped_storage())
        strided.copy_(p)
        assert same_bits(base, memory), f"{name}: written beside the parameter"

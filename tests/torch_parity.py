"""Presets beside torch.optim: the option combinations, and the two comparisons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import functional_optim as fo
from functional_optim import transforms

Options = dict[str, Any]


def _combinations(**choices: list[Any]) -> list[Options]:
    return [
        dict(zip(choices, values, strict=True))
        for values in itertools.product(*choices.values())
    ]


SGD = [
    options
    for options in _combinations(
        momentum=[0.0, 0.9],
        dampening=[0.0, 0.3],
        weight_decay=[0.0, 0.1],
        nesterov=[False, True],
        maximize=[False, True],
    )
    if not options["nesterov"] or (options["momentum"] and not options["dampening"])
]
ADAM = _combinations(
    weight_decay=[0.0, 0.1],
    amsgrad=[False, True],
    maximize=[False, True],
    decoupled_weight_decay=[False, True],
)
ADAMW = _combinations(
    weight_decay=[0.0, 0.1], amsgrad=[False, True], maximize=[False, True]
)
Pair = tuple[Callable[..., fo.Chain], Callable[..., torch.optim.Optimizer], Options]
PAIRS: list[Pair] = [
    *((fo.sgd, torch.optim.SGD, options) for options in SGD),
    *((fo.adam, torch.optim.Adam, options) for options in ADAM),
    *((fo.adamw, torch.optim.AdamW, options) for options in ADAMW),
]


def _torch_optimizer(
    reference: Callable[..., torch.optim.Optimizer],
    params: fo.TensorMap,
    **options: Any,
) -> tuple[torch.optim.Optimizer, fo.TensorMap]:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    return reference(leaves.values(), foreach=False, **options), leaves


def _torch_step(
    optimizer: torch.optim.Optimizer, leaves: fo.TensorMap, grads: fo.TensorMap
) -> None:
    for name, leaf in leaves.items():
        leaf.grad = grads[name].clone() if name in grads else None
    optimizer.step()


def agree_in_float64(
    pair: Pair, params: fo.TensorMap, grads: Sequence[fo.TensorMap], lr: Any
) -> None:
    """Assert that all steps agree to 1e-12 of the largest number on the way."""
    preset, reference, options = pair
    optimizer, leaves = _torch_optimizer(reference, params, lr=lr, **options)
    pipeline = preset(lr=lr, **options)
    state, ours = pipeline.init(params), params
    # Rounding errors are relative to the largest number on the way, not to the last.
    scale = {name: p.abs().max() for name, p in params.items()}
    for step in grads:
        _torch_step(optimizer, leaves, step)
        updates, state = pipeline.update(step, state, ours)
        ours = fo.apply_updates(ours, updates)
        for name, leaf in leaves.items():
            theirs = leaf.detach()
            scale[name] = torch.maximum(scale[name], theirs.abs().max())
            error = (ours[name] - theirs).abs().max()
            assert error <= 1e-12 * scale[name], f"{name}: {error / scale[name]}"


def _state_like(state: Any, optimizer: torch.optim.Optimizer, names: list[str]) -> Any:
    """Return our state with the numbers of torch's."""
    theirs = dict(zip(names, optimizer.param_groups[0]["params"], strict=True))

    def field(old: fo.TensorMap, key: str) -> fo.TensorMap:
        entries = {name: optimizer.state[p].get(key) for name, p in theirs.items()}
        return {
            name: old[name] if x is None else x.clone().to(old[name].dtype)
            for name, x in entries.items()
        }

    def converted(part: Any) -> Any:
        if isinstance(part, transforms.ScaleByAdamState):
            kept = {key: field(getattr(part, key), key) for key in part._fields[:3]}
            if part.max_exp_avg_sq:
                kept["max_exp_avg_sq"] = field(part.max_exp_avg_sq, "max_exp_avg_sq")
            return part._replace(**kept)
        if isinstance(part, transforms.TraceState):
            buffers = field(part.momentum_buffer, "momentum_buffer")
            started = {
                name: torch.tensor("momentum_buffer" in optimizer.state[p])
                for name, p in theirs.items()
            }
            return part._replace(
                momentum_buffer=buffers, started=started if part.started else ()
            )
        return part

    return tuple(converted(part) for part in state)


def agree_in_float32(
    pair: Pair, params: fo.TensorMap, grads: Sequence[fo.TensorMap], lr: float
) -> None:
    """Assert that a step from torch's state is within 2 ulp of max(|p|, |p'|, |u|)."""
    preset, reference, options = pair
    # A subnormal moment has fewer bits than its quotient: m / (1 - b1^t) here and lr /
    # (1 - b1^t) * m there are each off by up to 2^-150 before eps divides them. With
    # lr <= 1 that is 1.4e-37 in all, less than 2 ulp of any number above 6e-31.
    underflow = 0.0 if preset is fo.sgd else 2.0**-149 / 1e-8
    optimizer, leaves = _torch_optimizer(reference, params, lr=lr, **options)
    pipeline = preset(lr=lr, **options)
    for step in grads[:-1]:
        _torch_step(optimizer, leaves, step)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    state = _state_like(pipeline.init(before), optimizer, list(before))
    _torch_step(optimizer, leaves, grads[-1])
    updates, _ = pipeline.update(grads[-1], state, before)
    ours = fo.apply_updates(before, updates)
    for name, leaf in leaves.items():
        theirs = leaf.detach()
        u = updates.get(name, torch.zeros_like(theirs))
        largest = torch.stack([before[name].abs(), theirs.abs(), u.abs()]).amax(0)
        ulp = torch.nextafter(largest, torch.full_like(largest, math.inf)) - largest
        finite = theirs.isfinite()
        off = (ours[name] - theirs).abs()[finite]
        most = (2 * ulp.double() + underflow)[finite]
        assert (off <= most).all(), f"{name}: {(off / ulp[finite]).max()} ulp"
        assert torch.equal(ours[name].isfinite(), finite)

"""Small training runs, the same for every optimizer."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from law_examples import numbers

SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (3, 4),
    "a.bias": (3,),
    "b.weight": (2, 3),
    "scale": (),
}


def parameters(
    dtype: torch.dtype = torch.float64,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> dict[str, torch.nn.Parameter]:
    """Return fresh parameters by name, always the same numbers."""
    made = numbers(shapes or SHAPES, 99)
    return {name: torch.nn.Parameter(p.to(dtype)) for name, p in made.items()}


def set_gradients(
    params: dict[str, torch.nn.Parameter], step: int, *, scale: float = 1.0
) -> None:
    """Give every parameter the gradient of a step, whichever others there are."""
    for name, param in params.items():
        seed = zlib.crc32(f"{name} {step}".encode())
        grad = numbers({name: tuple(param.shape)}, seed)[name]
        param.grad = (scale * grad).to(param.dtype)


def train(
    optimizer: torch.optim.Optimizer,
    params: dict[str, torch.nn.Parameter],
    steps: Iterable[int],
) -> None:
    """Take some steps."""
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def values(params: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return copies of the parameters."""
    return {name: param.detach().clone() for name, param in params.items()}


def everything(
    optimizer: torch.optim.Optimizer, params: dict[str, torch.nn.Parameter]
) -> dict[str, Any]:
    """Return a copy of all that a step changes: parameters and state, by name."""
    return {
        "params": values(params),
        "state": {
            name: {key: entry.clone() for key, entry in optimizer.state[param].items()}
            for name, param in params.items()
            if param in optimizer.state
        },
    }

"""Fixed examples for the contract tests, in float64, where formula errors show."""

from __future__ import annotations

import torch

import functional_optim as fo
from functional_optim.testing import Example

SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (3, 4),
    "a.bias": (3,),
    "b.weight": (2, 3, 2),
    "scale": (),
    "empty": (0, 5),
}


def numbers(shapes: dict[str, tuple[int, ...]], seed: int) -> fo.TensorMap:
    """Return tensors of normally distributed numbers away from zero."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        made[name] = x + 0.05 * torch.where(x < 0, -1.0, 1.0)
    return made


def example(
    seed: int = 0, contexts: tuple[fo.Context, ...] = (), *, full: bool = False
) -> Example:
    """Return parameters and four updates; some lack some names unless `full`."""
    params = numbers(SHAPES, 1000 + seed)
    made = []
    for index in range(4):
        updates = numbers(SHAPES, 10 * seed + index)
        if not full and index == 1:
            del updates["a.bias"]
        if not full and index == 2:
            updates = {"b.weight": updates["b.weight"], "scale": updates["scale"]}
        made.append(updates)
    return Example(params, made, contexts)

"""Compare the global norm of many numbers with the same in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from parameter_shapes import gpt2_shapes, tensors
from suite_contestants import CHAINS, MAX_NORM, our_variants
from suite_device import DEVICE
from torch import Tensor
from torch.nn import Parameter

import functional_optim as fo

SHAPE = gpt2_shapes()[0]
"""GPT-2's embedding: 38.6 M numbers in one tensor."""


def norms(gradient: Tensor) -> dict[str, float]:
    """Return the norm of a gradient, as everyone computes it to clip."""
    found: dict[str, float] = {}
    param = Parameter(torch.zeros_like(gradient))
    for name, foreach in {"torch foreach": True, "torch for-loop": False}.items():
        param.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(param, MAX_NORM, foreach=foreach)
        found[name] = norm.item()
    for name, options in our_variants().items():
        param = Parameter(torch.zeros_like(gradient))
        optimizer = fo.TransformOptimizer(
            [param], CHAINS["adamw"].transform(), **options
        )
        param.grad = gradient.clone()
        optimizer.step()
        found[name] = fo.fetch(optimizer.readings())["norm"]
    return found


def results() -> Iterable[dict[str, Any]]:
    """Measure normal numbers."""
    (gradient,) = tensors([SHAPE], 0.01, 1)
    exact = gradient.double().norm().item()
    yield {
        "title": "Norm of normal numbers in float32",
        "elements": gradient.numel(),
        "float64": exact,
        "rows": [
            {"name": name, "norm": norm, "relative_error": norm / exact - 1}
            for name, norm in norms(gradient.to(DEVICE)).items()
        ],
    }

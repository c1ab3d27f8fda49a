"""Measure what a step allocates beyond parameters, gradients and state."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from interleaved_timing import Step
from suite_contestants import CHAINS, Contestant, Gradients, parameters, updates
from suite_device import MIB, extra_bytes, kept_bytes
from suite_rows import Row
from suite_step import MODELS

MOMENTS = 2
"""Tensors like the parameters that AdamW's state consists of."""


def measure(model: str) -> dict[str, Any]:
    """Measure one contestant after the other."""
    shapes = MODELS[model].shapes()
    gradients = Gradients(shapes, torch.float32)
    rows: list[Row] = []
    size = 4 * sum(gradients.sizes)
    for name, update in updates().items():
        params = parameters(shapes, torch.float32)
        gradients.backward(params, 0)
        made: list[Step] = []

        def build(
            update: Any = update, params: Any = params, made: list[Step] = made
        ) -> None:
            made.append(update(CHAINS["adamw"], params))
            made[0]()

        kept = kept_bytes(build) - MOMENTS * size
        contestant = Contestant(params, gradients, made[0])
        contestant.turn()
        contestant.prepare()
        extra = extra_bytes(contestant.update)
        rows.append(
            {
                "name": name,
                "extra_mib": extra / MIB,
                "extra_percent": 100 * extra / size,
                "held_mib": kept / MIB,
                "held_percent": 100 * kept / size,
            }
        )
        del params, made, contestant
        gc.collect()
    title = MODELS[model].title
    return {"model": model, "title": title, "mib": size / MIB, "rows": rows}


def results(models: list[str]) -> Iterable[dict[str, Any]]:
    """Measure model by model."""
    yield from (measure(model) for model in MODELS if model in models)

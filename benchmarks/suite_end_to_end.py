"""Time whole training steps of real models: zero_grad, forward, backward, step.

Who makes no step at all shows how fast it can get, whatever the optimizer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from interleaved_timing import Step, in_turns
from parameter_shapes import gpt2_shapes, resnet50_shapes
from suite_agreement import checked
from suite_contestants import CHAINS, FOREACH, FREE, FUSED, updates
from suite_device import DEVICE, timed
from suite_models import GPT2, Deep, ResNet50, deep_batch, image_batch, token_batch
from suite_rows import rows_of
from torch import Tensor

TOLERANCE = 1e-2
"""After one turn, as a part of the way: Adam turns rounding into steps where gradients
are about eps."""
WARM_UP = 3


class Model(NamedTuple):
    """What is trained.

    Attributes:
        title: What tables call it.
        make: Builds it.
        batch: Makes what it is trained on.
        elements: How many parameters it must have, None if whatever it has is right.
    """

    title: str
    make: Callable[[], Any]
    batch: Callable[[], Tensor]
    elements: int | None = None


def _count(shapes: list[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


MODELS = {
    "small": Model("500 x Linear(32, 32), batch 8", Deep, deep_batch),
    "resnet50": Model(
        "ResNet-50, batch 2 x 3 x 64 x 64",
        ResNet50,
        image_batch,
        _count(resnet50_shapes()),
    ),
    "gpt2": Model("GPT-2 124M, 64 tokens", GPT2, token_batch, _count(gpt2_shapes())),
}


class Training:
    """A model that takes whole steps.

    Args:
        model: What to train.
        make_update: Makes what moves its parameters; None if nobody does.
    """

    def __init__(self, model: Model, make_update: Callable[..., Step] | None) -> None:
        torch.manual_seed(3)
        self._model = model.make().to(DEVICE)
        self._batch = model.batch().to(DEVICE)
        self.params: list[Tensor] = list(self._model.parameters())
        elements = sum(param.numel() for param in self.params)
        if model.elements not in (None, elements):
            msg = f"{model.title} has {elements} elements, not {model.elements}"
            raise RuntimeError(msg)
        self._update = make_update and make_update(CHAINS["adamw"], self.params)

    def step(self) -> None:
        """Take a whole step."""
        self._model.zero_grad(set_to_none=True)
        self._model.loss(self._batch).backward()
        if self._update is not None:
            self._update()

    def turn(self) -> float:
        """Take a whole step and return its milliseconds."""
        return timed(self.step)


def trainings(model: Model) -> dict[str, Training]:
    """Return all who take part."""
    found = {
        name: Training(model, update)
        for name, update in updates().items()
        if name != FOREACH
    }
    return {**found, FREE: Training(model, None)}


def measure(model: Model, rounds: int) -> dict[str, Any]:
    """Check and time the training of a model."""
    found = trainings(model)
    start = [param.detach().clone() for param in found[FREE].params]
    differences = checked(found, start, TOLERANCE, turns=1)
    del start
    in_turns(found, WARM_UP, Training.turn)
    times = in_turns(found, rounds, Training.turn)
    params = found[FREE].params
    return {
        "title": model.title,
        "tensors": len(params),
        "elements": sum(param.numel() for param in params),
        "tolerance": TOLERANCE,
        "apart": differences,
        "rows": rows_of(times, FUSED, FREE),
    }


def results(models: list[str], rounds: int) -> Iterable[dict[str, Any]]:
    """Measure model by model."""
    for name, model in MODELS.items():
        if name in models:
            yield {"model": name, **measure(model, rounds)}
            gc.collect()

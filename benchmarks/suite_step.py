"""Time one step on gradients that a backward has just made.

Where several micro-steps make one update all of them are timed together, backwards
included, and what the backwards take alone is a contestant, too.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from interleaved_timing import in_turns
from parameter_shapes import (
    Shapes,
    gpt2_shapes,
    resnet50_shapes,
    small_shapes,
    vit_shapes,
)
from suite_agreement import checked
from suite_contestants import (
    CHAINS,
    FREE,
    FUSED,
    PURE,
    TORCHOPT,
    Chain,
    Contestant,
    Gradients,
    parameters,
    pure,
    torchopt,
    updates,
    values,
)
from suite_device import DEVICE, syncs, timed
from suite_rows import Row, rows_of
from suite_visitors import VISITORS, visitor_row

WARM_UP = 2
WORDS = 8
"""What clip and AdamW move at least for an element: they read the gradient twice, and
read and write the parameter and two moments, save that nobody writes the gradient."""
_LARGE = 2**26
_TRAFFIC = "a copy", "a product in place"
"""What memory is measured by. A copy counts as two words for an element, but the
processor may fetch what it is about to overwrite: then it moves three, and its rate is
too low for a floor. A product in place moves two, as a step does that writes what it
has just read."""


class Model(NamedTuple):
    """Parameters that are measured.

    Attributes:
        title: What tables call them.
        shapes: Returns their shapes.
        is_large: Whether who makes new tensors takes no part, for want of memory.
        visitors: Who takes part in a process of its own.
    """

    title: str
    shapes: Callable[[], Shapes]
    is_large: bool = False
    visitors: tuple[str, ...] = tuple(VISITORS)


_QUICK = tuple(name for name, visitor in VISITORS.items() if not visitor.is_slow)
MODELS = {
    "small": Model("1000 small", small_shapes),
    "resnet50": Model("ResNet-50", resnet50_shapes),
    "vit": Model("ViT-B/16", vit_shapes, visitors=_QUICK),
    "gpt2": Model("GPT-2 124M", gpt2_shapes, is_large=True, visitors=_QUICK),
}


class Case(NamedTuple):
    """What is measured: a chain on a model, and how far contestants may be apart.

    Attributes:
        chain: Key of the chain.
        model: Key of the model.
        dtype: The dtype of parameters and gradients.
        tolerance: RMS of the difference to torch fused after the checked turns, as a
            part of the RMS of the way from the start. AdamW does not see the norm,
            which torch gets wrong by 7.5e-4 over GPT-2; SGD does. The steps of 16-bit
            parameters are about as large as their rounding.
    """

    chain: str
    model: str
    dtype: torch.dtype = torch.float32
    tolerance: float = 2e-4

    @property
    def title(self) -> str:
        """What tables call it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{MODELS[self.model].title}, {CHAINS[self.chain].title}, {dtype}"

    @property
    def is_main(self) -> bool:
        """Whether all libraries take part."""
        return self.chain == "adamw" and self.dtype is torch.float32


CASES = [
    *(Case("adamw", model) for model in MODELS),
    *(Case("adamw", m, torch.bfloat16, 0.05) for m in ("small", "resnet50")),
    *(Case("sgd", model, tolerance=2e-3) for model in ("small", "resnet50")),
    *(Case("accumulate", model) for model in ("small", "resnet50")),
]


def contestants_of(case: Case) -> tuple[dict[str, Contestant], list[Row]]:
    """Return who takes part in this process, and rows that say why others do not."""
    chain, model = CHAINS[case.chain], MODELS[case.model]
    shapes, absent = model.shapes(), list[Row]()
    gradients = Gradients(shapes, case.dtype)
    found: dict[str, Contestant] = {}
    for name, update in updates().items():
        params = parameters(shapes, case.dtype)
        found[name] = Contestant(
            params,
            gradients,
            update(chain, params),
            micro_steps=chain.micro_steps,
            sums_in_grad=name.startswith("torch"),
        )
    if model.is_large:
        absent += [{"name": name, "note": "too much memory"} for name in (PURE,)]
        absent += [{"name": TORCHOPT, "note": "too much memory"}]
        return found, absent
    if chain.micro_steps == 1:
        found[PURE] = pure(chain, values(shapes, case.dtype), gradients)
    else:
        found[FREE] = _free(chain, shapes, gradients)
    if case.is_main:
        try:
            found[TORCHOPT] = torchopt(values(shapes, case.dtype), gradients)
        except ImportError as error:
            absent.append({"name": TORCHOPT, "note": str(error)})
    return found, absent


def _free(chain: Chain, shapes: Shapes, gradients: Gradients) -> Contestant:
    params = parameters(shapes, torch.float32)
    steps = chain.micro_steps
    return Contestant(params, gradients, lambda: None, micro_steps=steps)


def traffic() -> dict[str, Callable[[], float]]:
    """Return what times the reading and writing of a large tensor."""
    source = torch.ones(_LARGE, device=DEVICE)
    target = torch.zeros_like(source)
    steps = (lambda: target.copy_(source)), (lambda: target.mul_(1.0))
    return {
        name: functools.partial(timed, step)
        for name, step in zip(_TRAFFIC, steps, strict=True)
    }


def bandwidth(times: dict[str, list[float]], elements: int) -> list[dict[str, Any]]:
    """Return rates, the floors of clip and AdamW, and ratios to them by round."""
    found = []
    for name, moved in [(name, times.pop(name)) for name in _TRAFFIC]:
        floors = [ms * elements * WORDS / (2 * _LARGE) for ms in moved]
        ratios = {
            who: statistics.median(a / b for a, b in zip(values, floors, strict=True))
            for who, values in times.items()
            if who not in _TRAFFIC
        }
        found.append(
            {
                "by": name,
                "gb_per_s": 2 * 4 * _LARGE / statistics.median(moved) / 1e6,
                "words": WORDS,
                "floor_ms": statistics.median(floors),
                "step_over_floor": ratios,
            }
        )
    return found


def measure(case: Case, rounds: int, threads: int) -> dict[str, Any]:
    """Check and time one case."""
    contestants, others = contestants_of(case)
    shapes = MODELS[case.model].shapes()
    differences = checked(contestants, values(shapes, case.dtype), case.tolerance)
    turns = {name: contestant.turn for name, contestant in contestants.items()}
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    if has_floor := MODELS[case.model].is_large and case.is_main:
        turns.update(traffic())
    in_turns(turns, WARM_UP, lambda turn: turn())
    times = in_turns(turns, rounds, lambda turn: turn())
    found: dict[str, Any] = {
        "title": case.title,
        "chain": case.chain,
        "model": case.model,
        "is_main": case.is_main,
        "tensors": len(shapes),
        "elements": elements,
        "tolerance": case.tolerance,
        "apart": differences,
        "syncs": {name: _syncs(one) for name, one in contestants.items()},
    }
    if has_floor:
        found["bandwidth"] = bandwidth(times, elements)
    rows = rows_of(times, FUSED, FREE if FREE in times else None)
    del contestants, turns
    gc.collect()  # Before others, who need memory as well.
    if case.is_main:
        visitors = MODELS[case.model].visitors
        others += [visitor_row(name, shapes, rounds, threads) for name in visitors]
    return {**found, "rows": rows + others}


def _syncs(contestant: Contestant) -> int | None:
    contestant.prepare()
    return syncs(contestant.update)


def results(models: list[str], rounds: int, threads: int) -> Iterable[dict[str, Any]]:
    """Measure case by case."""
    one = functools.partial(measure, rounds=rounds, threads=threads)
    for case in CASES:
        if case.model in models:
            yield one(case)
            gc.collect()

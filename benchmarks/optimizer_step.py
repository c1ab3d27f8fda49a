"""Time one step in place: TransformOptimizer against torch.optim.AdamW.

    python benchmarks/optimizer_step.py [--rounds 30] [--cases gpt2 tiny]
        [--keep-heap] [--out benchmarks/results]

Clip by global norm, then AdamW, on the parameter shapes of ResNet-50, GPT-2 124M, 1000
small layers and a tiny MLP, in float32 on the CPU. Gradients are given, nothing else is
timed. Before anything is timed, all contestants take steps from the same parameters
with the same gradients and must agree. Contestants run interleaved, in random order
within a round. The tables show medians and quartiles, and the median over rounds of
(torch foreach / contestant): above 1 is faster than torch. "Extra" is what one step
allocates at its peak, "held" what building the optimizer and its first step allocate
for good: its state, and memory that it keeps. Page faults are those of one step: where
there are many, time depends on what else lies on the heap; see --keep-heap.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from allocations import allocations
from interleaved_timing import (
    Step,
    argument_parser,
    interleaved,
    keep_heap,
    page_faults,
    quartiles,
    ratio,
    settings,
    timed,
    write_json,
)
from parameter_shapes import (
    Shapes,
    gpt2_shapes,
    resnet50_shapes,
    small_shapes,
    tensors,
    tiny_shapes,
)
from torch.nn import Parameter

import functional_optim as fo

LR, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.999), 1e-8, 0.01, 1.0
CHECKED_STEPS = 3
TOLERANCE = 1e-3 * LR
"""How far parameters may be apart after the checked steps.

A step moves by about LR, so a wrong formula shows at once. Rounding of parameters below
0.3 is 3e-8. The rest is the norm: over GPT-2's tensors torch's float32 norm comes out
7.5e-4 (relative) too small. Adam does not see scale, save where the gradient is about
eps: d * LR / 4 per step for a relative difference d, here 6e-7 in three steps.
"""
MIB = 2**20

Make = Callable[..., Step]


def torch_step(params: list[Parameter], *, clip: bool, **options: bool) -> Step:
    """Return clip_grad_norm_, if asked for, followed by torch's AdamW."""
    optimizer = torch.optim.AdamW(
        params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **options
    )

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return clipped if clip else optimizer.step


def our_step(params: list[Parameter], *, clip: bool) -> Step:
    """Return the step of the same chain in place."""
    adamw = fo.adamw(LR, BETAS, EPS, WEIGHT_DECAY)
    transform = fo.chain(fo.ClipByGlobalNorm(MAX_NORM), adamw) if clip else adamw
    return fo.TransformOptimizer(params, transform).step


BASE, OURS = "torch foreach", "TransformOptimizer"
CONTESTANTS: dict[str, Make] = {
    BASE: functools.partial(torch_step, foreach=True),
    "torch fused": functools.partial(torch_step, fused=True),
    OURS: our_step,
}
FOR_LOOP: dict[str, Make] = {
    "torch for-loop": functools.partial(torch_step, foreach=False)
}


class Case(NamedTuple):
    """What is measured.

    Attributes:
        title: What tables call it.
        shapes: Returns the shapes of the parameters.
        clip: Whether gradients are clipped.
        contestants: Who takes part.
        repeats: Steps in a row that are timed as one.
    """

    title: str
    shapes: Callable[[], Shapes]
    clip: bool = True
    contestants: dict[str, Make] = CONTESTANTS
    repeats: int = 1


CASES = {
    "resnet50": Case("ResNet-50", resnet50_shapes),
    "gpt2": Case("GPT-2 124M", gpt2_shapes),
    "small": Case("1000 small", small_shapes),
    "tiny": Case("MLP of 3 layers", tiny_shapes, repeats=20),
    "tiny-unclipped": Case(
        "MLP of 3 layers, AdamW alone",
        tiny_shapes,
        clip=False,
        contestants={**CONTESTANTS, **FOR_LOOP},
        repeats=20,
    ),
}


class Contestant(NamedTuple):
    """Someone who is ready to step.

    Attributes:
        params: Parameters with gradients, of its own.
        step: Updates them.
        kept: Bytes that building it and its first step allocated for good.
    """

    params: list[Parameter]
    step: Step
    kept: int


def new_gradients(params: list[Parameter], seed: int) -> None:
    """Fill the gradients; clipping has written into them."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        assert param.grad is not None
        param.grad.normal_(0.0, 0.01, generator=generator)


def contestant(make: Make, shapes: Shapes, *, clip: bool) -> Contestant:
    """Build a contestant and let it take its first steps, the same for everyone."""
    params = [Parameter(p) for p in tensors(shapes, 0.05, 0)]
    for param in params:
        param.grad = torch.empty_like(param)
    new_gradients(params, 1)

    made: list[Step] = []

    def first() -> None:
        made.append(make(params, clip=clip))
        made[0]()

    kept = allocations(first).kept
    for seed in range(2, CHECKED_STEPS + 1):
        new_gradients(params, seed)
        made[0]()
    return Contestant(params, made[0], kept)


def apart(some: list[Parameter], others: list[Parameter]) -> float:
    """Return the largest difference between parameters."""
    with torch.no_grad():
        return max(
            (a - b).abs().max().item() for a, b in zip(some, others, strict=True)
        )


def check_agreement(contestants: dict[str, Contestant]) -> dict[str, float]:
    """Return how far each is from torch's foreach.

    Raises:
        RuntimeError: one of them did something else.
    """
    base = contestants[BASE].params
    found = {name: apart(one.params, base) for name, one in contestants.items()}
    for name, difference in found.items():
        if not difference <= TOLERANCE:
            msg = (
                f"{name} is {difference:.1e} away from {BASE} after {CHECKED_STEPS} "
                f"steps; at most {TOLERANCE:.1e} is rounding"
            )
            raise RuntimeError(msg)
    return found


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Check, time and count one case."""
    shapes = case.shapes()
    contestants = {
        name: contestant(make, shapes, clip=case.clip)
        for name, make in case.contestants.items()
    }
    differences = check_agreement(contestants)
    steps = {name: one.step for name, one in contestants.items()}
    times = interleaved(steps, rounds, functools.partial(timed, repeats=case.repeats))
    faults = interleaved(steps, 3, page_faults)
    rows = [
        {
            "name": name,
            **quartiles(values),
            "torch_over_this": ratio(times[BASE], values),
            "extra_mib": allocations(steps[name]).peak / MIB,
            "held_mib": contestants[name].kept / MIB,
            "page_faults": statistics.median(faults[name]),
            "apart": differences[name],
        }
        for name, values in times.items()
    ]
    return {
        "title": case.title,
        "tensors": len(shapes),
        "elements": sum(torch.Size(shape).numel() for shape in shapes),
        "clip": case.clip,
        "steps_timed_as_one": case.repeats,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Return a result as Markdown."""
    fast = max(row["ms"] for row in result["rows"]) < 10.0
    unit, scale = ("us", 1e3) if fast else ("ms", 1.0)
    size = f"{result['tensors']} tensors, {result['elements']:,} elements"
    lines = [
        f"**{result['title']}**: {size}",
        "",
        f"| | {unit} | quartiles | {BASE} / this | extra MiB | held MiB | faults |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {scale * row['ms']:.1f} "
        f"| {scale * row['q25']:.1f} - {scale * row['q75']:.1f} "
        f"| {row['torch_over_this']:.2f} "
        f"| {row['extra_mib']:.2f} | {row['held_mib']:.2f} "
        f"| {row['page_faults']:.0f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, and write them as JSON if asked to."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--keep-heap", action="store_true", help="give no freed memory back (glibc)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep_heap:
        keep_heap()
    results = settings(options.rounds)
    results["keep_heap"] = options.keep_heap
    results["checked_steps"], results["tolerance"] = CHECKED_STEPS, TOLERANCE
    cases: dict[str, Any] = {}
    for name in options.cases:
        cases[name] = measure(CASES[name], options.rounds)
        gc.collect()  # GPT-2 takes 2 GB for each contestant.
        print(f"\n{table(cases[name])}", flush=True)
    results["cases"] = cases
    suffix = "_kept_heap" if options.keep_heap else ""
    write_json(results, options.out, f"optimizer_step{suffix}")


if __name__ == "__main__":
    main()

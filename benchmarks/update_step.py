"""Time one optimizer step: the pure pipeline against torch.optim and TorchOpt.

    python benchmarks/update_step.py [--rounds 30] [--out benchmarks/results]

Clip by global norm, then AdamW, on the parameter shapes of ResNet-50 and on 1000 small
parameters. Candidates run interleaved, round by round, in one process; the table shows
medians, quartiles, and ratios to `clip_grad_norm_` + `AdamW(foreach=True)` in the same
rounds. Gradients are given, nothing else is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import functional_optim as fo

Step = Callable[[], object]
LR, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.999), 1e-8, 0.01, 1.0


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Return the parameter shapes of torchvision's ResNet-50, in order."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in (
                (width, inputs, 1, 1),
                (width, width, 3, 3),
                (4 * width, width, 1, 1),
            ):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                downsample = (4 * width, inputs, 1, 1)
                shapes += [downsample, downsample[:1], downsample[:1]]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def small_shapes() -> list[tuple[int, ...]]:
    """Return 1000 small parameters, 0.5 M elements: 500 layers Linear(31, 32)."""
    return [(32, 31), (32,)] * 500


def tensors(shapes: list[tuple[int, ...]], scale: float, seed: int) -> list[Tensor]:
    """Return random tensors of the given shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]


def torch_step(shapes: list[tuple[int, ...]], implementation: str) -> Step:
    """Return clip_grad_norm_ followed by torch's AdamW."""
    params = [p.requires_grad_() for p in tensors(shapes, 0.05, 0)]
    grads = tensors(shapes, 0.01, 1)
    options = {implementation: True}
    optimizer = torch.optim.AdamW(
        params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **options
    )

    def step() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def pure_step(shapes: list[tuple[int, ...]]) -> Step:
    """Return this library's pure update and apply_updates."""
    params = {f"p{i}": p for i, p in enumerate(tensors(shapes, 0.05, 0))}
    grads = {f"p{i}": g for i, g in enumerate(tensors(shapes, 0.01, 1))}
    pipeline = fo.chain(
        fo.ClipByGlobalNorm(MAX_NORM),
        fo.adamw(LR, BETAS, EPS, WEIGHT_DECAY),
    )
    state = pipeline.init(params)

    def step() -> None:
        nonlocal params, state
        updates, state = pipeline.update(grads, state, params)
        params = fo.apply_updates(params, updates)

    return step


def torchopt_step(shapes: list[tuple[int, ...]]) -> Step | None:
    """Return TorchOpt's functional AdamW, after its functional clip."""
    try:
        import torchopt  # noqa: PLC0415 - an optional competitor
    except ImportError:
        return None
    params = tuple(tensors(shapes, 0.05, 0))
    grads = tuple(tensors(shapes, 0.01, 1))
    optimizer = torchopt.chain(
        torchopt.clip.clip_grad_norm(MAX_NORM),
        torchopt.adamw(LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY),
    )
    state = optimizer.init(params)

    def step() -> None:
        nonlocal params, state
        with torch.no_grad():
            updates, state = optimizer.update(
                grads, state, params=params, inplace=False
            )
            params = torchopt.apply_updates(params, updates, inplace=False)

    return step


CANDIDATES: dict[str, Callable[[list[tuple[int, ...]]], Step | None]] = {
    "torch foreach": functools.partial(torch_step, implementation="foreach"),
    "torch fused": functools.partial(torch_step, implementation="fused"),
    "functional_optim pure": pure_step,
    "TorchOpt functional": torchopt_step,
}
MODELS = {"ResNet-50": resnet50_shapes, "1000 small": small_shapes}


def timed(step: Step) -> float:
    """Return the milliseconds one step takes."""
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def measure(shapes: list[tuple[int, ...]], rounds: int) -> dict[str, list[float]]:
    """Run all candidates in turns and return their times by round."""
    made = {name: make(shapes) for name, make in CANDIDATES.items()}
    steps = {name: step for name, step in made.items() if step is not None}
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(rounds):
        # In random order: nobody always inherits the same cache.
        for name in random.Random(index).sample(names, len(names)):
            times[name].append(timed(steps[name]))
    return times


def summary(times: dict[str, list[float]]) -> list[dict[str, object]]:
    """Return medians, quartiles, and the median ratio to torch foreach by round."""
    base = times["torch foreach"]
    rows = []
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        rows.append(
            {"name": name, "ms": middle, "q25": low, "q75": high, "ratio": ratio}
        )
    return rows


def main() -> None:
    """Measure, print the tables, and write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, object] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "rounds": options.rounds,
    }
    for model, shapes in MODELS.items():
        rows = summary(measure(shapes(), options.rounds))
        results[model] = rows
        print(f"\n{model}: {len(shapes())} tensors; ratio = time / torch foreach")
        print(f"{'':24}{'ms':>9}{'[q25':>9}{'q75]':>9}{'ratio':>8}")
        for row in rows:
            print(
                f"{row['name']:24}{row['ms']:9.2f}{row['q25']:9.2f}{row['q75']:9.2f}"
                f"{row['ratio']:8.2f}"
            )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "update_step.json"
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()

"""Time one optimizer step: the pure pipeline against torch.optim and TorchOpt.

    python benchmarks/update_step.py [--rounds 30] [--out benchmarks/results]

Clip by global norm, then AdamW, on the parameter shapes of ResNet-50 and on 1000 small
parameters. Candidates run interleaved, round by round, in one process; the table shows
medians, quartiles, and ratios to `clip_grad_norm_` + `AdamW(foreach=True)` in the same
rounds. Gradients are given, nothing else is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from interleaved_timing import (
    Step,
    argument_parser,
    interleaved,
    quartiles,
    ratio,
    settings,
    write_json,
)
from parameter_shapes import Shapes, resnet50_shapes, small_shapes, tensors

import functional_optim as fo

LR, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.999), 1e-8, 0.01, 1.0


def torch_step(shapes: Shapes, implementation: str) -> Step:
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


def pure_step(shapes: Shapes) -> Step:
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


def torchopt_step(shapes: Shapes) -> Step | None:
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


CANDIDATES: dict[str, Callable[[Shapes], Step | None]] = {
    "torch foreach": functools.partial(torch_step, implementation="foreach"),
    "torch fused": functools.partial(torch_step, implementation="fused"),
    "functional_optim pure": pure_step,
    "TorchOpt functional": torchopt_step,
}
MODELS = {"ResNet-50": resnet50_shapes, "1000 small": small_shapes}


def measure(shapes: Shapes, rounds: int) -> dict[str, list[float]]:
    """Run all candidates in turns and return their times by round."""
    made = {name: make(shapes) for name, make in CANDIDATES.items()}
    steps = {name: step for name, step in made.items() if step is not None}
    for step in steps.values():
        for _ in range(3):
            step()
    return interleaved(steps, rounds)


def summary(times: dict[str, list[float]]) -> list[dict[str, object]]:
    """Return medians, quartiles, and the median ratio to torch foreach by round."""
    base = times["torch foreach"]
    return [
        {"name": name, **quartiles(values), "ratio": ratio(values, base)}
        for name, values in times.items()
    ]


def main() -> None:
    """Measure, print the tables, and write them as JSON if asked to."""
    options = argument_parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    results = settings(options.rounds)
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
    write_json(results, options.out, "update_step")


if __name__ == "__main__":
    main()

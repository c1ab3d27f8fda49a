"""Time steps of this package against another revision of it.

    python benchmarks/step_speed.py --before REV [--processes 7] [--rounds 60]
        [--only pure-resnet50 eager-small] [--out benchmarks/results]

For each case some fresh processes import three packages: before, after, and after again
under another name. Their steps are timed in turns, round by round in random order; who
is made first alternates between processes. A process gives the ratio of the medians of
milliseconds (before / after), above 1 is faster than before, and that of the minima.
The result is the median over processes, with the smallest and the largest. Beside it
stands (again / after) from the same rounds: what the method takes for a difference
between the same code and itself.

Cases, all clip by global norm and AdamW in float32 on the CPU, gradients given:

- "pure-...": `update` and `apply_updates`;
- "eager-...", "compiled-...": the step of `TransformOptimizer`;
- "wrapper": `update_params` of an `OptimWrapper` over torch's AdamW, on a net of six
  parameters, forward and backward included;
- "compiled-small-fused": `clip_grad_norm_` and torch's fused AdamW stand for "before".

By default with one thread: where others use the cores, too, two threads that wait for
each other say little. "After" are the files beside this script, exported like the other
revision, so that all are read from files made in the same way.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from interleaved_timing import (
    Step,
    argument_parser,
    interleaved,
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
from revisions import BEFORE, WORKING_TREE, export, imported, resolved
from torch import nn
from torch.nn import Parameter

AFTER, AGAIN = "functional_optim_after", "functional_optim_again"
FUSED = "torch fused"
MAX_NORM = 1.0
WARM_STEPS = 4
SHAPES: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50_shapes,
    "small": small_shapes,
    "tiny": tiny_shapes,
    "gpt2": gpt2_shapes,
}


def chain(package: Any) -> Any:
    """Return AdamW behind a clip."""
    adamw = package.adamw(1e-3, weight_decay=0.01)
    return package.chain(package.ClipByGlobalNorm(MAX_NORM), adamw)


def pure_step(package: Any, shapes: Shapes) -> Step:
    """Return an update with its `apply_updates`."""
    params = {f"p{i}": p for i, p in enumerate(tensors(shapes, 0.05, 0))}
    grads = {f"p{i}": g for i, g in enumerate(tensors(shapes, 0.01, 1))}
    pipeline = chain(package)
    state = pipeline.init(params)

    def step() -> None:
        nonlocal params, state
        updates, state = pipeline.update(grads, state, params)
        params = package.apply_updates(params, updates)

    return step


def with_gradients(shapes: Shapes) -> list[Parameter]:
    """Return parameters that have gradients."""
    params = [Parameter(p) for p in tensors(shapes, 0.05, 0)]
    for param, grad in zip(params, tensors(shapes, 0.01, 1), strict=True):
        param.grad = grad
    return params


def optimizer_step(package: Any, shapes: Shapes, *, compiled: bool) -> Step:
    """Return the step of an optimizer; without a package, of torch's fused AdamW."""
    params = with_gradients(shapes)
    if package is None:
        return fused_step(params)
    optimizer = package.TransformOptimizer(params, chain(package), compile=compiled)
    step: Step = optimizer.step
    return step


def fused_step(params: list[Parameter]) -> Step:
    """Return a clip and a step by torch's fused AdamW."""
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01, fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def wrapper_step(package: Any, shapes: Shapes) -> Step:
    """Return forward and `update_params` of an MLP that has these parameters."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for outputs, inputs in (shape for shape in shapes if len(shape) == 2):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapper = package.OptimWrapper(optimizer, clip_grad={"max_norm": MAX_NORM})
    x = torch.ones(1, shapes[0][1])
    return lambda: wrapper.update_params(model(x).sum())


class Case(NamedTuple):
    """What is timed.

    Attributes:
        make: Makes the step of a package.
        shapes: A key of `SHAPES`.
        repeats: Steps in a row that are timed as one.
        before: Who is before, if not the other revision.
    """

    make: Callable[..., Step]
    shapes: str
    repeats: int = 1
    before: str = BEFORE


EAGER = functools.partial(optimizer_step, compiled=False)
COMPILED = functools.partial(optimizer_step, compiled=True)
CASES = {
    "pure-tiny": Case(pure_step, "tiny", 20),
    "pure-small": Case(pure_step, "small"),
    "pure-resnet50": Case(pure_step, "resnet50"),
    "eager-tiny": Case(EAGER, "tiny", 20),
    "eager-small": Case(EAGER, "small", 2),
    "eager-resnet50": Case(EAGER, "resnet50"),
    "compiled-tiny": Case(COMPILED, "tiny", 20),
    "compiled-small": Case(COMPILED, "small", 5),
    "compiled-resnet50": Case(COMPILED, "resnet50"),
    "wrapper": Case(wrapper_step, "tiny", 20),
    "compiled-small-fused": Case(COMPILED, "small", 5, FUSED),
    "eager-gpt2": Case(EAGER, "gpt2"),
    "compiled-gpt2": Case(COMPILED, "gpt2"),
}
DEFAULT = [name for name in CASES if not name.endswith("gpt2")]


# -- one process -----------------------------------------------------------------------


def timed_here(
    case: Case, folder: pathlib.Path, names: list[str], rounds: int
) -> dict[str, list[float]]:
    """Make the steps in the order of the names, and time them in turns."""
    steps: dict[str, Step] = {}
    shapes = SHAPES[case.shapes]()
    for name in names:
        package = None if name == FUSED else imported(folder, name)
        steps[name] = case.make(package, shapes)
        for _ in range(WARM_STEPS):
            steps[name]()
    return interleaved(steps, rounds, functools.partial(timed, repeats=case.repeats))


# -- all processes ---------------------------------------------------------------------


def from_process(
    name: str, names: list[str], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Time all in a fresh process, made in this order; return times by round."""
    command = [sys.executable, __file__, "--before", options.before, "--here", name]
    command += ["--folder", str(options.folder), "--names", *names]
    command += ["--rounds", str(options.rounds), "--threads", str(options.threads)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    times: dict[str, list[float]] = json.loads(found.stdout)
    return times


def compared(above: str, processes: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Return the ratios (above / after) over all processes."""
    pairs = [(times[above], times[AFTER]) for times in processes]
    medians = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    minima = [min(a) / min(b) for a, b in pairs]
    return {
        "ratio": statistics.median(medians),
        "least": min(medians),
        "most": max(medians),
        "ratio_of_minima": statistics.median(minima),
        "by_process": medians,
    }


def timed_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time a case in all processes."""
    case = CASES[name]
    contestants = (case.before, AFTER, AGAIN)
    orders = itertools.cycle(itertools.permutations(contestants))
    processes = [
        from_process(name, [*next(orders)], options) for _ in range(options.processes)
    ]
    return {
        **compared(case.before, processes),
        "same_code": compared(AGAIN, processes),
        "steps_timed_as_one": case.repeats,
        "median_ms": {
            who: statistics.median(statistics.median(t[who]) for t in processes)
            for who in contestants
        },
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time all cases and print a row for each."""
    head = f"{'before / after':22}{'ratio':>7}{'[least':>8}{'most]':>7}{'minima':>8}"
    print(f"{head}{'| same':>9}{'[least':>8}{'most]':>7}{'minima':>8}{'ms now':>9}")
    found: dict[str, Any] = {}
    for name in options.only:
        found[name] = row = timed_case(name, options)
        texts = [
            f"{r['ratio']:7.3f}{r['least']:8.3f}{r['most']:7.3f}"
            f"{r['ratio_of_minima']:8.3f}"
            for r in (row, row["same_code"])
        ]
        now = f"{row['median_ms'][AFTER]:9.3f}"
        print(f"{name:22}{texts[0]}{'|':>2}{texts[1]}{now}", flush=True)
    return found


def main() -> None:
    """Export, measure, print the table, and write it as JSON if asked to."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.set_defaults(rounds=60, threads=1)
    parser.add_argument("--before", required=True, metavar="REV")
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=CASES, default=DEFAULT)
    for hidden in ("--here", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here is not None:
        torch.set_num_threads(options.threads)
        folder = pathlib.Path(options.folder)
        case = CASES[options.here]
        times = timed_here(case, folder, options.names, options.rounds)
        print(json.dumps(times))
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = pathlib.Path(folder)
        export(options.before, options.folder, BEFORE)
        for name in (AFTER, AGAIN):
            export(WORKING_TREE, options.folder, name)
        cases = measure(options)
    seconds = time.perf_counter() - start
    results = {
        **settings(options.rounds),
        "threads": options.threads,
        "cpus": os.cpu_count(),
        "processes": options.processes,
        "before": resolved(options.before),
        "after": resolved(WORKING_TREE),
        "seconds": seconds,
        "cases": cases,
    }
    write_json(results, options.out, "step_speed")
    print(f"\n{seconds:.0f} s in all")


if __name__ == "__main__":
    main()

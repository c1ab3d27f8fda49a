"""Time the first step with compile=True, and count what is compiled after it.

Each figure is of a process of its own:

    python benchmarks/suite_first_step.py first MODEL OPTIONS THREADS
    python benchmarks/suite_first_step.py schedule MODEL OPTIONS THREADS

prints what it found as JSON.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import torch
from parameter_shapes import resnet50_shapes, small_shapes
from suite_contestants import (
    CHAINS,
    LR,
    VARIANTS,
    Gradients,
    our_variants,
    parameters,
)
from suite_device import timed

import functional_optim as fo

MODELS = {"small": small_shapes, "resnet50": resnet50_shapes}
SCHEDULED_STEPS = 1000


def counting_compilations() -> list[int]:
    """Return a list that grows by the size of each graph that is compiled."""
    compile_fx: Any = importlib.import_module("torch._inductor.compile_fx")
    found: list[int] = []
    real = compile_fx.compile_fx_inner

    @functools.wraps(real)
    def counted(module: Any, *args: Any, **options: Any) -> Any:
        found.append(len(module.graph.nodes))
        return real(module, *args, **options)

    compile_fx.compile_fx_inner = counted
    return found


def first(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Time building the optimizer with its first step, and its second step."""
    gradients = Gradients(MODELS[model](), torch.float32)
    params = parameters(MODELS[model](), torch.float32)
    gradients.backward(params, 0)
    start = time.perf_counter()
    optimizer = fo.TransformOptimizer(params, CHAINS["adamw"].transform(), **options)
    optimizer.step()
    first_s = time.perf_counter() - start
    gradients.backward(params, 1)
    return {"first_s": first_s, "second_ms": timed(optimizer.step)}


def schedule(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Count what is compiled in the first step and while the rate falls to 0."""
    compiled = counting_compilations()
    gradients = Gradients(MODELS[model](), torch.float32)
    params = parameters(MODELS[model](), torch.float32)
    optimizer = fo.TransformOptimizer(params, CHAINS["adamw"].transform(), **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / (SCHEDULED_STEPS - 1)
    )
    counts: list[int] = []
    rates: list[float] = []
    for turn in range(SCHEDULED_STEPS):
        gradients.backward(params, turn)
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
        counts.append(len(compiled))
    if rates[0] != LR or rates[-1] != 0 or len({*rates}) != SCHEDULED_STEPS:
        msg = f"the rate went from {rates[0]} to {rates[-1]}, not to 0"
        raise RuntimeError(msg)
    return {
        "steps": SCHEDULED_STEPS,
        "last_rate": rates[-1],
        "compiled_in_first": counts[0],
        "compiled_after": counts[-1] - counts[0],
    }


def in_child(
    what: str, model: str, variant: str, threads: int, cache: str
) -> dict[str, Any]:
    """Run a function of this module in a fresh process.

    Raises:
        CalledProcessError: it failed; what it said is printed.
    """
    command = [sys.executable, __file__, what, model]
    command += [json.dumps(VARIANTS[variant]), str(threads)]
    done = subprocess.run(
        command,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(model: str, variant: str, threads: int) -> dict[str, Any]:
    """Measure a variant on a model, with an empty cache and with that cache warm."""
    found: dict[str, Any] = {"model": model, "variant": variant}
    with tempfile.TemporaryDirectory() as folder:
        cache = str(pathlib.Path(folder) / "cache")
        for state in ("empty", "warm"):
            found[state] = in_child("first", model, variant, threads, cache)
        if "compile" in VARIANTS[variant] and model == "small":
            found["schedule"] = in_child("schedule", model, variant, threads, cache)
    return found


def results(models: list[str], threads: int) -> Iterable[dict[str, Any]]:
    """Measure model by model."""
    for model in MODELS:
        for variant in our_variants():
            if model in models:
                yield measure(model, variant, threads)


def main(what: str, model: str, options: str, threads: str) -> None:
    """Measure in this process."""
    torch.set_num_threads(int(threads))
    function = {"first": first, "schedule": schedule}[what]
    print(json.dumps(function(model, json.loads(options))))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Count what runs in one step: files of the package entered, and calls of functions.

    python benchmarks/step_calls.py [--root PATH] [--out benchmarks/results]

All on the six parameters of an MLP, 32-64-64-10, in float32 on the CPU; counted is the
third step, by `sys.setprofile`, in the main thread. Only functions in files of the
package count, comprehensions too where Python has a frame for each. The set-ups:

- "eager": `TransformOptimizer(named, chain(ClipByGlobalNorm(1.0), adamw()))`, `step()`
  with gradients in place. Presets have no clip of their own.
- "compiled": the same with `compile=True`, after the steps that make code.
- "pure": the same chain, `update` and `apply_updates`.
- "wrapper": `OptimWrapper(torch.optim.AdamW(...), clip_grad=dict(max_norm=1.0))`,
  `update_params(loss)`, with the backward and `zero_grad` in it.

With `--root` the package in that folder is counted, in a process of its own.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from interleaved_timing import write_json
from parameter_shapes import tensors, tiny_shapes
from torch import Tensor, nn
from torch.nn import Parameter

import functional_optim as fo

PACKAGE = pathlib.Path(str(fo.__file__)).resolve().parent
COUNTED = 3
MAX_NORM = 1.0


class SetUp(NamedTuple):
    """What is counted.

    Attributes:
        step: The step.
        prepare: What runs before each, and is not counted.
    """

    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def chain() -> Any:
    """Return clip, then AdamW."""
    return fo.chain(fo.ClipByGlobalNorm(MAX_NORM), fo.adamw())


def optimizer(*, compiled: bool) -> SetUp:
    """Return the step of an optimizer over parameters with gradients."""
    params = {f"p{i}": Parameter(p) for i, p in enumerate(tensors(tiny_shapes(), 1, 0))}
    for param, grad in zip(params.values(), tensors(tiny_shapes(), 1, 1), strict=True):
        param.grad = grad
    made = fo.TransformOptimizer(params.items(), chain(), compile=compiled)
    return SetUp(made.step)


def pure() -> SetUp:
    """Return an update with its `apply_updates`."""
    params = {f"p{i}": p for i, p in enumerate(tensors(tiny_shapes(), 1, 0))}
    grads = {f"p{i}": g for i, g in enumerate(tensors(tiny_shapes(), 1, 1))}
    pipeline = chain()
    state = pipeline.init(params)

    def step() -> None:
        nonlocal params, state
        updates, state = pipeline.update(grads, state, params)
        params = fo.apply_updates(params, updates)

    return SetUp(step)


def wrapper() -> SetUp:
    """Return an `update_params`; the forward is not counted."""
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    theirs = torch.optim.AdamW(model.parameters())
    made = fo.OptimWrapper(theirs, clip_grad={"max_norm": MAX_NORM})
    losses: list[Tensor] = []
    return SetUp(
        lambda: made.update_params(losses.pop()),
        lambda: losses.append(model(torch.ones(1, 32)).sum()),
    )


SET_UPS: dict[str, Callable[[], SetUp]] = {
    "eager": functools.partial(optimizer, compiled=False),
    "compiled": functools.partial(optimizer, compiled=True),
    "pure": pure,
    "wrapper": wrapper,
}


def counted(set_up: SetUp) -> collections.Counter[str]:
    """Return the calls of the third step by file of the package."""
    for _ in range(COUNTED - 1):
        set_up.prepare()
        set_up.step()
    set_up.prepare()
    calls: collections.Counter[str] = collections.Counter()

    def note(frame: Any, event: str, argument: object) -> None:
        if event == "call":
            calls[frame.f_code.co_filename] += 1

    sys.setprofile(note)
    try:
        set_up.step()
    finally:
        sys.setprofile(None)
    return collections.Counter(
        {
            str(path.relative_to(PACKAGE)): count
            for path, count in ((pathlib.Path(n), c) for n, c in calls.items())
            if path.is_relative_to(PACKAGE)
        }
    )


def measured(names: list[str]) -> dict[str, Any]:
    """Return files, calls, and calls by file for each set-up."""
    found: dict[str, Any] = {}
    for name in names:
        by_file = counted(SET_UPS[name]())
        files = dict(sorted(by_file.items(), key=lambda item: (-item[1], item[0])))
        found[name] = {
            "files": len(files),
            "calls": sum(files.values()),
            "by_file": files,
        }
    return found


def elsewhere(root: pathlib.Path, options: argparse.Namespace) -> int:
    """Count the package of another folder, in a process of its own."""
    command = [sys.executable, __file__, "--only", *options.only]
    command += ["--revision", options.revision or revision(root)]
    if options.out:
        command += ["--out", str(options.out)]
    environment = {**os.environ, "PYTHONPATH": str(root.resolve())}
    return subprocess.run(command, env=environment, check=False).returncode


def revision(root: pathlib.Path) -> str:
    """Return which commit changed the package last, an empty text if none is known."""
    command = ["git", "rev-list", "-1", "HEAD", "--", PACKAGE.name]
    found = subprocess.run(command, cwd=root, capture_output=True, check=False)
    return found.stdout.decode().strip()


def main() -> int:
    """Count, print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path, help="folder with another package")
    parser.add_argument("--only", nargs="+", choices=SET_UPS, default=list(SET_UPS))
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON result")
    parser.add_argument("--revision", default="", help="what the result is called")
    options = parser.parse_args()
    if options.root is not None:
        return elsewhere(options.root, options)
    found = measured(options.only)
    print(f"{PACKAGE}\n\n{'':12}{'files':>7}{'calls':>7}")
    for name, result in found.items():
        print(f"{name:12}{result['files']:7}{result['calls']:7}")
    results = {
        "revision": options.revision or revision(PACKAGE.parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "step": COUNTED,
        "set_ups": found,
    }
    write_json(results, options.out, "step_calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time what an optimizer wrapper costs on top of the loop it stands for.

    python benchmarks/wrapper_overhead.py [--rounds 200] [--out benchmarks/results]

Overhead: `update_params` on a model of four small parameters, against backward, clip,
step and zero_grad written out. All build the same loss anew, round by round in random
order; the table shows medians, and the median over rounds of (contestant - loop).

Groups: one step of torch's optimizers over the 465 parameters of a ResNet-152 (58 M
elements; and 4 channels wide, 0.3 M), with weight decay on weights alone, in a group
for each parameter, as rules by name make them, and in the two groups that have
different settings. All take turns on the same parameters, gradients and state: in
tensors of their own two equal contestants differ by 2 %, as their places in memory do.

MMEngine's wrapper takes part where it is installed (`make test-hosts` installs it).
Before anything is timed, all contestants take some steps, and must have the same
weights afterwards, bit for bit.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import statistics
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from interleaved_timing import (
    Step,
    argument_parser,
    interleaved,
    quartiles,
    ratio,
    settings,
    timed,
    write_json,
)
from parameter_shapes import Shapes, resnet152_shapes, tensors
from torch import nn
from torch.nn import Parameter

import functional_optim as fo
from functional_optim.integrations import mmengine as integration
from functional_optim.optim_wrapper._message_hub import MessageHub

MAX_NORM = 1.0
CHECKED_STEPS = 5
REPEATS = 20
"""Steps in a row that are timed as one; those of groups are long enough alone."""

Contestants: TypeAlias = dict[str, tuple[list[Parameter], Step]]

LOOP, OURS, THEIRS = "loop", "OptimWrapper", "MMEngine's"
OURS_THERE = "OptimWrapper in MMEngine"


def mmengine() -> Any:
    """Return MMEngine's optim module, None if it is not installed."""
    if importlib.util.find_spec("mmengine") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Names of torch that are about to go.
        return importlib.import_module("mmengine.optim")


def mmengine_version() -> str | None:
    """Return MMEngine's version, None if it is not installed."""
    if mmengine() is None:
        return None
    version: str = importlib.import_module("mmengine").__version__
    return version


# -- overhead --------------------------------------------------------------------------


def loop_step(optimizer: torch.optim.Optimizer, *, clip: bool) -> Callable[..., None]:
    """Return the loop, written out."""
    params = optimizer.param_groups[0]["params"]

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return update


def wrapped_step(
    optimizer: torch.optim.Optimizer, *, clip: bool, kind: Any, hub: Any = None
) -> Callable[..., None]:
    """Return a wrapper's `update_params`."""
    wrapper = kind(optimizer, clip_grad={"max_norm": MAX_NORM} if clip else None)
    if hub is not None:  # Under a name of its own: MMEngine's has a history, too.
        wrapper.message_hub, wrapper.grad_name = hub, "grad_norm_of_ours"
    update: Callable[..., None] = wrapper.update_params
    return update


def overhead_contestants(*, clip: bool) -> Contestants:
    """Return all who update the tiny model."""
    makers: dict[str, Callable[..., Any]] = {
        LOOP: loop_step,
        OURS: functools.partial(wrapped_step, kind=fo.OptimWrapper),
    }
    if optim := mmengine():
        makers[THEIRS] = functools.partial(wrapped_step, kind=optim.OptimWrapper)
        if clip:  # Only the norm goes to its message hub.
            connected = {"host": integration.CurrentHub()}
            hub: Any = type("ConnectedHub", (MessageHub,), connected)()
            makers[OURS_THERE] = functools.partial(
                wrapped_step, kind=fo.OptimWrapper, hub=hub
            )
    found: Contestants = {}
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for name, make in makers.items():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        params = list(model.parameters())
        optimizer = torch.optim.SGD(params, lr=0.01, momentum=0.9)
        update = make(optimizer, clip=clip)

        def step(model: nn.Module = model, update: Any = update) -> None:
            update(model(x).square().mean())

        found[name] = params, step
    return found


# -- groups ----------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-3),
}
MERGED, UNMERGED, FEW = "merged in the step", "merge_groups=False", "two groups"
THEIRS_MANY = f"{THEIRS}, a group each"


def group_contestants(
    optimizer: str, shapes: Shapes, *, is_shared: bool
) -> Contestants:
    """Return all who step the same parameters in groups of their own making.

    Args:
        optimizer: Its name.
        shapes: The parameters' shapes.
        is_shared: Whether all have the same parameters, gradients and state.
    """
    makers: dict[str, tuple[Callable[..., Any], bool]] = {
        MERGED: (fo.OptimWrapper, True),
        FEW: (fo.OptimWrapper, False),
        UNMERGED: (functools.partial(fo.OptimWrapper, merge_groups=False), True),
    }
    if optim := mmengine():
        makers[THEIRS_MANY] = optim.OptimWrapper, True
    found: Contestants = {}
    params, state = parameters(shapes), None
    for name, (wrapper, has_many) in makers.items():
        params = params if is_shared else parameters(shapes)
        stepped = OPTIMIZERS[optimizer](many(params) if has_many else few(params))
        if is_shared:
            state = stepped.state if state is None else state
            stepped.state = state
        found[name] = params, wrapper(stepped).step
    return found


def parameters(shapes: Shapes) -> list[Parameter]:
    """Return parameters with gradients."""
    params = [Parameter(p) for p in tensors(shapes, 0.05, 0)]
    for param, grad in zip(params, tensors(shapes, 0.01, 1), strict=True):
        param.grad = grad
    return params


def many(params: list[Parameter]) -> list[dict[str, Any]]:
    """Return a group for each parameter."""
    return [
        {"params": [p], "weight_decay": 0.01 if p.ndim > 1 else 0.0} for p in params
    ]


def few(params: list[Parameter]) -> list[dict[str, Any]]:
    """Return the two groups that differ."""
    return [
        {"params": [p for p in params if (p.ndim > 1) is has_decay]}
        | {"weight_decay": 0.01 if has_decay else 0.0}
        for has_decay in (True, False)
    ]


# -- measuring -------------------------------------------------------------------------


def check_same_bits(contestants: Contestants) -> None:
    """Let all take steps.

    Raises:
        RuntimeError: one of them did something else.
    """
    for _, step in contestants.values():
        for _ in range(CHECKED_STEPS):
            step()
    first, _ = next(iter(contestants.values()))
    for name, (params, _) in contestants.items():
        if not all(map(torch.equal, params, first)):
            msg = f"{name} has other weights after {CHECKED_STEPS} steps"
            raise RuntimeError(msg)


def measure(
    contestants: Contestants, base: str, rounds: int, repeats: int
) -> list[dict[str, Any]]:
    """Time; differences and ratios are those by round."""
    steps = {name: step for name, (_, step) in contestants.items()}
    gc.disable()
    try:
        times = interleaved(steps, rounds, functools.partial(timed, repeats=repeats))
    finally:
        gc.enable()
    return [
        {
            "name": name,
            **quartiles(values),
            "overhead_us": 1e3
            * statistics.median(
                a - b for a, b in zip(values, times[base], strict=True)
            ),
            "base_over_this": ratio(times[base], values),
        }
        for name, values in times.items()
    ]


def table(title: str, rows: list[dict[str, Any]], base: str) -> str:
    """Return a result as Markdown."""
    lines = [
        f"**{title}**",
        "",
        f"| | us | quartiles | more than {base}, us | {base} / this |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {1e3 * row['ms']:.1f} "
        f"| {1e3 * row['q25']:.1f} - {1e3 * row['q75']:.1f} "
        f"| {row['overhead_us']:.1f} | {row['base_over_this']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, and write them as JSON if asked to."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.set_defaults(rounds=200, threads=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = settings(options.rounds)
    results["mmengine"] = mmengine_version()
    results["checked_steps"], results["steps_timed_as_one"] = CHECKED_STEPS, REPEATS
    cases: dict[str, Any] = {}
    for clip in (False, True):
        title = "update_params, clip by norm" if clip else "update_params"
        check_same_bits(overhead_contestants(clip=clip))
        rows = measure(overhead_contestants(clip=clip), LOOP, options.rounds, REPEATS)
        cases["overhead_clip" if clip else "overhead"] = {"title": title, "rows": rows}
        print(f"\n{table(title, rows, LOOP)}", flush=True)
    for width in (4, 64):
        shapes = resnet152_shapes(width)
        for optimizer in OPTIMIZERS:
            check_same_bits(group_contestants(optimizer, shapes, is_shared=False))
            title = f"465 parameters, {width} channels, {optimizer}"
            rows = measure(
                group_contestants(optimizer, shapes, is_shared=True),
                FEW,
                options.rounds if width == 4 else options.rounds // 4,
                1,
            )
            cases[f"groups_{width}_{optimizer}"] = {"title": title, "rows": rows}
            print(f"\n{table(title, rows, FEW)}", flush=True)
    results["cases"] = cases
    results["load_after"] = settings(0)["load"]
    write_json(results, options.out, "wrapper_overhead")


if __name__ == "__main__":
    main()

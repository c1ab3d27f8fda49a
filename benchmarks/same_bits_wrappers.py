"""Runs of optimizer wrappers, for two packages in turns; see `same_bits_runs`."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from same_bits_runs import Box, Run, through_file
from same_bits_specs import SAY, built
from torch import Tensor, nn

MICRO_BATCHES = 13
CLIP = {"max_norm": 0.5}

Make = Callable[[Any, nn.Module], Any]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a small net with a norm, a branch without gradient, and odd shapes."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 3))
    return nn.ModuleDict({"body": body, "unused": nn.Linear(2, 2)}).to(dtype)


def loss_of(model: Any, step: int, *, overflows: bool = False) -> Tensor:
    """Return the loss of a micro-batch."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(6, 7, generator=generator).to(dtype)
    y = torch.randn(6, 3, generator=generator).to(dtype)
    loss: Tensor = (model["body"](x).to(dtype) - y).square().mean()
    return loss * float("inf") if overflows and step in {4, 8} else loss


# -- how they are made -----------------------------------------------------------------


def adamw(package: Any, model: nn.Module) -> Any:
    """Return torch's AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.1)


def sgd_in_groups(package: Any, model: nn.Module) -> Any:
    """Return torch's SGD with a group for each parameter, many of them alike."""
    groups = [
        {"params": [p], "weight_decay": 0.1 * (p.ndim > 1)} for p in model.parameters()
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def ours(package: Any, model: nn.Module) -> Any:
    """Return an optimizer of the package."""
    transform = built(package, SAY.adamw(SAY.schedules.linear(0.1, 0.01, 5)))
    return package.TransformOptimizer(model.named_parameters(), transform)


def made(
    package: Any,
    model: nn.Module,
    optimizer: Make = adamw,
    kind: str = "OptimWrapper",
    **options: Any,
) -> Any:
    """Return a wrapper of a kind."""
    options = built(package, options)
    return getattr(package, kind)(optimizer=optimizer(package, model), **options)


def from_config(package: Any, model: nn.Module, **config: Any) -> Any:
    """Return what a config describes."""
    return package.build_optim_wrapper(model, copy.deepcopy(config))


_amp = functools.partial(made, kind="AmpOptimWrapper")
_adamw = {"type": "AdamW", "lr": 0.03, "weight_decay": 0.1}
_rules = {
    "bias_decay_mult": 0.0,
    "norm_decay_mult": 0.5,
    "custom_keys": {"body.3": {"lr_mult": 0.1}},
}

WRAPPERS: dict[str, Make] = {
    "AdamW": made,
    "AdamW, clip": functools.partial(made, clip_grad=CLIP),
    "AdamW, 3 counts, clip": functools.partial(
        made, accumulative_counts=3, clip_grad=CLIP
    ),
    "largest magnitude": functools.partial(
        made, clip_grad={"max_norm": 0.1, "norm_type": float("inf")}
    ),
    "clip by value": functools.partial(
        made, accumulative_counts=2, clip_grad={"type": "value", "clip_value": 0.02}
    ),
    "transform": functools.partial(
        made,
        accumulative_counts=2,
        transform=SAY.chain(SAY.Centralize(), SAY.ClipByGlobalNorm(0.3)),
    ),
    "transform with state": functools.partial(
        made, transform=SAY.chain(SAY.ZeroNans(), SAY.Trace(0.5), SAY.Observe("seen"))
    ),
    "groups": functools.partial(made, optimizer=sgd_in_groups, clip_grad=CLIP),
    "groups, not merged": functools.partial(
        made, optimizer=sgd_in_groups, merge_groups=False
    ),
    "ours": functools.partial(made, optimizer=ours, clip_grad=CLIP),
    "ours, 4 counts": functools.partial(made, optimizer=ours, accumulative_counts=4),
    "Amp, bfloat16": functools.partial(_amp, dtype="bfloat16"),
    "Amp, bfloat16, 3 counts, clip": functools.partial(
        _amp, dtype="bfloat16", accumulative_counts=3, clip_grad=CLIP
    ),
    "Amp, bfloat16, scaled, ours": functools.partial(
        _amp, dtype="bfloat16", loss_scale=64.0, optimizer=ours, clip_grad=CLIP
    ),
    "Amp, dynamic": functools.partial(
        _amp,
        dtype="bfloat16",
        loss_scale={"init_scale": 1024.0, "growth_interval": 2},
        optimizer=sgd_in_groups,
        accumulative_counts=2,
        clip_grad=CLIP,
    ),
    "Amp, not cast, transform": functools.partial(
        _amp,
        dtype="float32",
        loss_scale=8,
        transform=SAY.chain(SAY.ClipByGlobalNorm(0.3)),
    ),
    "config": functools.partial(
        from_config,
        type="AmpOptimWrapper",
        dtype="bfloat16",
        optimizer=_adamw,
        accumulative_counts=3,
        clip_grad=CLIP,
        paramwise_cfg=_rules,
    ),
    "config, composed": functools.partial(
        from_config, optimizer=_adamw, paramwise_cfg={**_rules, "compose": True}
    ),
    "config, preset": functools.partial(
        from_config,
        type="OptimWrapper",
        optimizer={"type": "fo.adamw", "lr": 0.03, "weight_decay": 0.1},
        clip_grad=CLIP,
        paramwise_cfg=_rules,
    ),
}


# -- runs ------------------------------------------------------------------------------


def seen(wrapper: Any, model: nn.Module) -> dict[str, Any]:
    """Return what others see of a wrapper and its model."""
    named = dict(model.named_parameters())
    return {
        "params": {name: param.detach() for name, param in named.items()},
        "gradients": {n: p.grad for n, p in named.items() if p.grad is not None},
        "state dict": wrapper.state_dict(),
        "rates": [wrapper.get_lr(), wrapper.get_momentum()],
        "readings": wrapper.readings(),
    }


def train(wrapper: Any, model: nn.Module, steps: range, *, overflows: bool) -> Run:
    """Train and yield what is seen after each micro-batch."""
    for step in steps:
        with wrapper.optim_context(model):
            loss = loss_of(model, step, overflows=overflows)
        wrapper.update_params(loss)
        yield f"micro-batch {step}", {"loss": loss.detach(), **seen(wrapper, model)}


def wrapped(
    package: Any, make: Make, dtype: torch.dtype, *, ends: bool, overflows: bool
) -> Run:
    """Train with a wrapper; with an end, the last window is shorter."""
    model = net(dtype)
    wrapper = make(package, model)
    if ends:
        wrapper.initialize_count_status(model, 0, MICRO_BATCHES)
    yield from train(wrapper, model, range(MICRO_BATCHES), overflows=overflows)


def wrapper_saved(package: Any, make: Make, steps: int) -> Box:
    """Train, and return a checkpoint."""
    model = net()
    wrapper = make(package, model)
    collections.deque(train(wrapper, model, range(steps), overflows=False), maxlen=0)
    found = {"model": model.state_dict(), "wrapper": wrapper.state_dict()}
    return {**through_file(found), "steps": steps}


def wrapper_restored(package: Any, make: Make, box: Box) -> Run:
    """Load a checkpoint, and train on."""
    model = net()
    wrapper = make(package, model)
    model.load_state_dict(box["model"])
    wrapper.load_state_dict(box["wrapper"])
    yield "loaded", seen(wrapper, model)
    steps = range(box["steps"], box["steps"] + 6)
    yield from train(wrapper, model, steps, overflows=False)


def _pair(package: Any) -> tuple[Any, dict[str, nn.Module]]:
    models = {"one": net(), "two": net(torch.float64)}
    wrappers = {
        "one": WRAPPERS["AdamW, 3 counts, clip"](package, models["one"]),
        "two": WRAPPERS["ours"](package, models["two"]),
    }
    return package.OptimWrapperDict(**wrappers), models


def _train_pair(wrappers: Any, models: dict[str, nn.Module], steps: range) -> Run:
    for step in steps:
        for name, model in models.items():
            with wrappers[name].optim_context(model):
                loss = loss_of(model, step)
            wrappers[name].update_params(loss)
        both = {name: seen(wrappers[name], model) for name, model in models.items()}
        yield f"micro-batch {step}", {**both, "all": wrappers.state_dict()}


def dict_trained(package: Any) -> Run:
    """Train with several wrappers."""
    yield from _train_pair(*_pair(package), range(MICRO_BATCHES))


def dict_saved(package: Any, steps: int) -> Box:
    """Train with several wrappers, and return a checkpoint."""
    wrappers, models = _pair(package)
    collections.deque(_train_pair(wrappers, models, range(steps)), maxlen=0)
    found = {name: model.state_dict() for name, model in models.items()}
    return {**through_file(found | {"all": wrappers.state_dict()}), "steps": steps}


def dict_restored(package: Any, box: Box) -> Run:
    """Load a checkpoint of several wrappers, and train on."""
    wrappers, models = _pair(package)
    for name, model in models.items():
        model.load_state_dict(box[name])
    wrappers.load_state_dict(box["all"])
    yield from _train_pair(wrappers, models, range(box["steps"], box["steps"] + 6))

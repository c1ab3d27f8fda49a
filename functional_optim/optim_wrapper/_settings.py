"""Settings of an optimizer, as MMEngine's schedulers and a summary read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_optim._messages import format_columns, format_names, pluralize
from functional_optim.torch_optimizer._group_keys import TRANSFORM_STATE

LISTS = ("params", "param_names")
"""Keys of a group that have an entry for each parameter."""


def is_torch_optimizer(optimizer: object) -> bool:
    """Return whether an optimizer is one of torch's own classes."""
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")


def base_settings_of(optimizer: Any) -> dict[str, Any] | None:
    """Return a pseudo-group with the defaults of an optimizer of several groups."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    if len(groups) <= 1:
        return None
    # The defaults of a TransformOptimizer have its arguments as well.
    keys = {key for group in groups for key in group}
    defaults = {key: v for key, v in optimizer.defaults.items() if key in keys}
    return {"params": torch.tensor([0.0], dtype=torch.float), **defaults}


def names_in(groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Return the names of parameters that were passed with their names."""
    return {
        param: name
        for group in groups
        for param, name in zip(
            group.get("params", ()), group.get("param_names") or (), strict=False
        )
    }


def summary_of(
    param_groups: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    sources: Mapping[str, str],
) -> str:
    """Return a table with a line for each parameter, in the order of the groups."""
    keys = _summary_keys(param_groups)
    rows: list[tuple[str, ...]] = [("parameter", "shape", *keys, "rule")]
    settings: dict[str, list[str]] = {}
    count = numbers = 0
    for group in param_groups:
        values = [_text_of(group.get(key, "-")) for key in keys]
        setting = " ".join(map("{}={}".format, keys, values))
        for param in group.get("params", ()):
            name = names.get(id(param), str(count))
            shape, source = str(tuple(param.shape)), sources.get(name, "")
            rows.append((name, shape, *values, source))
            settings.setdefault(setting, []).append(name)
            count, numbers = count + 1, numbers + param.numel()
    total = (
        f"{pluralize(count, 'parameter')} with {pluralize(numbers, 'number')} in "
        f"{pluralize(len(param_groups), 'group')}, "
        f"{pluralize(len(settings), 'different setting')}:"
    )
    lines = [
        f"{setting}: {pluralize(len(same), 'parameter')} {format_names(same, 3)}"
        for setting, same in settings.items()
    ]
    rule = tuple("-" * max(map(len, column)) for column in zip(*rows, strict=True))
    table = format_columns([rows[0], rule, *rows[1:]], "<" * len(rule))
    return "\n".join([*map(str.rstrip, table), "", total, *lines])


def _summary_keys(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the rate, the weight decay, and what differs between groups."""
    keys = dict.fromkeys(key for group in groups for key in group)
    always = [key for key in ("lr", "weight_decay") if key in keys]
    rest = [k for k in keys if k not in {*always, *LISTS, TRANSFORM_STATE}]
    return always + [
        k for k in rest if len({_text_of(g.get(k, "-")) for g in groups}) > 1
    ]


def _text_of(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    return f"{value:.6g}" if type(value) is float and value else str(value)

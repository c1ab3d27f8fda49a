"""A table of all parameters: their settings, and the rules that decided those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from functional_optim._messages import shown
from functional_optim.inspection._explain import columns, counted
from functional_optim.torch_optimizer._group_keys import TRANSFORM_STATE

_ALWAYS = ("lr", "weight_decay")
_NEVER = {"params", "param_names", TRANSFORM_STATE}


def summary_of(
    param_groups: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    sources: Mapping[str, str],
) -> str:
    """Return a table with a line for each parameter, in the order of the groups.

    Below it stands how many groups have the same settings.

    Args:
        param_groups: The groups of an optimizer.
        names: Names of the parameters by `id`; those without one are numbered.
        sources: By name of a parameter the rule that decided its settings.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> groups = [{"params": [model.weight], "lr": 0.1, "weight_decay": 0.0},
        ...           {"params": [model.bias], "lr": 0.2, "weight_decay": 0.0}]
        >>> names = {id(p): name for name, p in model.named_parameters()}
        >>> print(summary_of(groups, names, {"bias": "bias_lr_mult"}))
        parameter  shape   lr   weight_decay  rule
        ---------  ------  ---  ------------  ------------
        weight     (1, 2)  0.1  0.0
        bias       (1,)    0.2  0.0           bias_lr_mult
        <BLANKLINE>
        2 parameters with 3 numbers in 2 groups, 2 different settings:
        lr=0.1 weight_decay=0.0: 1 parameter ['weight']
        lr=0.2 weight_decay=0.0: 1 parameter ['bias']
    """
    keys = [*(key for key in _ALWAYS if any(key in g for g in param_groups))]
    keys += [key for key in _varying(param_groups) if key not in keys]
    rows: list[tuple[str, ...]] = [("parameter", "shape", *keys, "rule")]
    settings: dict[str, list[str]] = {}
    count = numbers = 0
    for group in param_groups:
        values = [_written(group[key]) if key in group else "-" for key in keys]
        pairs = zip(keys, values, strict=True)
        setting = " ".join(f"{key}={value}" for key, value in pairs)
        for param in group.get("params", ()):
            name = names.get(id(param), str(count))
            shape, source = str(tuple(param.shape)), sources.get(name, "")
            rows.append((name, shape, *values, source))
            settings.setdefault(setting, []).append(name)
            count, numbers = count + 1, numbers + param.numel()
    total = (
        f"{counted(count, 'parameter')} with {counted(numbers, 'number')} in "
        f"{counted(len(param_groups), 'group')}, "
        f"{counted(len(settings), 'different setting')}:"
    )
    lines = [
        f"{setting}: {counted(len(members), 'parameter')} {shown(members, most=3)}"
        for setting, members in settings.items()
    ]
    rule = tuple("-" * max(map(len, column)) for column in zip(*rows, strict=True))
    table = columns([rows[0], rule, *rows[1:]], "<" * len(rule))
    return "\n".join([*map(str.rstrip, table), "", total, *lines])


def _varying(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that are not the same in all groups, in order."""
    found = []
    for key in dict.fromkeys(key for group in groups for key in group):
        values = {_written(group[key]) if key in group else None for group in groups}
        if key not in _NEVER and len(values) > 1:
            found.append(key)
    return found


def _written(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    return f"{value:.6g}" if type(value) is float and value else str(value)

"""What a wrapper shows of its optimizer: groups, rates, names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._messages import format_columns, format_names, pluralize
from functional_optim.torch_optimizer._group_keys import TRANSFORM_STATE

if TYPE_CHECKING:
    from collections.abc import Callable

    from functional_optim.optim_wrapper._gradient_transform import GradientTransform


class ShownSettings:
    """The settings of an optimizer as MMEngine's schedulers and logs read them."""

    optimizer: Any
    base_param_settings: dict[str, Any] | None
    paramwise_sources: dict[str, str]
    _on_gradients: GradientTransform | None
    _named: dict[Tensor, str]
    _accumulative_counts: int

    def _start_settings(self) -> None:
        self._named = _names_in(self.optimizer.param_groups)
        self.paramwise_sources = {}
        self.base_param_settings = None
        groups, defaults = self.optimizer.param_groups, self.optimizer.defaults
        if len(groups) > 1:
            dummy = torch.tensor([0.0], dtype=torch.float)
            # What a TransformOptimizer was built with stands there, too.
            settings = {key for group in groups for key in group}
            own = {key: value for key, value in defaults.items() if key in settings}
            self.base_param_settings = {"params": dummy, **own}

    @property
    def parameter_names(self) -> dict[int, str]:
        """Names of the parameters by `id`, for rules by name and for messages."""
        return {id(param): name for param, name in self._named.items()}

    @parameter_names.setter
    def parameter_names(self, names: Mapping[int, str]) -> None:
        # By the tensors themselves, which copies and pickles of a wrapper keep.
        params = self._parameters()
        self._named = {p: names[id(p)] for p in params if id(p) in names}
        if self._on_gradients is not None:
            self._on_gradients.forget_names()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer, and `base_param_settings` behind several."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        if self.base_param_settings is None:
            return groups
        return [*groups, self.base_param_settings]

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the optimizer."""
        found: dict[str, Any] = self.optimizer.defaults
        return found

    def get_lr(self) -> dict[str, list[Any]]:
        """Return the learning rate of each group; with several the base rate, too."""
        found = {}
        if self.base_param_settings is not None:
            found["base_lr"] = [self.base_param_settings["lr"]]
        found["lr"] = [group["lr"] for group in self.optimizer.param_groups]
        return found

    def get_momentum(self) -> dict[str, list[Any]]:
        """Return the momentum of each group: `momentum`, else `betas[0]`, else 0."""
        return {"momentum": [_momentum_of(g) for g in self.optimizer.param_groups]}

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Print which parameter has which settings, and why, as one table."""
        print_fn(
            summary_of(
                self.optimizer.param_groups,
                self.parameter_names,
                self.paramwise_sources,
            )
        )

    def __repr__(self) -> str:
        return (
            f"Type: {type(self).__name__}\n"
            f"_accumulative_counts: {self._accumulative_counts}\n"
            f"optimizer: \n{self.optimizer!r}\n"
        )

    def _parameters(self) -> list[Tensor]:
        # A group of a mock has none.
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group.get("params", ())]


def _names_in(groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    """Return the names that torch keeps where parameters came with names."""
    return {
        param: name
        for group in groups
        for param, name in zip(
            group.get("params", ()), group.get("param_names") or (), strict=False
        )
    }


def _momentum_of(group: Mapping[str, Any]) -> Any:
    if "momentum" in group:
        return group["momentum"]
    return group["betas"][0] if "betas" in group else 0


_ALWAYS = ("lr", "weight_decay")


_NEVER = {"params", "param_names", TRANSFORM_STATE}


def summary_of(
    param_groups: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    sources: Mapping[str, str],
) -> str:
    """Return a table with a line for each parameter, in the order of the groups.

    Below it stands how many groups have the same settings.

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
        f"{pluralize(count, 'parameter')} with {pluralize(numbers, 'number')} in "
        f"{pluralize(len(param_groups), 'group')}, "
        f"{pluralize(len(settings), 'different setting')}:"
    )
    lines = [
        f"{setting}: {pluralize(len(members), 'parameter')} "
        f"{format_names(members, most=3)}"
        for setting, members in settings.items()
    ]
    rule = tuple("-" * max(map(len, column)) for column in zip(*rows, strict=True))
    table = format_columns([rows[0], rule, *rows[1:]], "<" * len(rule))
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

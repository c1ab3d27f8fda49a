"""What a wrapper shows of its optimizer: groups, rates, names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.facade._summary import summary_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from functional_optim.optim_wrapper._gradient_transform import GradientTransform


class ShownSettings:
    """Shows the settings of an optimizer as MMEngine's schedulers and logs read them.

    Attributes:
        base_param_settings: With several groups, one more that holds the optimizer's
            defaults: what schedulers make of the base learning rate. Else None.
        paramwise_sources: By name of a parameter the rule that decided its settings, as
            far as a constructor told.
    """

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
        """Print which parameter has which settings, and why, as one table.

        Args:
            print_fn: What takes the table.
        """
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

"""Schedules as groups show them: the value of the next step; nobody else writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functional_optim._scheduling import ScheduleState, evaluate
from functional_optim.core._traversal import walk
from functional_optim.torch_optimizer._group_hyperparameters import (
    Option,
    Path,
    group_value,
    scheduled_places,
)
from functional_optim.torch_optimizer._group_keys import two_owners

if TYPE_CHECKING:
    from functional_optim.core._transform import TensorMap, Transform


class _Shown(NamedTuple):
    group: int
    option: Option
    position: int
    tensor: Tensor


class Scheduled:
    """Keeps what groups show in step with the schedules of a transform.

    Args:
        transform: The transform.
    """

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        self._held = scheduled_places(transform)
        self._counts: dict[Path, ScheduleState] = {}
        self._shown: list[_Shown] = []
        self._versions: list[int] = []

    def first_value(self, option: Option) -> Any:
        """Return what a schedule gives before the first step.

        Args:
            option: A key that a schedule decides.
        """
        zero = ScheduleState(torch.zeros((), dtype=torch.float64))
        now, _ = evaluate(self._held[option.paths[0]], zero, {})
        return group_value(getattr(now, option.field))

    def add(self, index: int, group: Mapping[str, Any], options: list[Option]) -> None:
        """Watch what one more group shows.

        Args:
            index: Which group it is.
            group: The group.
            options: Its keys.
        """
        for option in options:
            if option.scheduled:
                for position, part in enumerate(_tensors(group[option.key])):
                    self._shown.append(_Shown(index, option, position, part))
                    self._versions.append(part._version)

    def forget(self, count: int) -> None:
        """Watch no groups after the first ones.

        Args:
            count: How many stay.
        """
        pairs = zip(self._shown, self._versions, strict=True)
        kept = [(shown, version) for shown, version in pairs if shown.group < count]
        self._shown = [shown for shown, _ in kept]
        self._versions = [version for _, version in kept]

    def connect(self, state: Any, params: TensorMap) -> None:
        """Find the counts that the schedules are evaluated at.

        Args:
            state: The whole state; its tensors stay the same from step to step.
            params: All parameters.
        """
        self._counts = {}
        for stage in walk(self._transform, state, params):
            own = getattr(stage.state, "schedule", stage.state)
            if stage.place in self._held and isinstance(own, ScheduleState):
                self._counts[stage.place] = own

    def show(self) -> None:
        """Write the values of the next step into the groups."""
        now = {
            path: evaluate(self._held[path], count, {})[0]
            for path, count in self._counts.items()
        }
        for shown in self._shown:
            value = getattr(now[shown.option.paths[0]], shown.option.field)
            shown.tensor.copy_(_tensors(value)[shown.position])
        self._versions = [shown.tensor._version for shown in self._shown]

    def check(self, groups: list[dict[str, Any]]) -> None:
        """Refuse that somebody else has written what a schedule decides.

        Raises:
            ValueError: naming the key.
        """
        for shown, version in zip(self._shown, self._versions, strict=True):
            group, key = groups[shown.group], shown.option.key
            here = _tensors(group[key])
            own = len(here) > shown.position and here[shown.position] is shown.tensor
            if not own or shown.tensor._version != version or f"initial_{key}" in group:
                raise ValueError(two_owners(key))


def _tensors(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, tuple) else (value,)
    return [part for part in parts if isinstance(part, Tensor)]

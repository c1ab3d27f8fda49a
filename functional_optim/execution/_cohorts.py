"""Which parameters keep apart although their states do not tell why."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

_CALM = 100
"""After so many steps with the same gradients old differences are forgotten."""


class Cohorts:
    """Parameters that a plan may put together.

    A plan is not for free, so those that part stay apart: by what their groups said for
    good, by the steps that only some of them took until all is calm.
    """

    def __init__(self) -> None:
        self._groups: dict[str, tuple[Hashable, ...]] = {}
        self._steps: dict[str, tuple[Hashable, ...]] = {}
        self._calm = 0

    def key(self, name: str) -> Hashable:
        """Return what must be equal for parameters that are put together."""
        return self._groups.get(name), self._steps.get(name)

    def part_groups(self, told: Mapping[str, Hashable]) -> None:
        """Keep apart what groups tell differently.

        Args:
            told: What the group of each parameter says.
        """
        for name, value in told.items():
            self._groups[name] = (*self._groups.get(name, ()), value)

    def follow(
        self, kinds: Mapping[str, Hashable], together: Iterable[list[str]]
    ) -> bool:
        """Keep apart what does not take the same step.

        Args:
            kinds: The step that each parameter takes.
            together: The names that the plan has together.

        Returns:
            Whether the plan must change.
        """
        self._calm = 0
        parted = any(len({kinds[name] for name in names}) > 1 for names in together)
        if parted:
            for name, kind in kinds.items():
                self._steps[name] = (*self._steps.get(name, ()), kind)
        return parted

    def rest(self, kinds: Mapping[str, Hashable]) -> bool:
        """Count a step like the one before; forget old differences after many.

        Args:
            kinds: The step that each parameter takes.

        Returns:
            Whether the plan may change.
        """
        self._calm += 1
        if not self._steps or self._calm <= _CALM:
            return False
        left: dict[str, tuple[Hashable, ...]] = {}
        if len(set(kinds.values())) > 1:
            left = {name: (kind,) for name, kind in kinds.items()}
        changed, self._steps = left != self._steps, left
        return changed

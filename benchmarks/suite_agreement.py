"""Check that all contestants do the same before anything is timed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from suite_contestants import FREE, FUSED
from torch import Tensor


class Turning(Protocol):
    """Who has parameters and takes a step in each turn."""

    @property
    def params(self) -> list[Tensor]:
        """The parameters as they are now."""

    def turn(self) -> float:
        """Take a step and return its milliseconds."""


def apart(some: Iterable[Tensor], others: list[Tensor], start: list[Tensor]) -> float:
    """Return the RMS of a difference over that of the way from the start."""
    far = way = 0.0
    with torch.no_grad():
        for a, b, c in zip(some, others, start, strict=True):
            far += (a.float() - b.float()).norm().item() ** 2
            way += (b.float() - c.float()).norm().item() ** 2
    return float((far / way) ** 0.5)


def checked(
    contestants: Mapping[str, Turning],
    start: list[Tensor],
    tolerance: float,
    turns: int = 3,
) -> dict[str, float]:
    """Let all take the first turns, and return how far each is from torch fused.

    Raises:
        RuntimeError: one of them did something else.
    """
    for contestant in contestants.values():
        for _ in range(turns):
            contestant.turn()
    base = contestants[FUSED].params
    found = {
        name: apart(contestant.params, base, start)
        for name, contestant in contestants.items()
        if name != FREE
    }
    for name, difference in found.items():
        if not difference <= tolerance:
            msg = (
                f"{name} is {difference:.1e} of the way from {FUSED} after "
                f"{turns} turns; at most {tolerance:.1e} is rounding"
            )
            raise RuntimeError(msg)
    return found

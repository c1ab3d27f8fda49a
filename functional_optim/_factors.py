"""Arithmetic on what multiplies a map: numbers for all names, or one for each.

Counts and values derived from them are 0-dim float64 tensors by name. They are stacked
into one vector for the arithmetic, so that it costs the same for any number of names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from functional_optim._tensor_map import Factor, lookup

if TYPE_CHECKING:
    from collections.abc import Iterable


def stack(column: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Stack 0-dim entries so that arithmetic on them is one operation. Shape (n,)."""
    rows = lookup(column, names)
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64)


def unstack(names: Iterable[str], stacked: Tensor) -> dict[str, Tensor]:
    """Undo `stack`: one 0-dim tensor for each name."""
    return dict(zip(names, stacked.unbind(), strict=True))


def stacked_factor(factor: Factor, names: Iterable[str]) -> float | Tensor:
    """Bring a factor into the shape of `stack`: one number for all, or shape (n,)."""
    if not isinstance(factor, Mapping):
        return factor
    rows = [torch.as_tensor(v, dtype=torch.float64) for v in lookup(factor, names)]
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64)


def complement(factor: Factor) -> Factor:
    """Return 1 - factor, for tensors in float64."""
    if isinstance(factor, Mapping):
        return {
            name: cast("float | Tensor", complement(v)) for name, v in factor.items()
        }
    if isinstance(factor, Tensor):
        return 1 - factor.double()
    return 1 - factor


def negated(factor: Factor) -> Factor:
    """Return -factor."""
    if isinstance(factor, Mapping):
        return {name: -v for name, v in factor.items()}
    return -factor

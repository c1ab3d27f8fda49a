"""What every schedule computes with, on 0-dim float64 tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def count(step: float | Tensor) -> Tensor:
    """Return the step as a 0-dim float64 tensor."""
    if isinstance(step, Tensor):
        return step.double()  # Stays on its device, whatever torch's default is.
    return torch.tensor(step, dtype=torch.float64)


def between(start: float, end: float, done: Tensor) -> Tensor:
    """Return the value a part of the way from start to end.

    Exact at both ends, which start + (end - start) * done is not: 1.0 + (1e-5 - 1.0)
    misses 1e-5 by 5e-12 of it.

    Example:
        >>> between(1.0, 3.0, torch.tensor(0.25))
        tensor(1.5000)
    """
    return start * (1 - done) + end * done

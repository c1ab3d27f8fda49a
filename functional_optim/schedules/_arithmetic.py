"""What every schedule computes with: the step, as a 0-dim float64 tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def count(step: float | Tensor) -> Tensor:
    """Return the step as a 0-dim float64 tensor."""
    if isinstance(step, Tensor):
        return step.double()  # Stays on its device, whatever torch's default is.
    return torch.tensor(step, dtype=torch.float64)

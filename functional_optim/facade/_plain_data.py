"""Convert saved data to what `torch.load(weights_only=True)` takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def plain(value: Any) -> Any:
    """Return saved data with Python's numbers in the place of numpy's.

    Hooks write what `np.interp` returns into groups; `torch.load(weights_only=True)`
    takes no such number.

    Example:
        >>> import numpy as np
        >>> plain({"lr": np.float64(0.5), "betas": (np.float32(0.25), 0.9)})
        {'lr': 0.5, 'betas': (0.25, 0.9)}
    """
    if type(value) is dict:
        return {plain(key): plain(inner) for key, inner in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(map(plain, value))
    is_number = not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0
    return value.item() if is_number else value

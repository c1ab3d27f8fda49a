"""Operations on a tensor and a factor, rounded as torch does with a number.

The factor may be a 0-dim tensor: it does not promote, and torch would round it to the
dtype of the tensor, or want it in that dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import is_sixteen_bit


def widened(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor in the wider dtype of two."""
    return tensor.to(torch.promote_types(tensor.dtype, other.dtype))


def add(x: Tensor, other: Tensor, alpha: float | Tensor) -> Tensor:
    """Add a multiple of a tensor, with the rounding that the factor's kind has."""
    if not isinstance(alpha, Tensor):
        return torch.add(x, other, alpha=alpha)
    # A 0-dim factor does not promote: round the product in the wider dtype.
    return torch.add(x, widened(other, x) * alpha)


def addcmul(x: Tensor, first: Tensor, second: Tensor, value: float | Tensor) -> Tensor:
    """Add a multiple of a product, as `add`."""
    if not isinstance(value, Tensor):
        return torch.addcmul(x, first, second, value=value)
    return torch.addcmul(x, widened(first, x) * value, second)


def lerp(x: Tensor, end: Tensor, weight: float | Tensor) -> Tensor:
    """Interpolate by a tensor weight with the rounding of a float one."""
    if not isinstance(weight, Tensor):
        return torch.lerp(x, end, weight)
    # torch.lerp wants one dtype; a 16-bit weight would round 1 - beta to 3 digits.
    wide = torch.float32 if is_sixteen_bit(x) else x.dtype
    return torch.lerp(x.to(wide), end.to(wide), weight.to(wide)).to(x.dtype)

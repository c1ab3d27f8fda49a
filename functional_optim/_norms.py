"""One number for every tensor of a map: what is joined by `Context.reduce`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from functional_optim._tensors import foreach_applies, is_sixteen_bit

if TYPE_CHECKING:
    from torch import Tensor

    from functional_optim._types import TensorMap


def norms(tensors: TensorMap, p: float, *, wide: bool = False) -> Tensor:
    """Return the p-norm of every tensor, stacked. Shape (n,).

    Args:
        tensors: The tensors.
        p: Order of the norm.
        wide: Whether norms of 16-bit tensors are float32: a norm of several tensors
            joined may be larger than float16 can hold.

    Example:
        >>> norms({"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([])}, 2.0)
        tensor([5., 0.])
    """
    values = list(tensors.values())
    if not values:
        return torch.zeros(0)
    if p == math.inf and any(v.numel() == 0 for v in values):
        # torch refuses the largest magnitude of nothing; as a norm it is 0.
        values = [v if v.numel() else v.new_zeros(1) for v in values]
    if wide and any(map(is_sixteen_bit, values)):
        kinds = [torch.float32 if is_sixteen_bit(v) else v.dtype for v in values]
        found = [
            torch.linalg.vector_norm(v, p, dtype=kind)
            for v, kind in zip(values, kinds, strict=True)
        ]
        return torch.stack(found)
    if foreach_applies(values):
        return torch.stack(list(torch._foreach_norm(values, p)))
    return torch.stack([torch.linalg.vector_norm(v, p) for v in values])


def all_finite(tensors: TensorMap) -> Tensor:
    """Tell for every tensor whether all its numbers are finite. Shape (n,), bool.

    The largest magnitude is finite iff all numbers are: one pass, nothing allocated.

    Example:
        >>> all_finite({"w": torch.tensor([1.0, math.inf]), "b": torch.ones(2)})
        tensor([False,  True])
    """
    return norms(tensors, math.inf).isfinite()

"""Per-tensor norms and finiteness, the partial values of `Context.reduce`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import TensorMap, can_use_foreach, is_16_bit

_BLOCK = 65_536
"""Elements whose squares float32 adds up with an error of 2e-7 (measured)."""


def norms(tensors: Iterable[Tensor], p: float, *, wide: bool = False) -> Tensor:
    """Return the p-norm of every tensor, stacked. Shape (n,).

    Example:
        >>> norms([torch.tensor([3.0, 4.0]), torch.tensor([])], 2.0)
        tensor([5., 0.])
    """
    values = list(tensors)
    if not values:
        return torch.zeros(0)
    if p == math.inf and any(v.numel() == 0 for v in values):
        # torch refuses the largest magnitude of nothing; as a norm it is 0.
        values = [v if v.numel() else v.new_zeros(1) for v in values]
    if wide and any(not isinstance(v.numel(), int) for v in values):
        return torch.stack([_symbolic_norm(v, p) for v in values])
    if wide and any(is_16_bit(v) or v.numel() > _BLOCK for v in values):
        return torch.stack([_blockwise_norm(v, p) for v in values])
    if can_use_foreach(values):
        return torch.stack(list(torch._foreach_norm(values, p)))
    return torch.stack([torch.linalg.vector_norm(v, p) for v in values])


def _symbolic_norm(tensor: Tensor, p: float) -> Tensor:
    """Return the norm of a tensor of symbolic size: in float64, without blocks."""
    kind = torch.float32 if is_16_bit(tensor) else tensor.dtype
    norm: Tensor = torch.linalg.vector_norm(tensor, p, dtype=torch.float64).to(kind)
    return norm


def _blockwise_norm(tensor: Tensor, p: float) -> Tensor:
    """Return the norm, for large tensors as the norm of the norms of blocks."""
    kind = torch.float32 if is_16_bit(tensor) else tensor.dtype
    if tensor.numel() <= _BLOCK or not tensor.is_contiguous():
        norm: Tensor = torch.linalg.vector_norm(tensor, p, dtype=kind)
        return norm
    flat = tensor.view(-1)
    whole = flat.numel() // _BLOCK * _BLOCK
    blocks = flat[:whole].view(-1, _BLOCK)
    parts = torch.linalg.vector_norm(blocks, p, dim=1, dtype=kind)
    if whole < flat.numel():
        rest = torch.linalg.vector_norm(flat[whole:], p, dtype=kind)
        parts = torch.cat([parts, rest.reshape(1)])
    joined: Tensor = torch.linalg.vector_norm(parts, p)
    return joined


def all_finite(tensors: TensorMap) -> Tensor:
    """Return whether each tensor is finite. Shape (n,), bool.

    The largest magnitude is finite iff all numbers are: one pass, nothing allocated.

    Example:
        >>> all_finite({"w": torch.tensor([1.0, math.inf]), "b": torch.ones(2)})
        tensor([False,  True])
    """
    return norms(tensors.values(), math.inf).isfinite()

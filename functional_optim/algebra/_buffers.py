"""Buffers for formulas: donated inputs, and a workspace for results."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_LARGEST = 16 * 2**20
"""Bytes of a result that is kept; a larger one is rare, and its memory is returned."""


class Donated(dict[str, Tensor]):
    """A map of donated tensors, which a formula may overwrite.

    As JAX donates buffers: the last operation that reads one may run in place.
    """


class Workspace:
    """Memory for the results of formulas, reused from unit to unit.

    Fresh memory costs as much as the arithmetic in it: the system clears every page.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._taken = 0

    def __enter__(self) -> None:
        current.memory, self._taken = self, 0

    def __exit__(self, *_: object) -> None:
        current.memory = None

    def like(self, tensor: Tensor) -> Tensor:
        """Return memory like a tensor, different from all since `__enter__`."""
        if tensor.numel() * tensor.itemsize > _LARGEST:
            return torch.empty_like(tensor)
        index, self._taken = self._taken, self._taken + 1
        if index == len(self._tensors):
            self._tensors.append(torch.empty_like(tensor))
        known = self._tensors[index]
        if known.dtype == tensor.dtype and known.device == tensor.device:
            if known.shape == tensor.shape and known.stride() == tensor.stride():
                return known
            if known.ndim == tensor.ndim == 1 and tensor.numel() <= known.numel():
                return known[: tensor.numel()]
        self._tensors[index] = torch.empty_like(tensor)
        return self._tensors[index]


class _Thread(threading.local):
    memory: Workspace | None = None


current = _Thread()
"""The workspace of this thread, if an executor has entered one."""

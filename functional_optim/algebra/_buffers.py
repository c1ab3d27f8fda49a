"""Buffers for expressions: donated inputs, and a workspace for results."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Donated(dict[str, Tensor]):
    """A map of donated tensors: expressions may overwrite them.

    As JAX donates buffers: the first operation of an expression then runs in place.
    """


class Workspace:
    """Memory for the results of expressions, reused from unit to unit.

    Fresh memory costs as much as the arithmetic in it: the system clears every page.
    """

    def __init__(self, most: int = 16 * 2**20) -> None:
        self._most = most
        self._tensors: list[Tensor] = []
        self._taken = 0

    def __enter__(self) -> None:
        current.memory, self._taken = self, 0

    def __exit__(self, *_: object) -> None:
        current.memory = None

    def like(self, tensor: Tensor) -> Tensor:
        """Return memory like a tensor, different from all since `__enter__`."""
        if tensor.numel() * tensor.itemsize > self._most:
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

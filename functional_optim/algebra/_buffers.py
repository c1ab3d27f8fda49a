"""Memory that expressions may use: given up by its owner, or kept for their results."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Donated(dict[str, Tensor]):
    """A map whose tensors the algebra may overwrite: their owner has given them up.

    An executor hands state over like this where the transform reads each entry once,
    as JAX donates buffers: the first operation of an expression then runs in place.
    """


class Workspace:
    """Memory for the results of expressions, used again and again.

    Fresh memory of some MiB costs as much as the arithmetic in it: the system clears
    every page. An executor that runs one unit after the other knows when all results of
    a unit are no longer needed.
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
        """Return memory like a tensor, different from all since it was entered."""
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


class _Current(threading.local):
    memory: Workspace | None = None


current = _Current()
"""Where expressions of this thread write their results, if an executor says so."""

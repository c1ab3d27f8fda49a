"""Tensors that a user gave as hyperparameters, in several groups."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


@dataclasses.dataclass
class _Copy:
    """What a further group shows of a tensor."""

    tensor: Tensor
    source: Tensor
    own_version: int
    source_version: int


class SharedTensors:
    """What groups show of tensors: the first the tensor itself, others a copy each.

    A scheduler may set another number in each group: with one tensor in two of them the
    last would count for both, as with torch. Whoever writes into the tensor itself
    means all of them, so that copies follow it until somebody writes into them.
    """

    def __init__(self) -> None:
        self._shown: list[Tensor] = []
        self._copies: list[_Copy] = []

    def shown(self, value: Any) -> Any:
        """Return what one more group shows of a hyperparameter."""
        if isinstance(value, tuple):
            return tuple(self.shown(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if not any(value is known for known in self._shown):
            self._shown.append(value)
            return value
        copy = value.detach().clone()
        self._copies.append(_Copy(copy, value, copy._version, value._version))
        return copy

    def follow(self) -> None:
        """Write into the copies what was written into the tensors."""
        for copy in self._copies:
            if copy.source._version != copy.source_version:
                copy.source_version = copy.source._version
                if copy.tensor._version == copy.own_version:
                    copy.tensor.copy_(copy.source)
                    copy.own_version = copy.tensor._version

"""Keep histories of logged numbers on their device until they are read."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from functional_optim.core._readings import fetch

_MAX_WAITING = 1024
"""How many numbers may wait to be read; each occupies a small piece of the device."""


def _is_on_host(value: Tensor) -> bool:
    """Whether a tensor is read without waiting for a device."""
    return value.is_cpu


class DeferredHistory:
    """A base class, before MMEngine's `HistoryBuffer`, that reads numbers when needed.

    MMEngine reads each number when it is logged: every step waits for the device.
    """

    max_length: int
    _waiting: list[tuple[float | Tensor, int]]
    _statistics_methods: dict[str, Any]

    def update(self, log_val: float | Tensor, count: int = 1) -> None:
        """Append a number."""
        if isinstance(log_val, Tensor):
            if _is_on_host(log_val):
                log_val = log_val.item()
            else:  # The caller may write into it afterwards.
                log_val = log_val.detach().reshape(()).clone()
        elif not isinstance(log_val, (int, float)):
            kind = type(log_val).__name__
            raise TypeError(
                f"log_val must be a number or a tensor of one element, got a {kind}"
            )
        self._waiting.append((log_val, count))
        if len(self._waiting) >= _MAX_WAITING:
            self._read()

    def _read(self) -> None:
        """Bring the waiting numbers to the host, in one transfer."""
        if not self._waiting:
            return
        values, counts = zip(*self._waiting, strict=True)
        self._waiting = []
        read = fetch({str(i): v for i, v in enumerate(values) if isinstance(v, Tensor)})
        numbers: list[Any] = [read.get(str(i), v) for i, v in enumerate(values)]
        # Beyond max_length the oldest go.
        start = -self.max_length
        self._log_history = np.append(self._log_history, numbers)[start:]
        self._count_history = np.append(self._count_history, counts)[start:]

    # `HistoryBuffer` and statistics that users register read these two.
    @property
    def _log_history(self) -> Any:
        self._read()
        return self.__dict__["values"]

    @_log_history.setter
    def _log_history(self, values: Any) -> None:
        self.__dict__["values"], self._waiting = values, []

    @property
    def _count_history(self) -> Any:
        self._read()
        return self.__dict__["counts"]

    @_count_history.setter
    def _count_history(self, counts: Any) -> None:
        self.__dict__["counts"] = counts

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Checkpoints load where this library is not installed.
        plain = type(self).__mro__[2]
        data = self._log_history, self._count_history
        statistics = {"statistics_methods": self._statistics_methods}
        return plain, (*data, self.max_length), statistics

"""Windows of micro-batches: counted, and closed where the training ends."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.optim_wrapper._errors import ConfigTypeError, ConfigValueError

if TYPE_CHECKING:
    from torch import nn

_logger = logging.getLogger("functional_optim")


def check_counts(name: str, value: Any, least: int) -> None:
    """Refuse what is no number of micro-batches."""
    # numpy's numbers have an index, too.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigTypeError(
            f"{name} must be an int, a number of micro-batches, got {value!r}"
        )
    if value < least:
        raise ConfigValueError(f"{name} must be at least {least}, got {value}")


class Windowed:
    """Counts micro-batches, and knows which of them end a window."""

    _accumulative_counts: int
    _inner_count: int
    _max_counts: int
    _remainder_counts: int
    _unspent: bool
    """Whether there are gradients that no `zero_grad` took."""
    _began_at: int
    """Where counting began."""
    _warned_of: set[str]

    def _start_counts(self, accumulative_counts: int) -> None:
        self._accumulative_counts = accumulative_counts
        self._inner_count = 0
        self._set_end(-1)
        self._unspent = False
        self._warned_of = set()
        self._began_at = 0

    def _set_end(self, max_counts: int) -> None:
        self._max_counts = max_counts
        # Kept for those who read it: what the last window has, if it is a short one.
        every = self._accumulative_counts
        self._remainder_counts = max_counts if max_counts < 0 else max_counts % every

    def initialize_count_status(
        self, model: nn.Module, init_counts: int, max_counts: int
    ) -> None:
        """Tell where training starts and ends, so that a last short window is used."""
        check_counts("init_counts", init_counts, 0)
        check_counts("max_counts", max_counts, -1)
        resumed = self._unspent and init_counts == self._inner_count
        self._inner_count = self._began_at = init_counts
        self._set_end(max_counts)
        every = self._accumulative_counts
        if init_counts % every != 0 and not resumed:
            self._warn_once(
                "Resumed iteration number is not divisible by `accumulative_counts`, "
                "which means the gradient of some iterations is lost and the result "
                "may be influenced slightly."
            )
        batch_norm = torch.nn.modules.batchnorm._BatchNorm
        if every > 1 and any(isinstance(m, batch_norm) for m in model.modules()):
            self._warn_once(
                "Gradient accumulative may slightly decrease performance because the "
                "model has BatchNorm layers."
            )

    def _warn_once(self, message: str) -> None:
        """Log a warning, unless this wrapper did: some loops count anew each time."""
        if message not in self._warned_of:
            self._warned_of.add(message)
            _logger.warning(message)

    def should_update(self) -> bool:
        """Tell after a backward whether it ended a window."""
        return closes(self._inner_count, self._accumulative_counts, self._max_counts)

    def should_sync(self) -> bool:
        """Tell before a backward whether it will end a window."""
        count = self._inner_count + 1
        return closes(count, self._accumulative_counts, self._max_counts)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss divided by the length of the window it belongs to."""
        if self._accumulative_counts == 1:
            return loss
        every, end = self._accumulative_counts, self._max_counts
        start, stop = window(self._inner_count, every, end)
        return loss / (stop - start)

    @property
    def inner_count(self) -> int:
        """Micro-batches so far."""
        return self._inner_count


def window(index: int, every: int, end: int) -> tuple[int, int]:
    """Return where the window begins and ends that a micro-batch belongs to.

    Windows end at multiples of `every`, and where the training ends: the last one may
    be shorter, and the one after it, if training goes on.

    Example:
        >>> [window(index, 4, 10) for index in (0, 7, 8, 9, 10)]
        [(0, 4), (4, 8), (8, 10), (8, 10), (10, 12)]
    """
    start = index - index % every
    stop = start + every
    if start < end < stop:
        return (start, end) if index < end else (end, stop)
    return start, stop


def closes(count: int, every: int, end: int) -> bool:
    """Whether a window ends after this number of micro-batches."""
    return count % every == 0 or count == end

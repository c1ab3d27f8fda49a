"""Count micro-batches, of which windows of `accumulative_counts` make one step."""

from __future__ import annotations

import logging
import operator
from typing import Any

import torch
from torch import Tensor, nn

from functional_optim.optim_wrapper._errors import ConfigTypeError, ConfigValueError

_logger = logging.getLogger("functional_optim")


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is not a number of micro-batches."""
    # numpy's numbers have an index, too.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigTypeError(
            f"{name} must be an int, a number of micro-batches, got {value!r}"
        )
    if value < least:
        raise ConfigValueError(f"{name} must be at least {least}, got {value}")


def check_loss(loss: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a loss that is not a single number."""
    if not hasattr(loss, "backward"):
        kind = type(loss).__name__
        raise ConfigTypeError(
            f"loss must be a tensor, got a {kind}; add up its parts first"
        )
    is_tensor = issubclass(type(loss), Tensor)  # A mock of one has no numbers.
    if is_tensor and loss.numel() != 1 and "gradient" not in kwargs:
        raise ConfigValueError(
            f"loss must be a single number, got shape {tuple(loss.shape)}; pass "
            "loss.mean() or loss.sum()"
        )


class AccumulationWindow:
    """The position of a wrapper in its windows of micro-batches."""

    def __init__(self, accumulative_counts: int) -> None:
        check_count("accumulative_counts", accumulative_counts, 1)
        self.accumulative_counts = accumulative_counts
        self.inner_count = self.init_counts = 0
        self.set_end(-1)
        self.has_gradients = False
        """Whether there are gradients that no `zero_grad` took."""
        self._logged: set[str] = set()

    def set_end(self, max_counts: int) -> None:
        """Set after how many micro-batches training ends; -1 if it is unknown."""
        every, self.max_counts = self.accumulative_counts, max_counts
        # Not used here: MMEngine's wrappers have it.
        self.remainder_counts = max_counts if max_counts < 0 else max_counts % every

    def initialize(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Set where training begins and ends."""
        check_count("init_counts", init_counts, 0)
        check_count("max_counts", max_counts, -1)
        resumed = self.has_gradients and init_counts == self.inner_count
        self.inner_count = self.init_counts = init_counts
        self.set_end(max_counts)
        if init_counts % self.accumulative_counts != 0 and not resumed:
            self.warn_once(
                "Resumed iteration number is not divisible by `accumulative_counts`, "
                "which means the gradient of some iterations is lost and the result "
                "may be influenced slightly."
            )
        batch_norm = torch.nn.modules.batchnorm._BatchNorm
        if self.accumulative_counts > 1 and any(
            isinstance(module, batch_norm) for module in model.modules()
        ):
            self.warn_once(
                "Gradient accumulative may slightly decrease performance because the "
                "model has BatchNorm layers."
            )

    def warn_once(self, message: str) -> None:
        """Log a warning once a wrapper: some loops initialize counts in each step."""
        if message not in self._logged:
            self._logged.add(message)
            _logger.warning(message)

    def ends_at(self, count: int) -> bool:
        """Return whether a window ends after this number of micro-batches."""
        return count % self.accumulative_counts == 0 or count == self.max_counts

    def length(self) -> int:
        """Return the length of the window that the next micro-batch belongs to."""
        # The end of the training cuts a window in two, if training goes on.
        every, end = self.accumulative_counts, self.max_counts
        start = self.inner_count - self.inner_count % every
        if not start < end < start + every:
            return every
        return end - start if self.inner_count < end else start + every - end


def window_property(name: str) -> Any:
    """Return a property for an attribute of the window of a wrapper."""
    return property(
        operator.attrgetter(f"_window.{name}"),
        # A subclass may set it before `__init__` makes the window.
        lambda wrapper, value: setattr(
            wrapper.__dict__.setdefault("_window", AccumulationWindow(1)), name, value
        ),
    )

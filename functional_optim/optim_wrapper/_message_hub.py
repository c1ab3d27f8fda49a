"""Numbers for logs, by name, kept on their device until they are read."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor


class ScalarHistory:
    """The latest of a series of numbers."""

    def __init__(self, value: float | Tensor) -> None:
        self._value = value

    def current(self) -> float:
        """Return the number on the host."""
        return float(self._value)


class MessageHub:
    """The numbers that a wrapper logs, such as `train/grad_norm`."""

    host: ClassVar[Any] = None
    """What logs in the place of all hubs: that of MMEngine, once it is registered."""

    def __init__(self) -> None:
        self._scalars: dict[str, ScalarHistory] = {}

    @property
    def current(self) -> Any:
        """This hub, or the current one of the host."""
        return self if self.host is None else self.host.current

    def update_scalar(
        self, key: str, value: float | Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Log a number under a name."""
        if self.host is None:
            self._scalars[key] = ScalarHistory(value)
        else:
            self.host.update_scalar(key, value, *args, **kwargs)

    def get_scalar(self, key: str) -> ScalarHistory:
        """Return the latest number under a name."""
        if key not in self._scalars:
            raise KeyError(
                f"nothing was noted under {key!r}, only under {list(self._scalars)}"
            )
        return self._scalars[key]

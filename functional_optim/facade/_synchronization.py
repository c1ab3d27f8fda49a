"""Gradient synchronisation, kept off for the micro-batches that do not step."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator


class Suppression:
    """Keeps a model from synchronising gradients until it is told to go on.

    The forward runs in a context, the backward after it. DDP asks in the forward
    whether to synchronise; FSDP asks in the backward, when the context is closed.
    """

    def __init__(self) -> None:
        self._open: contextlib.ExitStack | None = None

    def begin(self, model: nn.Module) -> None:
        """Suppress until `end`, if the model synchronises at all."""
        self.end()
        stack = contextlib.ExitStack()
        for context in _suppressing(model):
            stack.enter_context(context)
        self._open = stack

    def end(self) -> None:
        """Restore what was set before."""
        if self._open is not None:
            stack, self._open = self._open, None
            stack.close()


def _suppressing(model: Any) -> Iterator[contextlib.AbstractContextManager[Any]]:
    if hasattr(model, "no_sync"):
        yield model.no_sync()
    elif hasattr(model, "set_requires_gradient_sync"):
        yield _without_reduction(model)


@contextlib.contextmanager
def _without_reduction(model: nn.Module) -> Iterator[None]:
    """Suppress as FSDP2 does it, and restore what each of its modules was set to."""
    found: Iterator[Any] = model.modules()
    parts = [part for part in found if hasattr(part, "set_requires_gradient_sync")]
    before = [_reduces(part) for part in parts]
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part, reduces in zip(parts, before, strict=True):
            part.set_requires_gradient_sync(reduces, recurse=False)


def _reduces(part: Any) -> bool:
    """Return what an FSDP2 module is set to; torch has no public way to ask."""
    try:
        group = part._get_fsdp_state()._fsdp_param_group
    except AttributeError:
        return True
    return bool(getattr(group, "reduce_grads", True))

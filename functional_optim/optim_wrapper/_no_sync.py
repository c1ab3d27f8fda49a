"""Turn gradient synchronisation off for micro-batches that do not end a window."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from functional_optim.algebra._torch_modes import untraced
from functional_optim.optim_wrapper._errors import ConfigValueError


class _UnsyncedModel:
    """The wrappers that keep synchronisation of a model off, and how to restore it."""

    def __init__(self) -> None:
        self.wrappers: set[int] = set()
        self.restore = contextlib.ExitStack()


_unsynced: weakref.WeakKeyDictionary[nn.Module, _UnsyncedModel]
_unsynced = weakref.WeakKeyDictionary()


class NoSync:
    """Gradient synchronisation of a model, turned off by one wrapper.

    The forward runs in a context, the backward after it: DDP reads the flag in the
    forward, FSDP in the backward, when the context is closed.
    """

    def __init__(self) -> None:
        self.model: _UnsyncedModel | None = None
        self._model_holds_gradients = False

    @untraced
    def begin(self, model: Any) -> None:
        """Turn synchronisation off until `end`, if the model synchronises at all."""
        if model not in _unsynced:
            _unsynced[model] = _UnsyncedModel()
        self.model = unsynced = _unsynced[model]
        has_context = hasattr(model, "no_sync")
        is_fsdp2 = not has_context and hasattr(model, "set_requires_gradient_sync")
        if not unsynced.wrappers and is_fsdp2:
            unsynced.restore.enter_context(_without_reduction(model))
        elif not unsynced.wrappers and has_context:
            unsynced.restore.enter_context(model.no_sync())
        unsynced.wrappers.add(id(self))
        self._model_holds_gradients |= is_fsdp2

    @untraced
    def end(self) -> None:
        """Restore what was set before, unless another wrapper keeps it turned off."""
        if self.model is not None and id(self) in self.model.wrappers:
            self.model.wrappers.remove(id(self))
            if not self.model.wrappers:
                self.model.restore.close()
        self.model = None

    @untraced
    def force_sync(self, model: nn.Module) -> None:
        """Turn synchronisation on, whichever wrapper turned it off.

        Once too often costs time; once too seldom, parameters of processes diverge.
        """
        if model in _unsynced:
            _unsynced[model].wrappers.clear()
            _unsynced[model].restore.close()
        self._model_holds_gradients = False

    def check_gradients_are_here(self, params: Sequence[Tensor]) -> None:
        """Refuse to save an open window of which FSDP2 holds the gradients."""
        sharded = [p for p in params if p.requires_grad and hasattr(p, "_local_tensor")]
        missing = bool(sharded) and all(p.grad is None for p in sharded)
        if self._model_holds_gradients or missing:
            raise ConfigValueError(
                "the gradients of an open window wait inside the model: fully_shard "
                "keeps them until it reduces them, and they would be missing in the "
                "state dict; save where a window ends, that is where "
                "wrapper.should_update() is true after update_params"
            )

    def __reduce__(self) -> tuple[type[NoSync], tuple[()]]:
        return NoSync, ()  # A copy of a wrapper has turned nothing off yet.


@contextlib.contextmanager
def _without_reduction(model: Any) -> Iterator[None]:
    """Turn reduction off in each FSDP2 module, and restore its flags at the end."""
    modules: Iterator[Any] = model.modules()
    parts = [part for part in modules if hasattr(part, "set_requires_gradient_sync")]
    before = [flag for part in parts for flag in _flags_of(part)]
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)
        for group, name, value in before:
            setattr(group, name, value)


def _flags_of(part: Any) -> list[tuple[Any, str, bool]]:
    """Return the flags of an FSDP2 module, which torch has no public way to read."""
    state = part._get_fsdp_state() if hasattr(part, "_get_fsdp_state") else None
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [
        (group, name, getattr(group, name))
        for group in groups
        for name in ("reduce_grads", "all_reduce_grads")
        if hasattr(group, name)
    ]

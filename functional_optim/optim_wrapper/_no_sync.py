"""Gradient synchronisation, kept off for the micro-batches that do not step."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

from functional_optim.algebra._torch_modes import untraced
from functional_optim.optim_wrapper._errors import ConfigValueError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn


class Suppression:
    """Keeps models from synchronising gradients until it is told to go on.

    The forward runs in a context, the backward after it. DDP asks in the forward
    whether to synchronise; FSDP asks in the backward, when the context is closed. A
    model that several wrappers train synchronises again when the last of them says so.
    """

    def __init__(self) -> None:
        self._silenced: _Silenced | None = None
        self._withholds = False

    def begin(self, model: nn.Module) -> None:
        """Suppress until `end`, if the model synchronises at all."""
        self.end()
        self._silenced = _Silenced.of(model)
        self._silenced.add(self)
        self._withholds |= _keeps_gradients(model)

    def end(self) -> None:
        """Restore what was set before, unless others suppress it, too."""
        if self._silenced is not None:
            silenced, self._silenced = self._silenced, None
            silenced.discard(self)

    def lift(self, model: nn.Module) -> None:
        """Let a model synchronise, whoever suppresses it.

        To synchronise once too often costs time; once too seldom, processes part.
        """
        _Silenced.of(model).clear()
        self._withholds = False

    def check_gradients_are_here(self, params: Sequence[Tensor]) -> None:
        """Refuse to save gradients that wait for a step inside FSDP2."""
        sharded = [p for p in params if p.requires_grad and hasattr(p, "_local_tensor")]
        missing = bool(sharded) and all(p.grad is None for p in sharded)
        if self._withholds or missing:
            raise ConfigValueError(
                "the gradients of an open window wait inside the model: fully_shard "
                "keeps them until it reduces them, and they would be missing in the "
                "state dict; save where a window ends, that is where "
                "wrapper.should_update() is true after update_params"
            )

    def __deepcopy__(self, memo: object) -> Suppression:
        return Suppression()  # A copy of a wrapper suppresses nothing yet.

    def __reduce__(self) -> tuple[type[Suppression], tuple[()]]:
        return Suppression, ()


_known: weakref.WeakKeyDictionary[nn.Module, _Silenced] = weakref.WeakKeyDictionary()


class _Silenced:
    """A model that may be kept from synchronising, and by whom."""

    def __init__(self) -> None:
        self._by: set[int] = set()
        self._restore = contextlib.ExitStack()
        self._model: weakref.ref[Any] | None = None

    @classmethod
    @untraced
    def of(cls, model: nn.Module) -> _Silenced:
        found = _known.get(model)
        if found is None:
            found = _known[model] = cls()
            found._model = weakref.ref(model)
        return found

    @untraced
    def add(self, holder: object) -> None:
        model = None if self._model is None else self._model()
        if not self._by and model is not None:
            for context in _suppressing(model):
                self._restore.enter_context(context)
        self._by.add(id(holder))

    @untraced
    def discard(self, holder: object) -> None:
        if id(holder) in self._by:
            self._by.discard(id(holder))
            if not self._by:
                self._restore.close()

    @untraced
    def clear(self) -> None:
        self._by.clear()
        self._restore.close()


def _keeps_gradients(model: Any) -> bool:
    """Whether gradients that are not synchronised stay inside: FSDP2."""
    return not hasattr(model, "no_sync") and hasattr(
        model, "set_requires_gradient_sync"
    )


def _suppressing(model: Any) -> Iterator[contextlib.AbstractContextManager[Any]]:
    if hasattr(model, "no_sync"):
        yield model.no_sync()
    elif _keeps_gradients(model):
        yield _without_reduction(model)


@contextlib.contextmanager
def _without_reduction(model: Any) -> Iterator[None]:
    """Suppress as FSDP2 does it, and restore what each of its modules was set to."""
    modules: Iterator[Any] = model.modules()
    parts = [part for part in modules if hasattr(part, "set_requires_gradient_sync")]
    before = [_flags_of(part) for part in parts]
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part, flags in zip(parts, before, strict=True):
            part.set_requires_gradient_sync(True, recurse=False)
            for group, name, value in flags:
                setattr(group, name, value)


def _flags_of(part: Any) -> list[tuple[Any, str, bool]]:
    """Return what an FSDP2 module is set to; torch has no public way to ask."""
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

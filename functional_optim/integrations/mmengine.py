"""Let the Runner of MMEngine train with the wrappers of this library: `register()`.

Call it once, before the Runner is built:

    from functional_optim.integrations.mmengine import register

    register()
    runner = Runner(
        ...,
        optim_wrapper=dict(
            type="functional_optim.OptimWrapper",
            optimizer=dict(type="SGD", lr=0.01, momentum=0.9),
            clip_grad=dict(max_norm=1.0),
        ),
    )

An instance works as well, and so does `optimizer=dict(type="fo.adamw", lr=1e-3)`. Rules
in `paramwise_cfg` are read by MMEngine's constructor, as long as the config does not
have `constructor="functional_optim.DefaultOptimWrapperConstructor"`.

Resuming needs what it needs without this library, too: MMEngine 0.10 saves objects, so
since torch 2.6 set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 to load what you trust.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.config._registries import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
)
from functional_optim.config._registry import Registry
from functional_optim.optim_wrapper._amp_wrapper import AmpOptimWrapper
from functional_optim.optim_wrapper._message_hub import MessageHub
from functional_optim.optim_wrapper._wrapper import OptimWrapper
from functional_optim.optim_wrapper._wrapper_dict import OptimWrapperDict

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["register"]

_SCOPES = ("functional_optim", "fo")
_MARK = "_knows_functional_optim"
"""What a method has that was replaced; whoever wraps it copies that."""

_logger = logging.getLogger("functional_optim")


def register() -> None:
    """Make this library known to MMEngine, which is as it was until this is called.

    - Its registries find `functional_optim.OptimWrapper` and all other names in our
      registries, and the presets as `fo.adamw` and so on; ours find what is in its.
    - Ours are registries to it: for `build_from_cfg`, and as parents of others.
    - Its `isinstance` checks take our wrappers for its own, in Runner and schedulers.
    - `FSDPStrategy` sets `use_fsdp` for our `AmpOptimWrapper` as for its own: its
      method `build_optim_wrapper` is replaced by one that calls it.
    - The gradient norm goes to its current message hub as `train/grad_norm`, and is
      read on the host only when the Runner writes a line of its log.
    - What we log goes to its current logger, and nowhere else.

    Calling it again changes nothing.

    Raises:
        ImportError: MMEngine is not installed.

    Example:
        >>> register()  # doctest: +SKIP
        >>> runner = Runner(..., optim_wrapper=wrapper)  # doctest: +SKIP
    """
    try:
        importlib.import_module("mmengine")
    except ModuleNotFoundError as error:
        raise ImportError(
            "functional_optim.integrations.mmengine needs MMEngine, which is not "
            "installed: pip install 'mmengine>=0.10'"
        ) from error
    optim = importlib.import_module("mmengine.optim")
    for wrapper in (OptimWrapper, AmpOptimWrapper, OptimWrapperDict):
        getattr(optim, wrapper.__name__).register(wrapper)
    registry = importlib.import_module("mmengine.registry")
    for root, own in (
        (registry.OPTIM_WRAPPERS, OPTIM_WRAPPERS),
        (registry.OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPER_CONSTRUCTORS),
        (registry.OPTIMIZERS, OPTIMIZERS),
    ):
        if "functional_optim" not in root.children:
            own.add_lookup(_found_in(root))
            _open_scope("functional_optim", root, own)
            _become_registry(own, registry)
    _open_scope("fo", registry.OPTIMIZERS, OPTIMIZERS)
    _open_scope("fo", OPTIMIZERS, OPTIMIZERS)
    if torch.distributed.is_available():  # Importing a Runner imports this as well.
        _follow_fsdp(importlib.import_module("mmengine._strategy").FSDPStrategy)
    if MessageHub.host is None:
        MessageHub.host = CurrentHub()
    _connect_logger()


def _open_scope(scope: str, root: Any, own: Registry) -> None:
    """Let a registry of MMEngine find names of one of ours behind a scope and a dot."""
    if scope in root.children:
        return
    plain = importlib.import_module("mmengine.registry").Registry

    def get(_: Any, key: str) -> Any:
        # As a whole: what is registered under it, such as fo.adamw, or can be imported.
        return own.get(key) or own.get(f"{scope}.{key}")

    # Looked up in ours each time, where users may register more.
    kind = type("Scope", (plain,), {"get": get})
    kind(root.name, parent=root, scope=scope)


def _found_in(root: Any) -> Callable[[str], Any]:
    """Return what looks a name up as MMEngine does, in the scope that is set now."""

    def find(key: str) -> Any:
        if key.partition(".")[0] in _SCOPES:
            return None  # That would lead back here.
        with root.switch_scope_and_registry(None) as registry:
            try:
                return (root if registry.scope in _SCOPES else registry).get(key)
            except RuntimeError:  # It tried to import a dotted name.
                return None

    return find


def _become_registry(own: Registry, theirs: Any) -> None:
    """Let a registry of ours be one of MMEngine's as well; it stays the same object.

    `mmengine.registry.build_from_cfg` takes it then, and it can be a parent.
    """

    def add_child(self: Any, child: Any) -> None:
        theirs.Registry._add_child(self, child)

        def find(key: str) -> Any:
            scope, _, name = key.partition(".")
            try:
                return child.get(name) if scope == child.scope else None
            except RuntimeError:  # It tried to import what it did not find.
                return None

        self.add_lookup(find)

    # What MMEngine's `__init__` sets; what it asks by methods, ours come first.
    also = {
        "_add_child": add_child,
        "_children": {},
        "_imported": True,
        "_locations": [],
        "_scope": "functional_optim",
        "build_func": staticmethod(theirs.build_from_cfg),
        "parent": None,
    }
    kind: Any = type("Registry", (type(own), theirs.Registry), also)
    own.__class__ = kind


def _follow_fsdp(strategy: Any) -> None:
    """Let the strategy share one scaler over its processes in our wrapper, too.

    Where a config does not say `use_fsdp`, it sets it for its own class, by its name.
    """
    build = strategy.build_optim_wrapper
    if hasattr(build, _MARK):
        return

    @functools.wraps(build)
    def build_optim_wrapper(self: Any, optim_wrapper: Any, model: Any = None) -> Any:
        kind = optim_wrapper.get("type") if hasattr(optim_wrapper, "get") else None
        if isinstance(kind, str) and kind.partition(".")[0] in _SCOPES:
            kind = OPTIM_WRAPPERS.get(kind)
        if kind is AmpOptimWrapper:
            optim_wrapper.setdefault("use_fsdp", True)
        return build(self, optim_wrapper, model)

    setattr(build_optim_wrapper, _MARK, True)
    strategy.build_optim_wrapper = build_optim_wrapper


class CurrentHub:
    """MMEngine's message hub: whichever is the current one, which is the Runner's.

    MMEngine's own wrapper stays with the one that was current when it was built, so
    that the norm of an instance built before its Runner gets lost.
    """

    def __init__(self) -> None:
        logs = importlib.import_module("mmengine.logging")
        self._hubs: Any = logs.MessageHub
        self._plain: Any = logs.HistoryBuffer
        module = importlib.import_module(
            "functional_optim.integrations._history_buffer"
        )
        bases = (module.DeferredHistory, logs.HistoryBuffer)
        self._deferred: Any = type("DeferredHistoryBuffer", bases, {})

    @property
    def current(self) -> Any:
        """MMEngine's current hub."""
        return self._hubs.get_current_instance()

    def update_scalar(self, key: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Note a number under a name; a tensor is not read before somebody looks."""
        hub = self.current
        history = hub.log_scalars.get(key)
        if history is None or not isinstance(value, Tensor):
            # Whether it is resumed, the hub decides on the first.
            hub.update_scalar(key, value, *args, **kwargs)
            return
        if type(history) is self._plain:
            history = self._deferred(*history.data, history.max_length)
            hub.log_scalars[key] = history
        history.update(value, args[0] if args else kwargs.get("count", 1))


class _ToCurrentLogger(logging.Handler):
    """Hands records to MMEngine's current logger, which writes them as its own."""

    def __init__(self) -> None:
        super().__init__()
        self._loggers: Any = importlib.import_module("mmengine.logging").MMLogger

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on a record."""
        current = self._loggers.get_current_instance()
        handed = copy.copy(record)
        # Its filter knows warnings that came before by `msg`.
        handed.name, handed.msg, handed.args = current.name, record.getMessage(), None
        current.handle(handed)


def _connect_logger() -> None:
    if any(isinstance(handler, _ToCurrentLogger) for handler in _logger.handlers):
        return
    _logger.addHandler(_ToCurrentLogger())
    # As MMEngine's loggers: a line stands there once, and handlers choose the level.
    _logger.propagate = False
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)

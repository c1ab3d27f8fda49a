"""Train with the wrappers of this library in the Runner of MMEngine: `register()`."""

from __future__ import annotations

import copy
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

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

__all__ = ["register"]

_SCOPES = ("functional_optim", "fo")
_MARK = "_knows_functional_optim"
"""An attribute of a replaced method, which wrappers of the method copy."""

_logger = logging.getLogger("functional_optim")


def register() -> None:
    """Register the classes of this library with MMEngine, before a Runner is built.

    - Its registries find `functional_optim.OptimWrapper` and all other names in our
      registries, and the presets as `fo.adamw` and so on; ours find the names in its.
    - Ours are registries to it: for `build_from_cfg`, and as parents of others.
    - Its `isinstance` checks in Runner and schedulers accept our wrappers.
    - `FSDPStrategy` sets `use_fsdp` for our `AmpOptimWrapper` as for its own: its
      method `build_optim_wrapper` is replaced by one that calls it.
    - The gradient norm goes to its current message hub as `train/grad_norm`, and is
      read on the host only when the Runner writes a line of its log.
    - Our log records go to its current logger, and nowhere else.

    Rules in `paramwise_cfg` are read by MMEngine's constructor, unless the config has
    `constructor="functional_optim.DefaultOptimWrapperConstructor"`. Calling it again
    changes nothing. Resuming needs TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 since torch 2.6,
    as it does without this library: MMEngine 0.10 saves objects.

    Raises:
        ImportError: MMEngine is not installed.

    Example:
        >>> register()  # doctest: +SKIP
        >>> runner = Runner(  # doctest: +SKIP
        ...     ...,
        ...     optim_wrapper=dict(
        ...         type="functional_optim.OptimWrapper",  # or an instance
        ...         optimizer=dict(type="SGD", lr=0.01),  # or type="fo.adamw"
        ...         clip_grad=dict(max_norm=1.0),
        ...     ),
        ... )
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
            own.add_lookup(_lookup_in(root))
            _open_scope("functional_optim", root, own)
            _become_registry(own, registry)
    _open_scope("fo", registry.OPTIMIZERS, OPTIMIZERS)
    _open_scope("fo", OPTIMIZERS, OPTIMIZERS)
    if torch.distributed.is_available():  # Importing a Runner imports this as well.
        _follow_fsdp(importlib.import_module("mmengine._strategy").FSDPStrategy)
    if MessageHub.host is None:
        MessageHub.host = _CurrentHub()
    _connect_logger()


def _open_scope(scope: str, root: Any, own: Registry) -> None:
    """Add the names of our registry to MMEngine's, behind a scope and a dot."""
    if scope in root.children:
        return
    plain = importlib.import_module("mmengine.registry").Registry

    def get(_: Any, key: str) -> Any:
        # Names such as fo.adamw are registered as a whole.
        return own.get(key) or own.get(f"{scope}.{key}")

    # Looked up in ours each time: users may register more.
    kind = type("Scope", (plain,), {"get": get})
    kind(root.name, parent=root, scope=scope)


def _lookup_in(root: Any) -> Callable[[str], Any]:
    """Return a function that looks a name up in MMEngine's current scope."""

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
    """Make our registry one of MMEngine's as well; it stays the same object."""

    def add_child(self: Any, child: Any) -> None:
        theirs.Registry._add_child(self, child)

        def find(key: str) -> Any:
            scope, _, name = key.partition(".")
            try:
                return child.get(name) if scope == child.scope else None
            except RuntimeError:  # It tried to import what it did not find.
                return None

        self.add_lookup(find)

    # The attributes that MMEngine's `__init__` sets; of methods, ours come first.
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
    """Make `FSDPStrategy` set `use_fsdp` for our `AmpOptimWrapper`, too."""
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


class _CurrentHub:
    """MMEngine's current message hub, whichever that is, with deferred histories.

    MMEngine's own wrapper keeps the hub that was current when it was built, and loses
    the norm of an instance that is built before its Runner.
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
        """Log a number under a name; tensors are read later."""
        hub = self.current
        history = hub.log_scalars.get(key)
        if history is None or not isinstance(value, Tensor):
            # With the first number the hub decides whether the history is resumed.
            hub.update_scalar(key, value, *args, **kwargs)
            return
        if type(history) is self._plain:
            history = self._deferred(*history.data, history.max_length)
            hub.log_scalars[key] = history
        history.update(value, args[0] if args else kwargs.get("count", 1))


class _ToCurrentLogger(logging.Handler):
    """A handler that passes records to MMEngine's current logger."""

    def __init__(self) -> None:
        super().__init__()
        self._loggers: Any = importlib.import_module("mmengine.logging").MMLogger

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on a copy of a record."""
        current = self._loggers.get_current_instance()
        passed = copy.copy(record)
        # Its filter recognizes repeated warnings by `msg`.
        passed.name, passed.msg, passed.args = current.name, record.getMessage(), None
        current.handle(passed)


def _connect_logger() -> None:
    if any(isinstance(handler, _ToCurrentLogger) for handler in _logger.handlers):
        return
    _logger.addHandler(_ToCurrentLogger())
    # As MMEngine's loggers: each line is written once, and handlers choose the level.
    _logger.propagate = False
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)

"""The registries of optimizers, wrappers and constructors, with their first entries."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from functional_optim import optimizers
from functional_optim.config._registry import Registry
from functional_optim.core._hyperparameters import is_zero
from functional_optim.core._transform import Transform
from functional_optim.optim_wrapper._amp_wrapper import AmpOptimWrapper
from functional_optim.optim_wrapper._wrapper import OptimWrapper
from functional_optim.torch_optimizer._optimizer import TransformOptimizer

_OPTIMIZER_ARGUMENTS = ("compile", "notes")
"""Arguments of the optimizer that a config has among those of a preset."""

_PACKAGES = (
    ("dadaptation", ""),
    ("lion_pytorch", ""),
    ("Sophia", ""),
    ("torch_npu.optim", ""),
    ("bitsandbytes.optim", "bnb_"),
)
"""Modules with optimizers, and what precedes their names where torch has the same."""

_logger = logging.getLogger("functional_optim")


class PresetOptimizer:
    """A preset as an optimizer: called with parameters first, as torch's classes."""

    def __init__(self, preset: Callable[..., Transform]) -> None:
        self.preset = preset
        self.__name__ = f"fo.{preset.__name__}"
        self.__doc__ = preset.__doc__
        own = inspect.signature(preset)
        params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        of_optimizer = inspect.signature(TransformOptimizer).parameters
        further = [of_optimizer[name] for name in _OPTIMIZER_ARGUMENTS]
        self.__signature__ = own.replace(
            parameters=[params, *own.parameters.values(), *further],
            return_annotation=TransformOptimizer,
        )

    def __call__(
        self, params: Iterable[Any], *args: Any, **options: Any
    ) -> TransformOptimizer:
        """Build the optimizer."""
        given = list(params)
        own = {k: options.pop(k) for k in _OPTIMIZER_ARGUMENTS if k in options}
        bound = inspect.signature(self.preset).bind(*args, **options)
        bound.apply_defaults()
        decay = bound.arguments.get("weight_decay")
        groups = [group for group in given if isinstance(group, Mapping)]
        decays = [group.get("weight_decay", 0) for group in groups]
        decays = [value for value in decays if not is_zero(value)]
        # A preset leaves out what a plain 0 switches off; some groups need it.
        needs_decay = bool(decays) and is_zero(decay)
        if needs_decay:
            bound.arguments["weight_decay"] = decays[0]
            given = [{"weight_decay": decay, **group} for group in groups]
        transform = self.preset(*bound.args, **bound.kwargs)
        optimizer = TransformOptimizer(given, transform, **own)
        if needs_decay:
            optimizer.defaults["weight_decay"] = decay
        return optimizer

    def __repr__(self) -> str:
        return f"<{self.__name__}>"


def _find_optimizer(name: str) -> Any:
    """Look an optimizer up in other packages that are installed."""
    for module_name, prefix in _PACKAGES:
        if importlib.util.find_spec(module_name.partition(".")[0]) is None:
            continue
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            _logger.warning("optimizers of %s are left out: %r", module_name, error)
            continue
        found = getattr(module, name.removeprefix(prefix), None)
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
            return found
    return None


def _preset_of(kind: Any) -> Any:
    """Return the optimizer of a preset that a config has as its type: `fo.adamw`."""
    for registered in OPTIMIZERS.module_dict.values():
        if isinstance(registered, PresetOptimizer) and registered.preset is kind:
            return registered
    return None


OPTIMIZERS = Registry("optimizer", replace=_preset_of)
"""Optimizers: those of torch, of this library, of packages that are installed.

`fo.adamw` and the like build a `TransformOptimizer` from a preset. Those of
`dadaptation`, `lion_pytorch`, `Sophia` and `bitsandbytes` are imported when needed;
where torch has one of the same name, that of bitsandbytes is `bnb_Adam`. torch's
Adafactor is `TorchAdafactor`, too; that of transformers is `transformers.Adafactor`.
"""

OPTIM_WRAPPERS = Registry("optimizer wrapper")
"""Optimizer wrappers."""

OPTIM_WRAPPER_CONSTRUCTORS = Registry("optimizer wrapper constructor")
"""Classes that build an optimizer wrapper for a model from a config."""


def _register_all() -> None:
    """Register torch's optimizers, the presets, and our optimizer and wrappers."""
    for name in dir(torch.optim):
        found = getattr(torch.optim, name)
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
            names = [name, "TorchAdafactor"] if name == "Adafactor" else [name]
            OPTIMIZERS.register_module(name=names, module=found)
    OPTIMIZERS.add_lookup(_find_optimizer)
    OPTIMIZERS.register_module(module=TransformOptimizer)
    for name in optimizers.__all__:
        preset = PresetOptimizer(getattr(optimizers, name))
        OPTIMIZERS.register_module(name=f"fo.{name}", module=preset)
    for wrapper in (OptimWrapper, AmpOptimWrapper):
        OPTIM_WRAPPERS.register_module(module=wrapper)


_register_all()

"""The registries that configs choose from, and what is in them from the start."""

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

_OF_OPTIMIZER = ("compile", "notes")
"""What a config says to the optimizer in the midst of a preset's own arguments."""


class PresetOptimizer:
    """A preset that takes parameters first, and makes a `TransformOptimizer` of them.

    Example:
        >>> import functional_optim as fo
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> PresetOptimizer(fo.sgd)(model.parameters(), lr=0.1).transform
        chain(ScaleByLearningRate(0.1))
    """

    def __init__(self, preset: Callable[..., Transform]) -> None:
        self.preset = preset
        self.__name__ = f"fo.{preset.__name__}"
        self.__doc__ = preset.__doc__
        own = inspect.signature(preset)
        params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        of_optimizer = inspect.signature(TransformOptimizer).parameters
        further = [of_optimizer[name] for name in _OF_OPTIMIZER]
        self.__signature__ = own.replace(
            parameters=[params, *own.parameters.values(), *further],
            return_annotation=TransformOptimizer,
        )

    def __call__(
        self, params: Iterable[Any], *args: Any, **options: Any
    ) -> TransformOptimizer:
        """Build the optimizer."""
        given = list(params)
        own_options = {k: options.pop(k) for k in _OF_OPTIMIZER if k in options}
        bound = inspect.signature(self.preset).bind(*args, **options)
        bound.apply_defaults()
        decay = bound.arguments.get("weight_decay")
        groups = [g for g in given if isinstance(g, Mapping)]
        own = [g["weight_decay"] for g in groups if "weight_decay" in g]
        own = [value for value in own if not is_zero(value)]
        if not own or decay is None or not is_zero(decay):
            transform = self.preset(*bound.args, **bound.kwargs)
            return TransformOptimizer(given, transform, **own_options)
        # A preset leaves out what a plain 0 switches off; some groups need it.
        bound.arguments["weight_decay"] = own[0]
        optimizer = TransformOptimizer(
            [{"weight_decay": decay, **group} for group in groups],
            self.preset(*bound.args, **bound.kwargs),
            **own_options,
        )
        optimizer.defaults["weight_decay"] = decay
        return optimizer

    def __repr__(self) -> str:
        return f"<{self.__name__}>"


_ELSEWHERE = (
    ("dadaptation", ""),
    ("lion_pytorch", ""),
    ("Sophia", ""),
    ("torch_npu.optim", ""),
    ("bitsandbytes.optim", "bnb_"),
)
"""Modules with optimizers, and what precedes their names where torch has the same."""


_logger = logging.getLogger("functional_optim")


def _find_optimizer(name: str) -> Any:
    """Look for an optimizer in other packages, as far as they are installed."""
    for module_name, prefix in _ELSEWHERE:
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
    """Return the optimizer of a preset that stands in a config itself: `fo.adamw`."""
    for registered in OPTIMIZERS.module_dict.values():
        if isinstance(registered, PresetOptimizer) and registered.preset is kind:
            return registered
    return None


OPTIMIZERS = Registry("optimizer", find=_find_optimizer, replace=_preset_of)
"""Optimizers: those of torch, of this library, of packages that are installed.

`fo.adamw` and the like build a `TransformOptimizer` from a preset. Those of
`dadaptation`, `lion_pytorch`, `Sophia` and `bitsandbytes` are looked for when asked
for; where torch has one of the same name, that of bitsandbytes is `bnb_Adam`. torch's
Adafactor is `TorchAdafactor`, too; that of transformers is `transformers.Adafactor`.
"""


OPTIM_WRAPPERS = Registry("optimizer wrapper")
"""Optimizer wrappers."""

OPTIM_WRAPPERS.register_module(module=OptimWrapper)
OPTIM_WRAPPERS.register_module(module=AmpOptimWrapper)


OPTIM_WRAPPER_CONSTRUCTORS = Registry("optimizer wrapper constructor")
"""Classes that build an optimizer wrapper for a model from a config."""


def _fill_optimizers() -> None:
    for name in dir(torch.optim):
        found = getattr(torch.optim, name)
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
            names = [name, "TorchAdafactor"] if name == "Adafactor" else [name]
            OPTIMIZERS.register_module(name=names, module=found)
    OPTIMIZERS.register_module(module=TransformOptimizer)
    for name in optimizers.__all__:
        preset = PresetOptimizer(getattr(optimizers, name))
        OPTIMIZERS.register_module(name=f"fo.{name}", module=preset)


_fill_optimizers()

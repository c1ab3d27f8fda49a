"""The registries that configs choose from, and what is in them from the start."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

import torch

from functional_optim import optimizers
from functional_optim.config._registry import Registry
from functional_optim.facade._presets import PresetOptimizer
from functional_optim.torch_optimizer._optimizer import TransformOptimizer

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

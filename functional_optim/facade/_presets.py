"""Presets as optimizers that configs can name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from functional_optim._resolving import is_zero
from functional_optim.core._transform import Transform
from functional_optim.torch_optimizer._optimizer import TransformOptimizer

_OF_OPTIMIZER = ("compile", "layout", "notes")
"""What a config says to the optimizer in the midst of a preset's own arguments."""


class PresetOptimizer:
    """A preset that takes parameters first, and makes a `TransformOptimizer` of them.

    Args:
        preset: A function from hyperparameters to a transform.

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
        """Build the optimizer.

        Args:
            params: As `TransformOptimizer` takes them: also groups with an `lr`, a
                `weight_decay` and so on of their own.
            args: Arguments of the preset.
            options: Arguments of the preset; `compile`, `layout` and `notes` of the
                optimizer.
        """
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

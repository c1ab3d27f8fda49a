"""Optimizer wrappers from configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from functional_optim.algebra._torch_modes import untraced
from functional_optim.config._constructor import DefaultOptimWrapperConstructor
from functional_optim.config._registries import OPTIM_WRAPPER_CONSTRUCTORS
from functional_optim.config._validation import copied

if TYPE_CHECKING:
    from torch import nn

    from functional_optim.optim_wrapper._wrapper import OptimWrapper


@untraced
def build_optim_wrapper(model: nn.Module, cfg: Mapping[str, Any]) -> OptimWrapper:
    """Build the optimizer wrapper that a config describes.

    Args:
        model: The model. A parallel wrapper around it, such as DDP, is looked through.
        cfg: The config, which is not changed. `optimizer` is the config of the
            optimizer: its `type`, a name in `OPTIMIZERS` or a class, and its arguments.
            All else may be left out: `type`, a name in `OPTIM_WRAPPERS` or a class,
            "OptimWrapper" by default, and its arguments, such as `accumulative_counts`
            and `clip_grad`; `paramwise_cfg` and `constructor`, a name in
            `OPTIM_WRAPPER_CONSTRUCTORS` or a class, see
            `DefaultOptimWrapperConstructor`.

    Returns:
        The wrapper: what the constructor returns.

    Raises:
        TypeError: an argument is unknown, or of a type that means nothing there.
        ValueError: a name is not registered, which is a KeyError, too; a rule is
            misspelt; a number is out of range.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict(dict(backbone=nn.Linear(1, 1), head=nn.Linear(1, 1)))
        >>> wrapper = build_optim_wrapper(
        ...     model,
        ...     dict(
        ...         optimizer=dict(type="SGD", lr=0.1, momentum=0.9),
        ...         paramwise_cfg=dict(custom_keys={"backbone": dict(lr_mult=0.5)}),
        ...     ),
        ... )
        >>> [group["lr"] for group in wrapper.optimizer.param_groups]
        [0.05, 0.05, 0.1, 0.1]

    Source:
        mmengine.optim.build_optim_wrapper 0.10.
    """
    if not isinstance(cfg, Mapping) and hasattr(cfg, "keys"):
        cfg = {key: cfg[key] for key in cfg}  # MMEngine's Config is no Mapping.
    if not isinstance(cfg, Mapping):
        raise TypeError(
            "cfg must be a dict such as dict(optimizer=dict(type='SGD', lr=0.01)), got "
            f"{cfg!r}"
        )
    wrapper_cfg = copied(cfg)
    # By name, so that another one registered under it is taken.
    default = DefaultOptimWrapperConstructor.__name__
    kind = wrapper_cfg.pop("constructor", default)
    paramwise_cfg = wrapper_cfg.pop("paramwise_cfg", None)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {
            "type": kind,
            "optim_wrapper_cfg": wrapper_cfg,
            "paramwise_cfg": paramwise_cfg,
        }
    )
    wrapper: OptimWrapper = constructor(model)
    return wrapper

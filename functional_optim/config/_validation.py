"""Configs: copies that are ours to change, and keys that stand in the wrong place."""

from __future__ import annotations

import copy
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from functional_optim._messages import did_you_mean
from functional_optim.config._registry import arguments_of

_COMPILED = "OptimizedModule"


_AROUND = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


_ENGINES = {"DeepSpeedEngine"}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without what runs it in parallel, or compiled.

    That is known by its class: one of torch's, one derived from it, or one whose name
    ends in DataParallel. An attribute `module` alone says nothing, as a model may call
    a part of itself so, and would lose its other parts.

    Example:
        >>> inner = nn.Linear(2, 1)
        >>> unwrapped(nn.DataParallel(inner)) is inner
        True
        >>> model = nn.ModuleDict({"module": inner, "head": nn.Linear(1, 1)})
        >>> unwrapped(model) is model
        True
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    names = [cls.__name__ for cls in type(model).__mro__]
    if _COMPILED in names:
        inner = getattr(model, "_orig_mod", None)
    elif any(name.endswith(_AROUND) or name in _ENGINES for name in names):
        inner = getattr(model, "module", None)
    else:
        return None
    if not isinstance(inner, nn.Module):
        return None
    # Whatever it is called: nothing may get lost.
    whole = {id(param) for param in model.parameters()}
    return inner if whole == {id(param) for param in inner.parameters()} else None


_OF_BUILDING = ("constructor", "paramwise_cfg")


def copied(config: Any) -> Any:
    """Copy what holds a config together; what stands in it stays the same object.

    A dict of a class of its own, such as MMEngine's ConfigDict, keeps that class.
    Tensors are copied, too, as schedulers write into a learning rate that is one.

    Example:
        >>> config = {"optimizer": {"betas": [0.9, 0.99]}}
        >>> copied(config)["optimizer"]["betas"].append(0.0)
        >>> config
        {'optimizer': {'betas': [0.9, 0.99]}}
    """
    if isinstance(config, Mapping):
        new: Any = copy.copy(config) if isinstance(config, dict) else {}
        for key, value in config.items():
            new[key] = copied(value)
        return new
    if type(config) in {list, tuple}:
        return type(config)(map(copied, config))
    if isinstance(config, Tensor) and not config.requires_grad:
        return config.clone()
    return config


def check_places(
    wrapper_cfg: Mapping[str, Any],
    wrapper: Callable[..., Any],
    optimizer_cfg: Mapping[str, Any],
    optimizer: Callable[..., Any],
) -> None:
    """Refuse what stands in the config of the wrapper, but is the optimizer's, et v. v.

    What nobody knows is refused where it is built.
    """
    outer = {*arguments_of(wrapper), *_OF_BUILDING}
    inner = set(arguments_of(optimizer))
    for key in set(optimizer_cfg) & outer - inner - {"type", "optimizer"}:
        raise TypeError(
            f"optimizer has {key}={optimizer_cfg[key]!r}, which belongs beside it: "
            f"dict(optimizer=dict(...), {key}=...)"
        )
    for key in set(wrapper_cfg) - outer - {"type", "_scope_"}:
        value = wrapper_cfg[key]
        if key in inner:
            raise TypeError(
                f"{key}={value!r} belongs into the optimizer: optimizer=dict({key}=...)"
            )
        hint = did_you_mean(str(key), _OF_BUILDING, cutoff=0.75)
        if hint.startswith("did"):
            raise TypeError(f"an optimizer wrapper takes no {key}={value!r}; {hint}")


def first_argument_of(optimizer: Callable[..., Any]) -> str:
    """Return what an optimizer calls its parameters: its first argument.

    Example:
        >>> first_argument_of(lambda model_params, lr=0.1: None)
        'model_params'
    """
    try:
        first = next(iter(inspect.signature(optimizer).parameters.values()), None)
    except ValueError:  # Builtins do not tell.
        first = None
    if first is None or first.kind in {first.VAR_POSITIONAL, first.VAR_KEYWORD}:
        return "params"
    return first.name


def check_number(key: str, value: Any, *, multiplied: bool) -> None:
    """Refuse a setting of the optimizer that is no number, or that nobody can use."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    by_step_or_name = callable(value) or isinstance(value, Mapping)
    fine = value is None or is_number or isinstance(value, Tensor)
    if not fine and (multiplied or not by_step_or_name):
        msg = f"{key} in optimizer must be a number, got {value!r}"
        if by_step_or_name:
            msg += "; multiply a schedule, or a map by name, by MultiplyParamwise"
        raise TypeError(msg)
    if is_number and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{key} in optimizer must be finite and >= 0, got {value!r}")

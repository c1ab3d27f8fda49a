"""Copy and validate configs, and strip parallel wrappers off a model."""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from functional_optim._messages import close_matches, did_you_mean
from functional_optim.config._paramwise import check_nonnegative
from functional_optim.config._registry import arguments_of

_PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
_BUILD_KEYS = ("constructor", "paramwise_cfg")


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return a model without the wrappers that run it in parallel, or compiled.

    They are known by the name of their class: an attribute `module` may be a part of a
    model, which would lose its other parts.
    """
    while (inner := _wrapped_model(model)) is not None:
        model = inner
    return model


def _wrapped_model(model: nn.Module) -> nn.Module | None:
    names = [cls.__name__ for cls in type(model).__mro__]
    if "OptimizedModule" in names:
        inner = getattr(model, "_orig_mod", None)
    elif any(name.endswith(_PARALLEL) or name == "DeepSpeedEngine" for name in names):
        inner = getattr(model, "module", None)
    else:
        return None
    if not isinstance(inner, nn.Module):
        return None
    # Whatever its name: no parameter may get lost.
    whole = {id(param) for param in model.parameters()}
    return inner if whole == {id(param) for param in inner.parameters()} else None


def copy_config(config: Any) -> Any:
    """Copy the dicts, lists, tuples and tensors of a config, and nothing else."""
    if isinstance(config, Mapping):
        # MMEngine's ConfigDict keeps its class.
        new: Any = copy.copy(config) if isinstance(config, dict) else {}
        for key, value in config.items():
            new[key] = copy_config(value)
        return new
    if type(config) in {list, tuple}:
        return type(config)(map(copy_config, config))
    if isinstance(config, Tensor) and not config.requires_grad:
        return config.clone()  # Schedulers write into a learning rate.
    return config


def check_misplaced_keys(
    wrapper_cfg: Mapping[str, Any],
    wrapper: Callable[..., Any],
    optimizer_cfg: Mapping[str, Any],
    optimizer: Callable[..., Any],
) -> None:
    """Refuse arguments of the optimizer in the wrapper's config, and vice versa."""
    outer = {*arguments_of(wrapper), *_BUILD_KEYS}
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
        if close_matches(str(key), _BUILD_KEYS, cutoff=0.75):
            hint = did_you_mean(str(key), _BUILD_KEYS, cutoff=0.75)
            raise TypeError(f"an optimizer wrapper takes no {key}={value!r}; {hint}")


def first_argument(optimizer: Callable[..., Any]) -> str:
    """Return the name of the first argument of an optimizer: its parameters."""
    try:
        first = next(iter(inspect.signature(optimizer).parameters.values()), None)
    except ValueError:  # Builtins have no signature.
        first = None
    if first is None or first.kind in {first.VAR_POSITIONAL, first.VAR_KEYWORD}:
        return "params"
    return first.name


def check_base_value(key: str, value: Any, *, multiplied: bool) -> None:
    """Validate the `lr` or `weight_decay` in the config of an optimizer."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    by_step_or_name = callable(value) or isinstance(value, Mapping)
    fine = value is None or is_number or isinstance(value, Tensor)
    if not fine and (multiplied or not by_step_or_name):
        remedy = "; multiply a schedule, or a map by name, by MultiplyParamwise"
        raise TypeError(
            f"{key} in optimizer must be a number, got {value!r}"
            f"{remedy if by_step_or_name else ''}"
        )
    if is_number:
        check_nonnegative(f"{key} in optimizer", value)

"""Schedules inside transforms: their count, and their values now.

A schedule is evaluated at the number of updates that the transform holding it has
emitted, before this one is counted. The count is a global scalar of the state, so a
parameter without a gradient does not fall behind the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functional_optim._all_parameters import check_by_name
from functional_optim._hoisting import once
from functional_optim.algebra._tensor_map import device_of
from functional_optim.core._validation import check_parameters
from functional_optim.core._value_class import with_fields

if TYPE_CHECKING:
    from functional_optim.core._hyperparameters import Schedule
    from functional_optim.core._transform import TensorMap


class ScheduleState(NamedTuple):
    """How often a transform with schedules has emitted: what they are evaluated at.

    Attributes:
        num_updates: Updates emitted so far. Tensor, shape (), float64.

    Example:
        >>> from functional_optim import Scale
        >>> Scale(lambda step: 0.5**step).init({"w": torch.ones(2)})
        ScheduleState(num_updates=tensor(0., dtype=torch.float64))
    """

    num_updates: Tensor


def is_schedule(value: Any) -> bool:
    """Whether a hyperparameter is a schedule."""
    # The plain kinds first: torch.compile cannot ask a dict whether it is callable.
    return not isinstance(value, (float, Tensor, dict)) and callable(value)


def scheduled(transform: Any) -> bool:
    """Whether a transform of ours holds a schedule."""
    for name in transform._hyperparameters:
        value = getattr(transform, name)
        parts = value if isinstance(value, tuple) else (value,)
        if any(is_schedule(part) for part in parts):
            return True
    return False


def init_hyperparameters(
    transform: Any, params: TensorMap
) -> ScheduleState | tuple[()]:
    """Check maps by name, and return the state of the schedules: `()` without any.

    Args:
        transform: A transform of ours.
        params: All parameters that it will see.

    Raises:
        ValueError: a map lacks a parameter, or names one that does not exist;
            parameters on several devices.
        TypeError: `params` is no map from name to dense floating-point tensor.
    """
    check_parameters(params)
    for name in transform._hyperparameters:
        value = getattr(transform, name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, dict):
                check_by_name(name, part, params)
    if not scheduled(transform):
        return ()
    zero = torch.zeros((), dtype=torch.float64, device=device_of(params))
    return ScheduleState(zero)


def evaluate(
    transform: Any, state: ScheduleState | tuple[()], updates: TensorMap
) -> tuple[Any, ScheduleState | tuple[()]]:
    """Return the transform with its schedules replaced by their values now.

    Args:
        transform: A transform of ours.
        state: What `init_hyperparameters` or the last `evaluate` returned.
        updates: This step's updates; the count stands still if there are none.

    Returns:
        The transform without schedules, and the state after this update.

    Raises:
        ValueError: the transform holds a schedule and the state was made without.
    """
    if not scheduled(transform):
        return transform, state
    if not isinstance(state, ScheduleState):
        msg = (
            f"{transform!r} holds a schedule, but its state was made without; call "
            "init again after replacing a number by a schedule"
        )
        raise ValueError(msg)
    now: dict[str, Any] = {}
    for name in transform._hyperparameters:
        value = getattr(transform, name)
        if isinstance(value, tuple):
            now[name] = tuple(value_at(part, state.num_updates) for part in value)
        elif is_schedule(value):
            now[name] = value_at(value, state.num_updates)
    count = once(torch.add, state.num_updates, 1) if updates else state.num_updates
    return with_fields(transform, **now), ScheduleState(count)


def value_at(value: Any, count: Tensor) -> Any:
    """Evaluate a schedule; what it returns is brought to float64.

    Args:
        value: Any hyperparameter; what is no schedule is returned as it is.
        count: Where to evaluate it. Tensor, shape (), float64.

    Raises:
        TypeError: the schedule returned something else than a number or a tensor.
        ValueError: it returned a tensor that is not 0-dim.
    """
    if not is_schedule(value):
        return value
    return once(_evaluated, value, count)


def _evaluated(value: Schedule, count: Tensor) -> Tensor:
    result = value(count)
    if not isinstance(result, (int, float, Tensor)):
        msg = f"schedule {value!r} must return a number or a 0-dim tensor, got {result}"
        raise TypeError(msg)
    if isinstance(result, Tensor) and result.ndim != 0:
        shape = tuple(result.shape)
        msg = f"schedule {value!r} must return a 0-dim tensor, got shape {shape}"
        raise ValueError(msg)
    return torch.as_tensor(result, dtype=torch.float64, device=count.device)

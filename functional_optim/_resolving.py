"""What a transform, or a number in it, is for one parameter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from functional_optim._messages import lookup

T = TypeVar("T")


def resolve(transform: T, name: str, param: Tensor) -> T:
    """Return what a transform is for one parameter: constants instead of rules.

    Maps by name, masks, labels and rules are replaced by this parameter's value, also
    inside combinators. Two parameters whose resolved transforms are equal can be
    processed together.

    Args:
        transform: Any transform; one that is not ours is returned as it is.
        name: Name of the parameter.
        param: The parameter.

    Returns:
        A transform of the same type.

    Raises:
        ValueError: a map has no entry for this name.

    Example:
        >>> import torch
        >>> from functional_optim.transforms import AddDecayedWeights
        >>> decay = AddDecayedWeights({"w": 0.1, "b": 0.0})
        >>> resolve(decay, "b", torch.zeros(3))
        AddDecayedWeights(0.0)
    """
    if not dataclasses.is_dataclass(transform) or isinstance(transform, type):
        return transform
    own = getattr(transform, "resolved", None)
    if own is not None:
        chosen: T = own(name, param)
        return chosen
    changes = {
        field.name: field.metadata["resolve"](
            getattr(transform, field.name), name, param
        )
        for field in dataclasses.fields(transform)
        if "resolve" in field.metadata
    }
    return dataclasses.replace(transform, **changes) if changes else transform


def resolved_number(value: Any, name: str, param: Tensor) -> Any:
    """Return a hyperparameter for one parameter: a map's entry, else the value.

    Raises:
        ValueError: a map has no entry for this name.
    """
    if isinstance(value, tuple):
        return tuple(resolved_number(part, name, param) for part in value)
    return lookup(value, [name])[0] if isinstance(value, Mapping) else value


def resolved_never_0(value: Any, name: str, param: Tensor) -> Any:
    """As `resolved_number`; a 0 out of a map is no plain 0, as the map is none."""
    found = resolved_number(value, name, param)
    if isinstance(value, Mapping) and is_zero(found):
        return _zero(param.device)
    return found


@functools.cache
def _zero(device: torch.device) -> Tensor:
    """Return one 0 for all, so that parameters that have it can go together."""
    return torch.zeros((), dtype=torch.float64, device=device)


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is a plain 0, so that what it scales can be left out.

    A tensor, a schedule or a map is never a plain 0: its value is not looked at.
    """
    return isinstance(value, (int, float)) and value == 0

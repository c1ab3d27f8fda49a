"""Compare, hash and print frozen dataclasses by value.

Two values are equal if their fields are, tensors compared by dtype, device and numbers.
They print as they are written, without the arguments that have their default.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor


def same_value(
    a: Any, b: Any, *, tensors: Literal["value", "identity"] = "value"
) -> bool:
    """Compare by value; tensors by dtype, device and numbers, or by identity.

    By identity no device value is read, and no later write can make two differ.

    Example:
        >>> one = torch.ones(2)
        >>> same_value({"w": one}, {"w": torch.ones(2)})
        True
        >>> same_value((one, 0.5), (torch.ones(2), 0.5), tensors="identity")
        False
    """
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            tensors == "value"
            and isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and (a.dtype, a.device) == (b.dtype, b.device)
            and torch.equal(a, b)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        # In order: the first rule that fits wins.
        a, b = tuple(a.items()), tuple(b.items())
    elif vars(type(a)).get("__eq__") is value_equal:
        a, b = _field_values(a), _field_values(b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(
            same_value(one, other, tensors=tensors)
            for one, other in zip(a, b, strict=True)
        )
    return bool(a == b)


def _field_values(value: Any) -> tuple[Any, ...]:
    return tuple(getattr(value, field.name) for field in dataclasses.fields(value))


def replace_fields(value: Any, /, **fields: Any) -> Any:
    """Return a copy with other fields, which are not checked again."""
    other = copy.copy(value)
    for name, part in fields.items():
        object.__setattr__(other, name, part)
    return other


def value_equal(self: Any, other: Any) -> Any:
    """`__eq__` of a value."""
    return same_value(self, other) if type(self) is type(other) else NotImplemented


def value_hash(self: Any) -> int:
    """`__hash__` of a value: over its type and plain fields."""
    return hash((type(self), *map(_hashable, _field_values(self))))


def _hashable(value: Any) -> Any:
    """Replace tensors and maps, which have no hash by value, by None."""
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    return None if isinstance(value, (Tensor, dict)) else value


def value_repr(self: Any) -> str:
    """`__repr__` of a value: the call that makes it."""
    return format_call(self, format_value)


def format_call(value_object: Any, show: Callable[[Any], str]) -> str:
    """Format the call that constructs a frozen dataclass."""
    parts = []
    for field in dataclasses.fields(value_object):
        value = getattr(value_object, field.name)
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        if default is dataclasses.MISSING or not same_value(value, default):
            text = show(value)
            parts.append(f"{field.name}={text}" if field.kw_only else text)
    return f"{type(value_object).__name__}({', '.join(parts)})"


def format_value(value: Any) -> str:
    """Format a value: functions by name, all else by `repr`."""
    if type(value) is tuple:
        parts = [format_value(part) for part in value]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if isinstance(value, dict):
        pairs = [f"{format_value(k)}: {format_value(v)}" for k, v in value.items()]
        return f"{{{', '.join(pairs)}}}"
    name = getattr(value, "__qualname__", None)
    return repr(value) if name is None else str(name)

"""Values: how a frozen dataclass compares, hashes and prints.

Two values are equal if their fields are, tensors compared by dtype, device and numbers.
They print as they are written, without the arguments that have their default.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


def same_value(a: object, b: object) -> bool:
    """Compare by value: tensors by dtype, device and numbers, the rest by `==`.

    Example:
        >>> same_value({"w": torch.ones(2)}, {"w": torch.ones(2)})
        True
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and (a.dtype, a.device) == (b.dtype, b.device)
            and bool(torch.equal(a, b))
        )
    return _same(a, b, same_value)


def same_for_good(a: object, b: object) -> bool:
    """Compare by value, and tensors by identity: others may be written to.

    Example:
        >>> one = torch.ones(2)
        >>> same_for_good((one, 0.5), (one, 0.5)), same_for_good(one, torch.ones(2))
        (True, False)
    """
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    if type(a) is type(b) and type(a).__eq__ is equal:
        values: Any = a
        return all(
            same_for_good(getattr(a, field.name), getattr(b, field.name))
            for field in dataclasses.fields(values)
        )
    return _same(a, b, same_for_good)


def _same(a: object, b: object, same: Callable[[object, object], bool]) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        # In order: the first rule that fits wins.
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def with_fields(value: Any, /, **fields: Any) -> Any:
    """Return a copy with other fields, which are not checked again."""
    other = copy.copy(value)
    for name, part in fields.items():
        object.__setattr__(other, name, part)
    return other


def equal(self: Any, other: Any) -> Any:
    """`__eq__` of a value."""
    if type(self) is not type(other):
        return NotImplemented
    return all(
        same_value(getattr(self, field.name), getattr(other, field.name))
        for field in dataclasses.fields(self)
    )


def hash_of(self: Any) -> int:
    """`__hash__` of a value: over its type and plain fields."""
    values = (getattr(self, field.name) for field in dataclasses.fields(self))
    return hash((type(self), *map(_hashable, values)))


def _hashable(value: Any) -> Any:
    """Leave out what has no hash by value: tensors and maps."""
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    return None if isinstance(value, (Tensor, dict)) else value


def repr_of(self: Any) -> str:
    """`__repr__` of a value: the call that makes it."""
    return written(self, shown_value)


def written(value_object: Any, show: Callable[[Any], str]) -> str:
    """Return the call that makes a frozen dataclass, its arguments shown by `show`."""
    parts = []
    for field in dataclasses.fields(value_object):
        value = getattr(value_object, field.name)
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        if default is dataclasses.MISSING or not same_value(value, default):
            text = show(value)
            parts.append(f"{field.name}={text}" if field.kw_only else text)
    return f"{type(value_object).__name__}({', '.join(parts)})"


def shown_value(value: Any) -> str:
    """Return a value as one writes it: functions by name, all else by `repr`."""
    if type(value) is tuple:
        parts = [shown_value(part) for part in value]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if isinstance(value, dict):
        pairs = [f"{shown_value(k)}: {shown_value(v)}" for k, v in value.items()]
        return f"{{{', '.join(pairs)}}}"
    name = getattr(value, "__qualname__", None)
    return repr(value) if name is None else str(name)

"""Tensor maps: lookup, copies, and properties of their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import (
    TypeAlias,
    TypeVar,
)

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._torch_modes import has_tangents

V = TypeVar("V")

TensorMap: TypeAlias = dict[str, Tensor]
"""Tensors by dotted parameter name, in the order of `named_parameters()`."""

_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}

_SIXTEEN_BIT = {torch.float16, torch.bfloat16}


def copied(tensors: TensorMap) -> TensorMap:
    """Return a map of new tensors with the same numbers."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def device_of(tensors: TensorMap) -> torch.device | None:
    """Return the device of a map, None if it is empty."""
    for tensor in tensors.values():
        return tensor.device
    return None


def is_16_bit(tensor: Tensor) -> bool:
    """Whether a tensor is float16 or bfloat16."""
    return tensor.dtype in _SIXTEEN_BIT


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors are plain: no subclasses, which may store elsewhere."""
    return set(map(type, tensors)) <= _PLAIN_TYPES


def is_readable(tensor: Tensor) -> bool:
    """Whether `.item()` waits for no device and breaks no trace."""
    return (
        tensor.is_cpu
        and are_plain([tensor])
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not has_tangents()
        and not torch._C._len_torch_dispatch_stack()
    )


def can_use_foreach(tensors: Sequence[Tensor]) -> bool:
    """Whether `torch._foreach_*` may run on tensors.

    foreach has no vmap rule, fails inside `torch.func.grad`, and lacks DTensor rules,
    out= has no forward mode;
    the compiler fuses ordinary operations as well. In place is safe only where no
    graph is recorded.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not has_tangents()
        and are_plain(tensors)
        and not (tensors and tensors[0].is_meta)  # There foreach reads a 0-dim operand.
    )


def lookup(values: Mapping[str, V], names: Iterable[str]) -> list[V]:
    """Return the entries of a map at some names, in the order of the names."""
    try:
        return list(map(values.__getitem__, names))
    except KeyError as error:
        raise ValueError(
            f"no entry for {error.args[0]!r}, only for {format_names(values)}; call "
            "init again after adding parameters, and give a value for every name in a "
            "map"
        ) from None


def subset(tensors: Mapping[str, V], names: Iterable[str]) -> dict[str, V]:
    """Return the entries of the names that a map has, in the order of the names."""
    return {name: tensors[name] for name in names if name in tensors}

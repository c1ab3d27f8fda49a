"""Where parameters lie: each in memory of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from functional_optim.core._validation import check_parameters
from functional_optim.execution._tensor_memory import is_dense
from functional_optim.torch_optimizer._sharding import check_no_dtensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from functional_optim.core._transform import TensorMap


def check_apart(params: TensorMap) -> None:
    """Refuse parameters that lie in the same memory.

    Raises:
        ValueError: naming both; or a DTensor, whose memory is elsewhere.
    """
    check_parameters(params)
    check_no_dtensor(params)
    near: list[tuple[int, str]] = []
    for start, end, name in sorted(_spans(params)):
        near = [(its_end, other) for its_end, other in near if start < its_end]
        for _, other in near:
            if _meet(params, other, name):
                raise ValueError(_together(other, name))
        near.append((end, name))


def _together(first: str, second: str) -> str:
    return (
        f"parameters {first!r} and {second!r} lie in the same memory: an update of one "
        "would change the other; pass one of them, or tie the modules (a.weight = "
        "b.weight) instead of the memory"
    )


def _spans(params: TensorMap) -> Iterator[tuple[int, int, str]]:
    """Yield where parameters begin and end; refuse those that overlap themselves."""
    for name, param in params.items():
        if param.numel() == 0 or param.is_meta:
            continue
        dense = is_dense(param)
        if not dense and _places(param).unique().numel() < param.numel():
            msg = (
                f"parameter {name!r} overlaps itself: several elements lie in one "
                "place in memory (expand); pass param.clone()"
            )
            raise ValueError(msg)
        sides = zip(param.shape, param.stride(), strict=True)
        length = 1 + sum((size - 1) * stride for size, stride in sides)
        start = param.data_ptr()
        yield start, start + length * param.itemsize, name


def _meet(params: TensorMap, first: str, second: str) -> bool:
    """Whether two parameters whose spans overlap share an element."""
    one, two = params[first], params[second]
    if is_dense(one) and is_dense(two):
        return True
    if one.dtype != two.dtype:
        return True  # Nobody means it.
    places = [_places(p) + p.data_ptr() // p.itemsize for p in (one, two)]
    return bool(torch.isin(*places).any())


def _places(tensor: Tensor) -> Tensor:
    """Return where the elements lie, counted in elements from the first."""
    found = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = (found[:, None] + stride * torch.arange(size)).reshape(-1)
    return found

"""Where parameters lie: each in memory of its own."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from functional_optim._structure import check_parameters
from functional_optim.execution._memory import is_dense

if TYPE_CHECKING:
    from collections.abc import Iterable

    from functional_optim._types import TensorMap


def check_apart(params: TensorMap) -> None:
    """Refuse parameters that lie in the same memory.

    Raises:
        ValueError: naming both.
    """
    check_parameters(params)
    spans = sorted(_spans(params))
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            msg = (
                f"parameters {first!r} and {second!r} lie in the same memory: an "
                "update of one would change the other; pass one of them, or tie the "
                "modules (a.weight = b.weight) instead of the memory"
            )
            raise ValueError(msg)


def _spans(params: TensorMap) -> Iterable[tuple[int, int, str]]:
    for name, param in params.items():
        if param.numel() == 0 or param.is_meta:
            continue
        if torch._debug_has_internal_overlap(param) == 1:
            msg = (
                f"parameter {name!r} overlaps itself: several elements lie in one "
                "place in memory (expand); pass param.clone()"
            )
            raise ValueError(msg)
        if is_dense(param):
            start = param.data_ptr()
            yield start, start + param.numel() * param.itemsize, name

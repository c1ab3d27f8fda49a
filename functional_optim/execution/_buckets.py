"""Buckets: parameters that one transform serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from functional_optim.core._transform import TensorMap, Transform
    from functional_optim.execution._reductions import Call
    from functional_optim.execution._units import Unit
    from functional_optim.execution.compiled._compiled_update import CompiledStep
    from functional_optim.execution.compiled._kernels import Codes


@dataclasses.dataclass
class Bucket:
    """Parameters that one transform, resolved, serves.

    Args:
        transform: The transform for these parameters, now.
        params: Its parameters.
        members: For each group of parameters one of its members here.
        whole: Whether it has all parameters, under their names, because the transform
            may not be cut.
        units: Its units.
        columns: Numbers that its parameters share; see `Source`.
        calls: The calls of `reduce` in its update, by the `Static` values before it.
        codes: Its compiled code; None if it runs without.
        steps: What its units had in common in the last step of each kind.
    """

    transform: Transform
    params: TensorMap
    members: dict[int, str]
    whole: bool = False
    units: list[Unit] = dataclasses.field(default_factory=list)
    columns: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    calls: dict[Hashable, list[Call]] = dataclasses.field(default_factory=dict)
    codes: Codes | None = None
    steps: dict[Hashable, CompiledStep] = dataclasses.field(default_factory=dict)

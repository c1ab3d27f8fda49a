"""Freeze parameters."""

from __future__ import annotations

from typing import ClassVar, final

import torch

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import value_class
from functional_optim.core._transform import Scope
from functional_optim.core._validation import check_parameters


@final
@value_class
class SetToZero:
    """Replace every update by zero: u <- -0.0.

    For freezing some parameters in a `Partition`; NaN and infinity become zero, too.
    The zero is negative because p + (-0.0) is p for every p, where p + 0.0 turns -0.0
    into 0.0: a frozen parameter keeps every bit.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Example:
        >>> import functional_optim as fo
        >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
        >>> frozen = fo.Partition(
        ...     {"frozen": SetToZero(), "trained": fo.sgd(0.5)},
        ...     {"body": "frozen", "head": "trained"},
        ... )
        >>> updates, _ = frozen.update(params, frozen.init(params), params)
        >>> fo.apply_updates(params, updates)
        {'body': tensor([1.]), 'head': tensor([0.5000])}

    Source:
        optax.set_to_zero.
    """

    scope: ClassVar[Scope] = Scope.ELEMENTWISE

    def init(self, params: TensorMap) -> tuple[()]:
        """Return the empty state."""
        check_parameters(params)
        return ()

    def update(
        self,
        updates: TensorMap,
        state: tuple[()],
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, tuple[()]]:
        """Return -0.0 in the shape of u."""
        zeros = {name: torch.full_like(u, -0.0) for name, u in updates.items()}
        return zeros, state

"""Add weight decay to updates."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from functional_optim.algebra._recording import add
from functional_optim.core._hyperparameters import Scalar, hyperparameter
from functional_optim.core._rule import Rule
from functional_optim.core._transform import Scope


@final
class AddDecayedWeights(Rule, scope=Scope.ELEMENTWISE):
    """Add a multiple of the parameters: u <- u + weight_decay * p.

    Before a moment this is L2 regularization (as in torch.optim.Adam), after it
    decoupled weight decay (as in AdamW). For some of the parameters write
    `Masked(AddDecayedWeights(0.1), exclude("*.bias"))`.

    Args:
        weight_decay: Factor. Finite, >= 0.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `weight_decay` is out of range.
        TypeError: `weight_decay` is no hyperparameter.

    Example:
        >>> import torch
        >>> params = {"w": torch.ones(2)}
        >>> updates = {"w": torch.zeros(2)}
        >>> AddDecayedWeights(0.1).update(updates, (), params)[0]
        {'w': tensor([0.1000, 0.1000])}

    Source:
        Loshchilov & Hutter 2019, arXiv:1711.05101; optax.add_decayed_weights.
    """

    weight_decay: Scalar = hyperparameter(ge=0.0)

    def update_param(self, u: Tensor, s: Any, p: Tensor) -> tuple[Tensor, Any]:
        """Return u + weight_decay * p."""
        return add(u, p, self.weight_decay), s

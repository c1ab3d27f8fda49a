"""Subtract the mean from updates."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import value_class
from functional_optim.core._transform import Scope
from functional_optim.core._validation import check_parameters


@final
@value_class
class Centralize:
    """Subtract from every row of an update its mean: u[i] <- u[i] - mean(u[i]).

    u[i] is everything that index i of the first dimension holds: the weights of one
    output of a linear or convolutional layer. Updates of fewer than 2 dimensions are
    copied. Use it on gradients, before the moments; choose parameters with `Masked`.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Example:
        >>> import torch
        >>> updates = {"w": torch.tensor([[1.0, 3.0], [5.0, 5.0]]), "b": torch.ones(2)}
        >>> Centralize().update(updates, (), updates)[0]
        {'w': tensor([[-1.,  1.],
                [ 0.,  0.]]), 'b': tensor([1., 1.])}

    Source:
        Yong et al. 2020, arXiv:2004.01461, equation 1; optax.centralize.
    """

    scope: ClassVar[Scope] = Scope.PER_TENSOR

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
        """Return u[i] - mean(u[i])."""
        return {name: _centralized(u) for name, u in updates.items()}, state


def _centralized(u: Tensor) -> Tensor:
    if u.ndim < 2:
        return u.clone()
    return u - u.mean(dim=tuple(range(1, u.ndim)), keepdim=True)

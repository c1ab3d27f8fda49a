"""Stochastic gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from functional_optim.core._chain import Chain, chain
from functional_optim.core._hyperparameters import Hyperparameter, is_zero
from functional_optim.transforms import (
    AddDecayedWeights,
    Masked,
    Scale,
    ScaleByLearningRate,
    Trace,
)

if TYPE_CHECKING:
    from functional_optim.core._selection import Selection
    from functional_optim.core._transform import Transform


def sgd(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.0,
    dampening: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    mask: Selection | None = None,
) -> Chain:
    """Stochastic gradient descent with momentum, as torch.optim.SGD.

        g <- -g if maximize
        g <- g + weight_decay * p
        b <- momentum * b + (1 - dampening) * g      (at first b <- g)
        g <- g + momentum * b  if nesterov, else b
        p <- p - lr * g

    What is switched off by a plain 0 is left out of the chain.

    Args:
        lr: Learning rate. Finite, >= 0.
        momentum: How much of the momentum buffer stays. Finite, >= 0.
        dampening: How much of the gradient is left out of it. Finite.
        weight_decay: L2 penalty. Finite, >= 0.
        nesterov: Whether to look ahead. Needs momentum > 0 and dampening 0.
        maximize: Whether to climb instead of to descend.
        mask: Which parameters decay, any selection; None means all. Not looked at if
            weight_decay is a plain 0.

    Returns:
        A chain of public transforms.

    Raises:
        ValueError: a number is out of range, or nesterov without momentum.
        TypeError: an argument is no hyperparameter.

    Example:
        >>> sgd(0.1, momentum=0.9, weight_decay=1e-4)
        chain(AddDecayedWeights(0.0001), Trace(0.9), ScaleByLearningRate(0.1))

    Source:
        torch.optim.SGD.
    """
    stages: list[Transform] = []
    if maximize:
        stages.append(Scale(-1.0))
    if not is_zero(weight_decay):
        decay = AddDecayedWeights(weight_decay)
        stages.append(decay if mask is None else Masked(decay, mask))
    if nesterov or not is_zero(momentum):
        stages.append(Trace(momentum, dampening=dampening, nesterov=nesterov))
    return chain(*stages, ScaleByLearningRate(lr))

"""Adam and AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING

from functional_optim.core._chain import Chain, chain
from functional_optim.core._hyperparameters import Hyperparameter, is_zero
from functional_optim.transforms import (
    AddDecayedWeights,
    Masked,
    Scale,
    ScaleByAdam,
    ScaleByLearningRate,
)

if TYPE_CHECKING:
    from functional_optim.core._selection import Selection
    from functional_optim.core._transform import Transform


def adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    amsgrad: bool = False,
    *,
    eps_root: Hyperparameter = 0.0,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    mask: Selection | None = None,
) -> Chain:
    """Adam, as torch.optim.Adam.

        g <- -g if maximize
        g <- g + weight_decay * p            (unless decoupled)
        u <- the direction of `ScaleByAdam`, with betas, eps, eps_root, amsgrad
        u <- u + weight_decay * p            (if decoupled)
        p <- p - lr * u

    What is switched off by a plain 0 is left out of the chain.

    Args:
        lr: Learning rate. Finite, >= 0.
        betas: Decay rates of the running mean and square. Each >= 0 and < 1.
        eps: Added to the root, in gradient units. Finite, >= 0.
        weight_decay: L2 penalty or decay rate. Finite, >= 0.
        amsgrad: Whether to divide by the largest second moment so far.
        eps_root: Added under the root, in their squared units. Finite, >= 0.
        maximize: Whether to climb instead of to descend.
        decoupled_weight_decay: Whether weights decay apart from the moments (AdamW).
        mask: Which parameters decay, any selection; None means all. Not looked at if
            weight_decay is a plain 0.

    Returns:
        A chain of public transforms.

    Raises:
        ValueError: a number is out of range.
        TypeError: an argument is no hyperparameter.

    Example:
        >>> adam(1e-3, weight_decay=0.1)
        chain(AddDecayedWeights(0.1), ScaleByAdam(), ScaleByLearningRate(0.001))

    Source:
        torch.optim.Adam; Kingma & Ba 2015, arXiv:1412.6980.
    """
    decay: list[Transform] = []
    if not is_zero(weight_decay):
        added = AddDecayedWeights(weight_decay)
        decay.append(added if mask is None else Masked(added, mask))
    return chain(
        *([Scale(-1.0)] if maximize else []),
        *([] if decoupled_weight_decay else decay),
        ScaleByAdam(betas, eps=eps, eps_root=eps_root, amsgrad=amsgrad),
        *(decay if decoupled_weight_decay else []),
        ScaleByLearningRate(lr),
    )


def adamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
    amsgrad: bool = False,
    *,
    eps_root: Hyperparameter = 0.0,
    maximize: bool = False,
    mask: Selection | None = None,
) -> Chain:
    """Adam with decoupled weight decay, as torch.optim.AdamW.

        g <- -g if maximize
        u <- the direction of `ScaleByAdam`, with betas, eps, eps_root, amsgrad
        u <- u + weight_decay * p
        p <- p - lr * u

    Args:
        lr: Learning rate. Finite, >= 0.
        betas: Decay rates of the running mean and square. Each >= 0 and < 1.
        eps: Added to the root, in gradient units. Finite, >= 0.
        weight_decay: Decay rate per unit of lr. Finite, >= 0; a plain 0 leaves it out.
        amsgrad: Whether to divide by the largest second moment so far.
        eps_root: Added under the root, in their squared units. Finite, >= 0.
        maximize: Whether to climb instead of to descend.
        mask: Which parameters decay, any selection; None means all. Not looked at if
            weight_decay is a plain 0.

    Returns:
        A chain of public transforms.

    Raises:
        ValueError: a number is out of range.
        TypeError: an argument is no hyperparameter.

    Example:
        >>> adamw(lr=1e-3, weight_decay=0.1)
        chain(ScaleByAdam(), AddDecayedWeights(0.1), ScaleByLearningRate(0.001))

    Source:
        torch.optim.AdamW; Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    return adam(
        lr,
        betas,
        eps,
        weight_decay,
        amsgrad,
        eps_root=eps_root,
        maximize=maximize,
        decoupled_weight_decay=True,
        mask=mask,
    )

"""Scale updates by Adam."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, NamedTuple, final

from torch import Tensor, maximum, zeros_like

from functional_optim.algebra._recording import addcmul, lerp
from functional_optim.core._hyperparameters import (
    Pair,
    Scalar,
    flag,
    hyperparameter,
    is_zero,
)
from functional_optim.core._rule import Rule, number
from functional_optim.core._transform import Role, Scope


class ScaleByAdamState(NamedTuple):
    """The state of `ScaleByAdam` for one parameter; a map by name for all.

    Attributes:
        step: Number of updates. Shape (), float64.
        exp_avg: Running mean of the updates, like the parameter.
        exp_avg_sq: Running mean of their squares, like the parameter.
        max_exp_avg_sq: Largest of those so far; `()` without amsgrad.

    Example:
        >>> import torch
        >>> ScaleByAdam().init({"w": torch.ones(2)}).step
        {'w': tensor(0., dtype=torch.float64)}
    """

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | tuple[()] = ()


@final
class ScaleByAdam(Rule, scope=Scope.ELEMENTWISE, role=Role.MOMENT):
    """Divide the running mean of the updates by the root of that of their squares.

    With t the number of updates of a parameter, this one included:

        m <- m + (1 - b1) * (u - m)
        v <- b2 * v + (1 - b2) * u^2
        u <- (m / (1 - b1^t)) / (sqrt(v) / sqrt(1 - b2^t) + eps)

    With amsgrad the largest v so far stands for v in the last line. With eps_root it is
    sqrt(v + eps_root * (1 - b2^t)), which is sqrt(v_hat + eps_root) for the corrected
    v_hat. The derivative of the root is 0 where v is 0: then all gradients were.

    Args:
        betas: Decay rates (b1, b2) of the two means. Each >= 0 and < 1.
        eps: Added to the root, in the units of the updates. Finite, >= 0.
        eps_root: Added under the root, in their squared units. Finite, >= 0.
        amsgrad: Whether to use the largest second moment so far.

    State:
        step: Number of updates. 0-dim float64 tensors by name.
        exp_avg, exp_avg_sq: Tensors like the parameters.
        max_exp_avg_sq: Likewise, or `()` without amsgrad.

    Shapes:
        Every update keeps its shape, device and name, and takes the wider dtype of
        update and moments.

    Raises:
        ValueError: a number is out of range, or `betas` is no pair.
        TypeError: an argument is no hyperparameter.

    Example:
        >>> import torch
        >>> params = {"w": torch.tensor([1.0, -4.0])}
        >>> adam = ScaleByAdam()
        >>> adam.update(params, adam.init(params), params)[0]
        {'w': tensor([ 1.0000, -1.0000])}

    Source:
        Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1; Reddi et al. 2018,
        arXiv:1904.09237 (amsgrad); torch.optim.Adam, whose order of operations this is.
    """

    betas: Pair = hyperparameter(default=(0.9, 0.999), ge=0.0, lt=1.0)
    _: KW_ONLY
    eps: Scalar = hyperparameter(default=1e-8, ge=0.0)
    eps_root: Scalar = hyperparameter(default=0.0, ge=0.0, zero_differs=True)
    amsgrad: bool = flag(default=False)

    def init_param(self, p: Tensor) -> ScaleByAdamState:
        """Return moments of zero."""
        largest = zeros_like(p) if self.amsgrad else ()
        return ScaleByAdamState(number(0.0), zeros_like(p), zeros_like(p), largest)

    def update_param(self, u: Tensor, s: Any, p: Tensor) -> tuple[Tensor, Any]:
        """Return (m / (1 - b1^t)) / (sqrt(v) / sqrt(1 - b2^t) + eps)."""
        b1, b2 = self.betas
        t = s.step + 1
        m = lerp(s.exp_avg, u, 1 - b1)
        v = addcmul(s.exp_avg_sq * b2, u, u, 1 - b2)
        w = maximum(s.max_exp_avg_sq, v) if self.amsgrad else v
        c1, c2 = 1 - b1**t, 1 - b2**t
        root = w if is_zero(self.eps_root) else w + self.eps_root * c2
        direction = m / c1 / (root.sqrt() / c2.sqrt() + self.eps)
        return direction, ScaleByAdamState(t, m, v, w if self.amsgrad else ())

"""Clip updates by norm or by value."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, NamedTuple, final

from torch import Tensor
from torch.linalg import vector_norm

from functional_optim.algebra._recording import total
from functional_optim.core._context import Norm
from functional_optim.core._hyperparameters import (
    Scalar,
    checked,
    flag,
    hyperparameter,
)
from functional_optim.core._rule import Rule, global_number
from functional_optim.core._transform import Role, Scope


class ClipByGlobalNormState(NamedTuple):
    """The state of `ClipByGlobalNorm`: the last norm.

    Attributes:
        norm: Joint norm before clipping in the last update. Tensor, shape (), float64;
            on the device, so that reading it waits only when somebody does.

    Example:
        >>> import torch
        >>> ClipByGlobalNorm(1.0).init({"w": torch.ones(2)}).norm
        tensor(0., dtype=torch.float64)
    """

    norm: Tensor


def _checked_norm_type(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be a number > 0 (math.inf is allowed), got {value!r}"
        )
    if not value > 0:
        raise ValueError(f"{name} must be > 0 (math.inf is allowed), got {value}")
    return float(value)


@final
class ClipByGlobalNorm(Rule, scope=Scope.ELEMENTWISE, role=Role.CLIP):
    """Scale all updates together so that their joint norm is at most `max_norm`.

    With ||u|| the norm of all updates concatenated:

        u <- u * min(1, max_norm / (||u|| + 1e-6))

    One joint norm keeps the direction of the step; clipping each tensor would not. A
    NaN anywhere makes all updates NaN, an infinity makes itself NaN and all finite
    numbers 0, as in torch: put the clip inside `SkipNonfinite`.

    Args:
        max_norm: Threshold, in the units of the updates at this place in the chain. A
            number for all parameters together. Finite, > 0.
        norm_type: Order p of the norm. > 0; `math.inf` is the largest magnitude.
        error_if_nonfinite: Whether a NaN or infinite norm raises. This reads the norm
            on the host: it waits for the device, and breaks vmap and torch.compile.

    State:
        norm: The joint norm before clipping. Tensor, shape (), float64.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `max_norm` or `norm_type` is out of range.
        TypeError: `max_norm` is a map or no hyperparameter.
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.

    Example:
        >>> import torch
        >>> updates = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> clip = ClipByGlobalNorm(1.0)
        >>> clipped, state = clip.update(updates, clip.init(updates), updates)
        >>> clipped["b"], state.norm
        (tensor([0.8000]), tensor(5., dtype=torch.float64))

    Source:
        Pascanu et al. 2013, arXiv:1211.5063, Algorithm 1; equals
        torch.nn.utils.clip_grad_norm_ bit for bit (hence the 1e-6).
    """

    max_norm: Scalar = hyperparameter(gt=0.0, per_parameter=False)
    _: KW_ONLY
    norm_type: float = checked(check=_checked_norm_type, default=2.0)
    error_if_nonfinite: bool = flag(default=False)

    def init_param(self, p: Tensor) -> ClipByGlobalNormState:
        """Return a norm of zero."""
        return ClipByGlobalNormState(global_number(0.0))

    def update_param(self, u: Tensor, s: Any, p: Tensor) -> tuple[Tensor, Any]:
        """Return u * min(1, max_norm / (||u|| + 1e-6))."""
        op, error = Norm(self.norm_type), self.error_if_nonfinite
        norm = total(u, op, error_if_nonfinite=error)
        coefficient = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return u * coefficient, ClipByGlobalNormState(norm)


@final
class ClipByNorm(Rule, scope=Scope.PER_TENSOR, role=Role.CLIP):
    """Scale every update by itself so that its norm is at most `max_norm`.

    With ||u|| the norm of one tensor:

        u <- u * min(1, max_norm / (||u|| + 1e-6))

    This changes the direction of the whole step, which `ClipByGlobalNorm` keeps. A NaN
    makes its own tensor NaN, an infinity makes itself NaN and the finite numbers of its
    tensor 0; other tensors do not notice.

    Args:
        max_norm: Threshold for each tensor, in the units of the updates at this place
            in the chain. Finite, > 0.
        norm_type: Order p of the norm. > 0; `math.inf` is the largest magnitude.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `max_norm` or `norm_type` is out of range.
        TypeError: `max_norm` is no hyperparameter.

    Example:
        >>> import torch
        >>> updates = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.5])}
        >>> ClipByNorm(1.0).update(updates, (), updates)[0]
        {'a': tensor([0.6000, 0.8000]), 'b': tensor([0.5000])}

    Source:
        torch.nn.utils.clip_grad_norm_ on each tensor alone, bit for bit;
        tf.clip_by_norm, up to the 1e-6.
    """

    max_norm: Scalar = hyperparameter(gt=0.0)
    _: KW_ONLY
    norm_type: float = checked(check=_checked_norm_type, default=2.0)

    def update_param(self, u: Tensor, s: Any, p: Tensor) -> tuple[Tensor, Any]:
        """Return u * min(1, max_norm / (||u|| + 1e-6))."""
        norm = vector_norm(u, self.norm_type)
        # As torch divides a number by a tensor, also for max_norm as a tensor.
        ratio = (norm + 1e-6).reciprocal() * self.max_norm
        return u * ratio.clamp(max=1.0), s


@final
class ClipByValue(Rule, scope=Scope.ELEMENTWISE, role=Role.CLIP):
    """Limit every number of every update: u <- min(max(u, -clip_value), clip_value).

    NaN stays NaN, infinity becomes `clip_value`. This may change the direction.

    Args:
        clip_value: Largest magnitude, in the units of the updates at this place in the
            chain. Finite, >= 0.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `clip_value` is negative, not finite, or not 0-dim.
        TypeError: `clip_value` is no hyperparameter.

    Example:
        >>> import torch
        >>> updates = {"w": torch.tensor([-3.0, 0.5])}
        >>> ClipByValue(1.0).update(updates, (), updates)[0]
        {'w': tensor([-1.0000,  0.5000])}

    Source:
        torch.nn.utils.clip_grad_value_; optax.clip.
    """

    clip_value: Scalar = hyperparameter(ge=0.0)

    def update_param(self, u: Tensor, s: Any, p: Tensor) -> tuple[Tensor, Any]:
        """Return min(max(u, -clip_value), clip_value)."""
        return u.clamp(-self.clip_value, self.clip_value), s

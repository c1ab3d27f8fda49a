"""Clip updates by norm or by value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from functional_optim.algebra._arithmetic import over
from functional_optim.algebra._norms import norms
from functional_optim.algebra._scalars import Factor, memoized, negated
from functional_optim.algebra._tensor_map import TensorMap, device_of, is_16_bit
from functional_optim.core._context import Context, Norm
from functional_optim.core._hyperparameters import (
    Hyperparameter,
    ScheduleState,
    checked,
    evaluate,
    flag,
    hyperparameter,
    init_hyperparameters,
    value_class,
)
from functional_optim.core._transform import Role, Scope
from functional_optim.core._validation import check_state


class ClipByGlobalNormState(NamedTuple):
    """The state of `ClipByGlobalNorm`: the last norm.

    Attributes:
        norm: Joint norm before clipping in the last update. Tensor, shape (), float64;
            on the device, so that reading it waits only when somebody does.
        schedule: State of the schedules.

    Example:
        >>> ClipByGlobalNorm(1.0).init({"w": torch.ones(2)}).norm
        tensor(0., dtype=torch.float64)
    """

    norm: Tensor
    schedule: ScheduleState | tuple[()]


def _checked_norm_type(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be a number > 0 (math.inf is allowed), got {value!r}"
        )
    if not value > 0:
        raise ValueError(f"{name} must be > 0 (math.inf is allowed), got {value}")
    return float(value)


@final
@value_class
class ClipByGlobalNorm:
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
        schedule: `()`, or a `ScheduleState` if `max_norm` is a schedule.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `max_norm` or `norm_type` is out of range.
        TypeError: `max_norm` is a map or no hyperparameter.
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.

    Example:
        >>> updates = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> clip = ClipByGlobalNorm(1.0)
        >>> clipped, state = clip.update(updates, clip.init(updates), updates)
        >>> clipped["b"], state.norm
        (tensor([0.8000]), tensor(5., dtype=torch.float64))

    Source:
        Pascanu et al. 2013, arXiv:1211.5063, Algorithm 1; equals
        torch.nn.utils.clip_grad_norm_ bit for bit (hence the 1e-6).
    """

    max_norm: Hyperparameter = hyperparameter(gt=0.0, per_parameter=False)
    _: KW_ONLY
    norm_type: float = checked(check=_checked_norm_type, default=2.0)
    error_if_nonfinite: bool = flag(default=False)

    scope: ClassVar[Scope] = Scope.ELEMENTWISE
    role: ClassVar[Role] = Role.CLIP
    consumes_updates: ClassVar[bool] = True

    def init(self, params: TensorMap) -> ClipByGlobalNormState:
        """Return a norm of zero."""
        schedule = init_hyperparameters(self, params)
        norm = torch.zeros((), dtype=torch.float64, device=device_of(params))
        return ClipByGlobalNormState(norm, schedule)

    def update(
        self,
        updates: TensorMap,
        state: ClipByGlobalNormState,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, ClipByGlobalNormState]:
        """Return u * min(1, max_norm / (||u|| + 1e-6))."""
        check_state(self, state, ClipByGlobalNormState)
        if not updates:
            return {}, state
        now, schedule = evaluate(self, state.schedule, updates)
        context = context or Context()
        order, wide = self.norm_type, context.is_partial
        norm = context.reduce(lambda: norms(updates, order, wide=wide), Norm(order))
        if self.error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"the joint norm of order {self.norm_type} of the updates is "
                f"{norm.item()}; find the source with torch.autograd.detect_anomaly, "
                "skip such steps with SkipNonfinite, or set error_if_nonfinite=False"
            )
        coefficient = memoized(_coefficient, norm, now.max_norm)
        clipped = over(updates).mul(coefficient).to_map()
        return clipped, ClipByGlobalNormState(memoized(Tensor.double, norm), schedule)

    def readings(self, state: ClipByGlobalNormState) -> TensorMap:
        """Return the joint norm before clipping."""
        check_state(self, state, ClipByGlobalNormState)
        return {"norm": state.norm}


def _coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


@final
@value_class
class ClipByNorm:
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

    State:
        `()`, or a `ScheduleState` if `max_norm` is a schedule.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `max_norm` or `norm_type` is out of range.
        TypeError: `max_norm` is no hyperparameter.

    Example:
        >>> updates = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.5])}
        >>> ClipByNorm(1.0).update(updates, (), updates)[0]
        {'a': tensor([0.6000, 0.8000]), 'b': tensor([0.5000])}

    Source:
        torch.nn.utils.clip_grad_norm_ on each tensor alone, bit for bit;
        tf.clip_by_norm, up to the 1e-6.
    """

    max_norm: Hyperparameter = hyperparameter(gt=0.0)
    _: KW_ONLY
    norm_type: float = checked(check=_checked_norm_type, default=2.0)

    scope: ClassVar[Scope] = Scope.PER_TENSOR
    role: ClassVar[Role] = Role.CLIP
    consumes_updates: ClassVar[bool] = True

    def init(self, params: TensorMap) -> ScheduleState | tuple[()]:
        """Return the state of the schedules; check maps by name."""
        return init_hyperparameters(self, params)

    def update(
        self,
        updates: TensorMap,
        state: ScheduleState | tuple[()],
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, ScheduleState | tuple[()]]:
        """Return u * min(1, max_norm / (||u|| + 1e-6))."""
        now, state = evaluate(self, state, updates)
        factors: dict[str, Tensor] = {}
        # Stacked by dtype: among float64 ones a float32 norm would be divided in
        # float64, which torch does not do for a tensor alone.
        for dtype in dict.fromkeys(u.dtype for u in updates.values()):
            alike = {name: u for name, u in updates.items() if u.dtype == dtype}
            found = _clip_factors(norms(alike, now.norm_type), now.max_norm, alike)
            factors |= zip(alike, found.unbind(), strict=True)
        return over(updates).mul(factors).to_map(), state


def _clip_factors(norm: Tensor, max_norm: Factor, names: TensorMap) -> Tensor:
    """Return min(1, max_norm / (norm + 1e-6)) by name, rounded as torch does.

    torch divides a number by a tensor as reciprocal times number, in float32 if the
    tensor has 16 bits; division would round differently for max_norm as a tensor.
    """
    wide = torch.float32 if is_16_bit(norm) else norm.dtype
    if isinstance(max_norm, Mapping):
        limits = [
            torch.as_tensor(max_norm[name], dtype=wide, device=norm.device)
            for name in names
        ]
        max_norm = torch.stack(limits)
    ratio = (norm + 1e-6).reciprocal().to(wide) * max_norm
    return ratio.to(norm.dtype).clamp(max=1.0)


@final
@value_class
class ClipByValue:
    """Limit every number of every update: u <- min(max(u, -clip_value), clip_value).

    NaN stays NaN, infinity becomes `clip_value`. This may change the direction.

    Args:
        clip_value: Largest magnitude, in the units of the updates at this place in the
            chain. Finite, >= 0.

    State:
        `()`, or a `ScheduleState` if `clip_value` is a schedule.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `clip_value` is negative, not finite, or not 0-dim.
        TypeError: `clip_value` is no hyperparameter.

    Example:
        >>> updates = {"w": torch.tensor([-3.0, 0.5])}
        >>> ClipByValue(1.0).update(updates, (), updates)[0]
        {'w': tensor([-1.0000,  0.5000])}

    Source:
        torch.nn.utils.clip_grad_value_; optax.clip.
    """

    clip_value: Hyperparameter = hyperparameter(ge=0.0)

    scope: ClassVar[Scope] = Scope.ELEMENTWISE
    role: ClassVar[Role] = Role.CLIP
    consumes_updates: ClassVar[bool] = True

    def init(self, params: TensorMap) -> ScheduleState | tuple[()]:
        """Return the state of the schedules; check maps by name."""
        return init_hyperparameters(self, params)

    def update(
        self,
        updates: TensorMap,
        state: ScheduleState | tuple[()],
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, ScheduleState | tuple[()]]:
        """Return min(max(u, -clip_value), clip_value)."""
        now, state = evaluate(self, state, updates)
        low, high = negated(now.clip_value), now.clip_value
        return over(updates).clamp(low, high).to_map(), state

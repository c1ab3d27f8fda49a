"""Scale updates by Adam."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import ClassVar, NamedTuple, final

from torch import Tensor

from functional_optim.algebra._arithmetic import over
from functional_optim.algebra._scalars import (
    Column,
    has_maps,
    increment,
    init_counts,
    memoized,
    one_minus,
)
from functional_optim.algebra._tensor_map import TensorMap, zeros_like
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import (
    Hyperparameter,
    ScheduleState,
    evaluate,
    flag,
    hyperparameter,
    init_hyperparameters,
    is_zero,
    value_class,
)
from functional_optim.core._transform import Role, Scope
from functional_optim.core._validation import check_made_for, check_state


class ScaleByAdamState(NamedTuple):
    """The state of `ScaleByAdam`: counts and moments.

    Attributes:
        step: Number of updates of each parameter. 0-dim float64 tensors by name.
        exp_avg: Running means of the updates, like the parameters.
        exp_avg_sq: Running means of their squares, like the parameters.
        max_exp_avg_sq: Largest of those so far, like the parameters; `()` without
            amsgrad.
        schedule: State of the schedules.

    Example:
        >>> import torch
        >>> ScaleByAdam().init({"w": torch.ones(2)}).step
        {'w': tensor(0., dtype=torch.float64)}
    """

    step: TensorMap
    exp_avg: TensorMap
    exp_avg_sq: TensorMap
    max_exp_avg_sq: TensorMap | tuple[()]
    schedule: ScheduleState | tuple[()]


@final
@value_class
class ScaleByAdam:
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
        schedule: `()`, or a `ScheduleState` if a hyperparameter is a schedule.

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

    betas: tuple[Hyperparameter, Hyperparameter] = hyperparameter(
        default=(0.9, 0.999), ge=0.0, lt=1.0, pair=True
    )
    _: KW_ONLY
    eps: Hyperparameter = hyperparameter(default=1e-8, ge=0.0)
    eps_root: Hyperparameter = hyperparameter(default=0.0, ge=0.0, zero_differs=True)
    amsgrad: bool = flag(default=False)

    scope: ClassVar[Scope] = Scope.ELEMENTWISE
    role: ClassVar[Role] = Role.MOMENT
    consumes_state: ClassVar[bool] = True

    def init(self, params: TensorMap) -> ScaleByAdamState:
        """Return moments of zero."""
        schedule = init_hyperparameters(self, params)
        largest = zeros_like(params) if self.amsgrad else ()
        return ScaleByAdamState(
            init_counts(params),
            zeros_like(params),
            zeros_like(params),
            largest,
            schedule,
        )

    def update(
        self,
        updates: TensorMap,
        state: ScaleByAdamState,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, ScaleByAdamState]:
        """Return (m / (1 - b1^t)) / (sqrt(v) / sqrt(1 - b2^t) + eps)."""
        check_state(self, state, ScaleByAdamState)
        check_made_for(self, "amsgrad", state.max_exp_avg_sq, wanted=self.amsgrad)
        if not updates:
            return {}, state
        now, schedule = evaluate(self, state.schedule, updates)
        beta1, beta2 = now.betas
        step = state.step | increment(state.step, updates)
        apart = has_maps(beta1, beta2, now.eps_root)
        t = Column(step, updates, apart=apart)
        correction1 = t.computed(_correction, beta1)
        correction2 = t.computed(_correction, beta2)

        mean = over(state.exp_avg, at=updates).lerp(updates, one_minus(beta1))
        exp_avg = mean.to_map(like=state.exp_avg)
        square = over(state.exp_avg_sq, at=updates).mul(beta2)
        square = square.addcmul(updates, updates, one_minus(beta2))
        exp_avg_sq = square.to_map(like=state.exp_avg_sq)

        second, largest = exp_avg_sq, state.max_exp_avg_sq
        if isinstance(largest, dict):
            second = (
                over(largest, at=exp_avg_sq).maximum(exp_avg_sq).to_map(like=largest)
            )
            largest = largest | second

        root = over(second, at=updates)
        if not is_zero(now.eps_root):
            root = root.add(t.factor(t.along(now.eps_root) * correction2))
        correction = t.factor(memoized(Tensor.sqrt, correction2))
        denominator = root.sqrt().div(correction).add(now.eps)
        direction = over(exp_avg, at=updates).div(t.factor(correction1))
        return direction.div(denominator).to_map(), ScaleByAdamState(
            step=step,
            exp_avg=state.exp_avg | exp_avg,
            exp_avg_sq=state.exp_avg_sq | exp_avg_sq,
            max_exp_avg_sq=largest,
            schedule=schedule,
        )


def _correction(step: Tensor, beta: Tensor) -> Tensor:
    """Return the bias correction 1 - beta^step."""
    return 1 - beta**step

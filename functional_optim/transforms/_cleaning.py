"""Taking NaN out of updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import device_of
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import value_class
from functional_optim.core._transform import Scope
from functional_optim.core._validation import check_parameters, check_state

if TYPE_CHECKING:
    from functional_optim.core._transform import TensorMap


class ZeroNansState(NamedTuple):
    """What `ZeroNans` remembers.

    Attributes:
        num_zeroed: How many numbers were NaN and became 0 so far, in all updates.
            Tensor, shape (), float64.

    Example:
        >>> ZeroNans().init({"w": torch.ones(2)})
        ZeroNansState(num_zeroed=tensor(0., dtype=torch.float64))
    """

    num_zeroed: Tensor


@final
@value_class
class ZeroNans:
    """Replace NaN by 0: u <- 0 where u is NaN, else u.

    Infinities stay. This hides where the NaN came from, so look at the count; to leave
    out the whole step instead use `SkipNonfinite`.

    State:
        num_zeroed: How many numbers were replaced so far, in all tensors. Tensor, shape
            (), float64.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Example:
        >>> updates = {"w": torch.tensor([1.0, float("nan"), float("inf")])}
        >>> zero_nans = ZeroNans()
        >>> cleaned, state = zero_nans.update(
        ...     updates, zero_nans.init(updates), updates
        ... )
        >>> cleaned["w"], int(state.num_zeroed)
        (tensor([1., 0., inf]), 1)

    Source:
        optax.zero_nans, which keeps for each tensor whether it had one.
    """

    scope: ClassVar[Scope] = Scope.ELEMENTWISE

    def init(self, params: TensorMap) -> ZeroNansState:
        """Return a count of zero."""
        check_parameters(params)
        zero = torch.zeros((), dtype=torch.float64, device=device_of(params))
        return ZeroNansState(zero)

    def update(
        self,
        updates: TensorMap,
        state: ZeroNansState,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, ZeroNansState]:
        """Return 0 where u is NaN, else u."""
        check_state(self, state, ZeroNansState)
        if not updates:
            return {}, state
        nans = {name: u.isnan() for name, u in updates.items()}
        found = torch.stack([n.sum(dtype=torch.float64) for n in nans.values()])
        cleaned = {n: torch.where(nans[n], 0.0, u) for n, u in updates.items()}
        total = (context or Context()).reduce(found, "sum")
        return cleaned, ZeroNansState(state.num_zeroed + total)

    def readings(self, state: ZeroNansState) -> TensorMap:
        """Return how many numbers were replaced in all."""
        check_state(self, state, ZeroNansState)
        return {"num_zeroed": state.num_zeroed}

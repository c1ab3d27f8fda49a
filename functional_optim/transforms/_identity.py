"""The transform that changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

from functional_optim.algebra._tensor_map import copied
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import value_class
from functional_optim.core._transform import Scope
from functional_optim.core._validation import check_parameters

if TYPE_CHECKING:
    from functional_optim.core._transform import TensorMap


@final
@value_class
class Identity:
    """Pass updates through: u <- u.

    The result is a copy, so that no output is the caller's tensor.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Example:
        >>> import torch
        >>> Identity().update({"w": torch.ones(2)}, (), {"w": torch.ones(2)})
        ({'w': tensor([1., 1.])}, ())

    Source:
        optax.identity.
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
        """Return a copy of the updates."""
        return copied(updates), state

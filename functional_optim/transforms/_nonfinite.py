"""Guards: combinators that may refuse a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from functional_optim._guarding import guarded
from functional_optim._hoisting import once
from functional_optim._resolving import resolve
from functional_optim.algebra._norms import all_finite
from functional_optim.algebra._tensor_map import device_of
from functional_optim.core._chain import checked_transform
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import checked, value_class
from functional_optim.core._transform import Role, Scope, Transform, inner_transforms
from functional_optim.core._traversal import Part
from functional_optim.core._validation import check_parameters, check_state

if TYPE_CHECKING:
    from functional_optim.core._transform import TensorMap


class SkipNonfiniteState(NamedTuple):
    """What `SkipNonfinite` remembers.

    Attributes:
        inner: State of the inner transform.
        skipped: Steps skipped so far. Tensor, shape (), float64.
        consecutive: Steps skipped since the last one taken. Tensor, shape (), float64.

    Example:
        >>> from functional_optim.transforms import Scale
        >>> SkipNonfinite(Scale(2.0)).init({"w": torch.ones(2)}).skipped
        tensor(0., dtype=torch.float64)
    """

    inner: Any
    skipped: Tensor
    consecutive: Tensor


@final
@value_class
class SkipNonfinite:
    """Skip steps whose updates are not all finite.

    With ok = all numbers of all updates are finite:

        u <- inner(u) if ok, else 0
        state of inner <- the new one if ok, else the old one

    A skipped step leaves parameters, moments, counts and schedules as they were, bit
    for bit. Nothing is read on the host. Must be the last member of its chain and
    contains no `Accumulate`: `chain(Accumulate(4), SkipNonfinite(chain(...)))`.

    Args:
        inner: The transform to protect.

    State:
        inner: State of the inner transform.
        skipped, consecutive: Steps skipped in all, and in a row. Tensors, shape (),
            float64.

    Shapes:
        As `inner`.

    Raises:
        TypeError: `inner` is no transform.
        ValueError: `inner` contains an `Accumulate`, at any depth.

    Example:
        >>> from functional_optim.transforms import ScaleByLearningRate
        >>> params = {"w": torch.ones(2)}
        >>> guarded = SkipNonfinite(ScaleByLearningRate(0.1))
        >>> bad = {"w": torch.tensor([1.0, float("nan")])}
        >>> updates, state = guarded.update(bad, guarded.init(params), params)
        >>> bool((updates["w"] == 0).all()), int(state.skipped)
        (True, 1)

    Source:
        torch.amp.GradScaler.step; optax.apply_if_finite.
    """

    inner: Transform = checked(check=checked_transform, resolve=resolve)

    role: ClassVar[Role] = Role.GUARD

    def _check(self) -> None:
        """Refuse windows inside the guard: a skip would lose its micro-batches."""
        accumulate = _find(self.inner, Role.ACCUMULATE)
        if accumulate is not None:
            msg = (
                f"{accumulate!r} stands inside a guard, where a skip would undo its "
                f"micro-batch; write chain({accumulate!r}, SkipNonfinite(...))"
            )
            raise ValueError(msg)

    @property
    def scope(self) -> Scope:
        """The scope of the inner transform."""
        return self.inner.scope

    def init(self, params: TensorMap) -> SkipNonfiniteState:
        """Return the inner state, and no skips."""
        check_parameters(params)
        zero = torch.zeros((), dtype=torch.float64, device=device_of(params))
        return SkipNonfiniteState(self.inner.init(params), zero, zero.clone())

    def update(
        self,
        updates: TensorMap,
        state: SkipNonfiniteState,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, SkipNonfiniteState]:
        """Return inner(u) if all is finite, else zeros."""
        check_state(self, state, SkipNonfiniteState)
        if not updates:
            return {}, state
        context = context or Context()
        ok = context.reduce(lambda: all_finite(updates), "all")
        moved, inner = guarded(
            ok, self.inner, updates, state.inner, params, context=context.at("inner")
        )
        counts = once(_counted, ok, state.skipped, state.consecutive)
        return moved, SkipNonfiniteState(inner, *counts)

    def parts(self, state: Any, params: TensorMap) -> list[Part]:
        """Return the inner transform with its state."""
        check_state(self, state, SkipNonfiniteState)
        return [Part("inner", "", self.inner, state.inner, params)]

    def readings(self, state: SkipNonfiniteState) -> TensorMap:
        """Return the steps skipped in all, and in a row."""
        return {"skipped": state.skipped, "consecutive": state.consecutive}


def _counted(ok: Tensor, skipped: Tensor, consecutive: Tensor) -> tuple[Tensor, Tensor]:
    skip = (~ok).double()
    return skipped + skip, (consecutive + 1) * skip


def _find(transform: Transform, role: Role) -> Transform | None:
    """Return a transform with this role, at any depth."""
    if getattr(transform, "role", None) is role:
        return transform
    for inner in inner_transforms(transform):
        found = _find(inner, role)
        if found is not None:
            return found
    return None

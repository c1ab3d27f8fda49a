"""Skip steps that are not finite, and replace NaN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch.utils import _pytree

from functional_optim.algebra._norms import all_finite
from functional_optim.algebra._scalars import memoized
from functional_optim.algebra._tensor_map import TensorMap, device_of
from functional_optim.core._apply import is_recorded
from functional_optim.core._chain import validate_transform
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import checked, value_class
from functional_optim.core._transform import Role, Scope, Transform
from functional_optim.core._traversal import Label, walk
from functional_optim.core._validation import check_parameters, check_state


class SkipNonfiniteState(NamedTuple):
    """The state of `SkipNonfinite`: counts, and the inner state.

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

    inner: Transform = checked(check=validate_transform)

    role: ClassVar[Role] = Role.GUARD

    def _check(self) -> None:
        """Refuse windows inside the guard: a skip would lose its micro-batches."""
        for node in walk(self.inner):
            inner = node.transform
            if getattr(inner, "role", None) is Role.ACCUMULATE:
                raise ValueError(
                    f"{inner!r} stands inside a guard, where a skip would undo its "
                    f"micro-batch; write chain({inner!r}, SkipNonfinite(...))"
                )

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
            ok, self.inner, updates, state.inner, params, context=context.child(0)
        )
        counts = memoized(_count_skips, ok, state.skipped, state.consecutive)
        return moved, SkipNonfiniteState(inner, *counts)

    def children(self) -> dict[Label, Transform]:
        """Return the inner transform."""
        return {0: self.inner}

    def with_children(self, children: Mapping[Label, Transform]) -> SkipNonfinite:
        """Return the guard around another transform."""
        return SkipNonfinite(children[0])

    def split_state(self, state: SkipNonfiniteState) -> dict[Label, Any]:
        """Return the state of the inner transform."""
        check_state(self, state, SkipNonfiniteState)
        return {0: state.inner}

    def readings(self, state: SkipNonfiniteState) -> TensorMap:
        """Return the steps skipped in all, and in a row."""
        return {"skipped": state.skipped, "consecutive": state.consecutive}


def _count_skips(
    ok: Tensor, skipped: Tensor, consecutive: Tensor
) -> tuple[Tensor, Tensor]:
    skip = (~ok).double()
    return skipped + skip, (consecutive + 1) * skip


def guarded(
    ok: Tensor,
    inner: Transform,
    updates: TensorMap,
    state: Any,
    params: TensorMap,
    *,
    context: Context,
) -> tuple[TensorMap, Any]:
    """Return the update of a transform if ok, else -0.0 and the old state."""
    # Zeros: the norm of many ones is infinite in float16, and some clips raise then.
    # Ones for a derivative: a user's rule in plain torch has sqrt(0), whose infinite
    # derivative times the 0 of a skipped step is NaN.
    other = 1.0 if is_recorded(differentiable=context.differentiable) else 0.0
    safe = {name: torch.where(ok, u, other) for name, u in updates.items()}
    moved, new = inner.update(safe, state, params, context=context)
    # p + (-0.0) is p for every p; p + 0.0 would turn -0.0 into 0.0.
    moved = {name: torch.where(ok, u, -0.0) for name, u in moved.items()}
    return moved, _selected(ok, new, state)


def _selected(ok: Tensor, new: Any, old: Any) -> Any:
    """Return the new state where ok, else the old one."""
    leaves, spec = _pytree.tree_flatten(new)
    before = _pytree.tree_leaves(old)
    chosen: list[Tensor] = []
    last: tuple[Tensor, Tensor] | None = None
    for n, o in zip(leaves, before, strict=True):
        # Names that share a count go on sharing it; they stand side by side.
        shared = last is not None and n is last[0] and o is last[1]
        if n is o:  # It was not touched, and shall not look as if it was.
            chosen.append(o)
        else:
            chosen.append(chosen[-1] if shared else _either(ok, n, o))
        last = n, o
    return _pytree.tree_unflatten(chosen, spec)


def _either(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    if new.ndim == 0:
        return memoized(_where, ok, new, old)
    return _where(ok, new, old)


def _where(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(ok, new, old)


class ZeroNansState(NamedTuple):
    """The state of `ZeroNans`: a count.

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

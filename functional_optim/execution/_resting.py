"""A transform without what stands in front of its window, for what got nothing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, final

from functional_optim.core._chain import Chain
from functional_optim.core._context import Context
from functional_optim.core._transform import (
    Scope,
    Static,
    Transform,
    inner_transforms,
    with_inner,
)
from functional_optim.transforms import Masked, Named, Partition

if TYPE_CHECKING:
    from functional_optim.core._transform import TensorMap


@final
@dataclasses.dataclass(frozen=True)
class _Resting:
    """A transform that is not run, with its state as it is."""

    inner: Transform

    @property
    def scope(self) -> Scope:
        return self.inner.scope

    def init(self, params: TensorMap) -> Any:
        return self.inner.init(params)

    def update(
        self,
        updates: TensorMap,
        state: Any,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, Any]:
        return updates, state


def from_window(transform: Transform, state: Any) -> Transform:
    """Return what of a transform runs for names that got nothing when a window closes.

    What stands in front of the window saw nothing of them in this step.

    Args:
        transform: The transform.
        state: A state of it.

    Example:
        >>> import torch
        >>> from functional_optim import Accumulate, Scale, chain
        >>> windowed = chain(Scale(2.0), Accumulate(2), Scale(3.0))
        >>> from_window(windowed, windowed.init({"w": torch.ones(1)}))
        chain(_Resting(inner=Scale(2.0)), Accumulate(2), Scale(3.0))
    """
    if isinstance(transform, Chain):
        holds = [_has_static(part) for part in state]
        if True not in holds:
            return transform
        first = holds.index(True)
        before, (window, *after) = transform.members[:first], transform.members[first:]
        resting = map(_Resting, before)
        return Chain((*resting, from_window(window, state[first]), *after))
    if not isinstance(transform, (Masked, Named, Partition)):
        return transform
    states = state if isinstance(transform, Partition) else (state,)
    pairs = zip(inner_transforms(transform), states, strict=True)
    parts = iter([from_window(inner, part) for inner, part in pairs])
    return with_inner(transform, lambda _: next(parts))


def _has_static(state: Any) -> bool:
    if isinstance(state, tuple):
        return any(map(_has_static, state))
    return isinstance(state, Static)

"""Add weight decay to updates."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, ClassVar, final

from torch import Tensor

from functional_optim.algebra._arithmetic import over
from functional_optim.algebra._tensor_map import TensorMap, subset
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import (
    Hyperparameter,
    ScheduleState,
    checked,
    evaluate,
    hyperparameter,
    init_hyperparameters,
    is_schedule,
    resolve_number,
    value_class,
)
from functional_optim.core._selection import (
    Selection,
    check_selection_matches,
    matches,
    select_names,
    validate_selection,
)
from functional_optim.core._transform import Scope
from functional_optim.core._value_class import format_value


def _checked_mask(name: str, mask: Any) -> Any:
    return None if mask is None else validate_selection(name, mask)


@final
@value_class
class AddDecayedWeights:
    """Add a multiple of the parameters: u <- u + weight_decay * p.

    Before a moment this is L2 regularization (as in torch.optim.Adam), after it
    decoupled weight decay (as in AdamW).

    Args:
        weight_decay: Factor. Finite, >= 0.
        mask: Which parameters decay, any selection: `"*.weight"`, a regex, a predicate
            on name and tensor, `exclude("*.bias")`, a map from every name to bool. None
            means all.

    State:
        `()`, or a `ScheduleState` if `weight_decay` is a schedule.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `weight_decay` is out of range; at `init`: part of `mask` matches no
            parameter.
        TypeError: `weight_decay` is no hyperparameter, `mask` is no selection.

    Example:
        >>> import torch
        >>> params = {"w": torch.ones(2), "b": torch.ones(1)}
        >>> updates = {"w": torch.zeros(2), "b": torch.zeros(1)}
        >>> AddDecayedWeights(0.1, mask="w").update(updates, (), params)[0]
        {'w': tensor([0.1000, 0.1000]), 'b': tensor([0.])}

    Source:
        Loshchilov & Hutter 2019, arXiv:1711.05101; optax.add_decayed_weights.
    """

    weight_decay: Hyperparameter = hyperparameter(ge=0.0)
    _: KW_ONLY
    mask: Selection | None = checked(check=_checked_mask, default=None)

    scope: ClassVar[Scope] = Scope.ELEMENTWISE
    consumes_updates: ClassVar[bool] = True

    def resolved(self, name: str, param: Tensor) -> AddDecayedWeights:
        """Return the transform for one parameter: its rate, or no decay."""
        if self.mask is not None and not matches(self.mask, name, param):
            # A schedule counts the updates of all names, also of those outside.
            rate = self.weight_decay if is_schedule(self.weight_decay) else 0.0
            return AddDecayedWeights(rate, mask=False)
        rate = resolve_number(self.weight_decay, name, param)
        return AddDecayedWeights(rate, mask=None if self.mask is None else True)

    def init(self, params: TensorMap) -> ScheduleState | tuple[()]:
        """Return the state of the schedules; check maps by name."""
        schedule = init_hyperparameters(self, params)
        if self.mask is not None:
            check_selection_matches(self.mask, params, "mask")
        return schedule

    def update(
        self,
        updates: TensorMap,
        state: ScheduleState | tuple[()],
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, ScheduleState | tuple[()]]:
        """Return u + weight_decay * p."""
        now, state = evaluate(self, state, updates)
        chosen = updates
        if self.mask is not None:
            chosen = subset(updates, select_names(self.mask, params, list(updates)))
        decayed = over(chosen).add(params, alpha=now.weight_decay).to_map()
        if len(decayed) == len(updates):
            return decayed, state
        return {
            name: decayed[name] if name in decayed else update.clone()
            for name, update in updates.items()
        }, state

    def selections(self, params: TensorMap) -> list[tuple[str, list[str]]]:
        """Return the mask, and the names that it selects; nothing without a mask."""
        if self.mask is None:
            return []
        return [
            (format_value(self.mask), select_names(self.mask, params, list(params)))
        ]

"""Factors that differ from parameter to parameter."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor

from functional_optim.algebra._arithmetic import over
from functional_optim.config._paramwise import Multipliers
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import check_factor, checked, value_class
from functional_optim.core._selection import (
    Rules,
    check_rules,
    frozen_rules,
    ruled,
    ruled_names,
)
from functional_optim.core._transform import Scope
from functional_optim.core._validation import check_parameters

if TYPE_CHECKING:
    from functional_optim.core._transform import TensorMap


def _checked_factor(name: str, value: Any) -> Any:
    return check_factor(name, value.lr if isinstance(value, Multipliers) else value)


@final
@value_class
class MultiplyParamwise:
    """Multiply the update of each parameter by a factor of its own: u <- c(name) * u.

    Behind the moments this is a learning-rate multiplier that survives every schedule,
    and scales decoupled decay too; before Adam it nearly cancels.
    To freeze parameters leave them out of the map of parameters, or give them
    `SetToZero` in a `Partition`: 0 * inf is NaN.

    Args:
        multipliers: Factors by selection: a map `{"*.bias": 2.0, "head.*": 10.0}`, or a
            list of (selection, factor) pairs whose selections may also be regexes or
            predicates on name and tensor. The first that fits wins; parameters that
            none fits keep their update (factor 1). Chain two of these to let rules
            compose. Factors are finite numbers or 0-dim tensors; what
            `paramwise_multipliers` returns counts as its multipliers of lr.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: a factor is not finite; at `init`: a rule matches no parameter.
        TypeError: the rules are not pairs of selection and factor.

    Example:
        >>> import torch
        >>> updates = {"a.weight": torch.ones(1), "a.bias": torch.ones(1)}
        >>> MultiplyParamwise({"*.bias": 2.0}).update(updates, (), updates)[0]
        {'a.weight': tensor([1.]), 'a.bias': tensor([2.])}

    Source:
        MMEngine's paramwise_cfg; timm's and torchtitan's lr multipliers.
    """

    multipliers: Rules[float | Tensor | Multipliers] | float | Tensor = checked(
        check=functools.partial(frozen_rules, check=_checked_factor),
        resolve=lambda rules, name, param: ruled(rules, name, param, 1.0),
    )

    scope: ClassVar[Scope] = Scope.ELEMENTWISE
    consumes_updates: ClassVar[bool] = True

    def init(self, params: TensorMap) -> tuple[()]:
        """Return the empty state, after a look whether every rule matches."""
        check_parameters(params)
        check_rules(self.multipliers, params, "multipliers")
        return ()

    def update(
        self,
        updates: TensorMap,
        state: tuple[()],
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, tuple[()]]:
        """Return c(name) * u."""
        factors = {
            name: ruled(self.multipliers, name, params[name], 1.0) for name in updates
        }
        return over(updates).mul(factors).to_map(), state

    def selections(self, params: TensorMap) -> list[tuple[str, list[str]]]:
        """Return the rules with their factors, and the names that each decides."""
        return ruled_names(self.multipliers, params)

"""Multiply updates by numbers."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple, final

from torch import Tensor

from functional_optim.algebra._lifting import lifted
from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import (
    Scalar,
    check_factor,
    checked,
    hyperparameter,
    value_class,
)
from functional_optim.core._rule import Rule
from functional_optim.core._selection import (
    Rules,
    check_rules_match,
    first_match,
    names_by_rule,
    validate_rules,
)
from functional_optim.core._transform import Role, Scope
from functional_optim.core._validation import check_parameters


@final
class Scale(Rule, scope=Scope.ELEMENTWISE):
    """Multiply updates by a factor: u <- factor * u.

    Args:
        factor: Factor, of any sign. Finite.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `factor` is not finite, or not 0-dim.
        TypeError: `factor` is no hyperparameter.

    Example:
        >>> import torch
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> Scale(-2.0).update(params, (), params)[0]
        {'w': tensor([-2., -4.])}

    Source:
        optax.scale, optax.scale_by_schedule.
    """

    factor: Scalar = hyperparameter()

    def update_param(self, u: Tensor, s: Any, p: Tensor) -> tuple[Tensor, Any]:
        """Return factor * u."""
        return u * self.factor, s


@final
class ScaleByLearningRate(Rule, scope=Scope.ELEMENTWISE, role=Role.LEARNING_RATE):
    """Multiply updates by the negative learning rate: u <- -lr * u.

    Args:
        lr: Learning rate, in parameter units per unit of the direction. Finite, >= 0.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `lr` is negative, not finite, or not 0-dim.
        TypeError: `lr` is no hyperparameter.

    Example:
        >>> import torch
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> ScaleByLearningRate(0.5).update(params, (), params)[0]
        {'w': tensor([-0.5000, -1.0000])}

    Source:
        optax.scale_by_learning_rate.
    """

    lr: Scalar = hyperparameter(ge=0.0)

    def update_param(self, u: Tensor, s: Any, p: Tensor) -> tuple[Tensor, Any]:
        """Return -lr * u."""
        return u * -self.lr, s


@final
class Unscale(Rule, scope=Scope.ELEMENTWISE, role=Role.UNSCALE):
    """Undo loss scaling: u <- u * (1 / scale).

    The reciprocal is taken in float64 and rounded to float32, and multiplied, exactly
    as `GradScaler.unscale_` does it.

    Args:
        scale: What the loss was multiplied by. Finite, > 0.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Raises:
        ValueError: `scale` is not positive, not finite, or not 0-dim.
        TypeError: `scale` is no hyperparameter.

    Example:
        >>> import torch
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> Unscale(4.0).update(params, (), params)[0]
        {'w': tensor([0.2500, 0.5000])}

    Source:
        torch.amp.GradScaler.unscale_; Micikevicius et al. 2018, arXiv:1710.03740,
        section 3.2.
    """

    scale: Scalar = hyperparameter(gt=0.0, per_parameter=False)

    def update_param(self, u: Tensor, s: Any, p: Tensor) -> tuple[Tensor, Any]:
        """Return u * (1 / scale)."""
        return u * (1 / self.scale).float(), s


class Multipliers(NamedTuple):
    """The multipliers of the learning rate and weight decay of a parameter.

    Attributes:
        lr: Multiplier of the learning rate.
        weight_decay: Multiplier of the weight decay.

    Example:
        >>> Multipliers(lr=0.1)
        Multipliers(lr=0.1, weight_decay=1.0)
    """

    lr: float = 1.0
    weight_decay: float = 1.0


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
        check=functools.partial(validate_rules, check=_checked_factor),
        resolve=lambda rules, name, param: first_match(rules, name, param, 1.0),
    )

    scope: ClassVar[Scope] = Scope.ELEMENTWISE

    def init(self, params: TensorMap) -> tuple[()]:
        """Return the empty state; refuse rules that match nothing."""
        check_parameters(params)
        check_rules_match(self.multipliers, params, "multipliers")
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
            name: first_match(self.multipliers, name, params[name], 1.0)
            for name in updates
        }
        return _multiplied(updates, factor=factors), state

    def selections(self, params: TensorMap) -> list[tuple[str, list[str]]]:
        """Return the rules with their factors, and the names that each decides."""
        return names_by_rule(self.multipliers, params)


@lifted
def _multiplied(u: Tensor, *, factor: Tensor) -> Tensor:
    return u * factor

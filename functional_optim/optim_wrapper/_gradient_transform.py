"""Run a transform on `.grad` between backward and step: `clip_grad=`, `transform=`."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_optim.algebra._torch_modes import untraced
from functional_optim.core._chain import validate_transform
from functional_optim.core._context import Context, Norm
from functional_optim.core._readings import readings
from functional_optim.core._state_dict import load_state_dict, state_dict
from functional_optim.core._transform import Role, Transform
from functional_optim.core._traversal import walk
from functional_optim.execution._gradient_executor import GradientExecutor
from functional_optim.execution._state_tree import flatten, unflatten
from functional_optim.optim_wrapper._errors import ConfigTypeError, ConfigValueError
from functional_optim.torch_optimizer._gradients import gradients_of
from functional_optim.torch_optimizer._optimizer import TransformOptimizer
from functional_optim.torch_optimizer._params import ShardCheck
from functional_optim.transforms import ClipByGlobalNorm, ClipByValue, Observe

_OWNED = {
    Role.ACCUMULATE: "the wrapper accumulates in .grad: pass accumulative_counts",
    Role.UNSCALE: "the wrapper unscales the loss: use AmpOptimWrapper",
    Role.LEARNING_RATE: "the optimizer takes the step: pass what comes before it, or "
    "OptimWrapper(TransformOptimizer(params, transform))",
    Role.GUARD: "the optimizer would step with zeros: use AmpOptimWrapper, or put it "
    "into a TransformOptimizer",
}


class GradientTransform:
    """A transform on the gradients of an optimizer, with its state."""

    def __init__(self, transform: Transform, *, is_clip: bool = False) -> None:
        validate_transform("transform", transform)
        check_not_owned(transform, _OWNED, "cannot stand between backward and step")
        self.transform, self._is_clip = transform, is_clip
        self._executor: Any = None
        self._names: dict[Tensor, str] = {}
        self._given_names: Mapping[Tensor, str] = {}
        self._context = Context()

    @untraced
    def prepare(self, params: Sequence[Tensor], names: Mapping[Tensor, str]) -> bool:
        """Use these parameters from now on; return whether it can run on them."""
        if (
            self._executor is not None
            and names is self._given_names
            and len(params) == len(self._names)
            and all(map(operator.is_, params, self._names))
        ):
            return True
        one_kind = len({(param.device, param.dtype) for param in params}) == 1
        if self._is_clip and not (one_kind and params[0].is_floating_point()):
            return False  # torch joins norms of several devices or dtypes itself.
        named = _name_params(params, names)
        self._context = ShardCheck(named, self.transform).context()
        self._names, self._given_names = named, names
        values = {name: param.detach() for param, name in named.items()}
        executor = GradientExecutor(self.transform, values)
        if self._executor is not None:
            executor.state = _with_old_entries(executor.state, self._executor.state)
        self._executor = executor
        return True

    @untraced
    def run(self, found_inf: Tensor | None = None) -> Tensor | None:
        """Transform the gradients in place, and return their norm if it clips by it."""
        wanted = {p: name for p, name in self._names.items() if p.requires_grad}
        grads = {
            name: grad.detach() if grad.requires_grad else grad
            for name, grad in gradients_of(wanted).items()
        }
        if grads:
            values = grads
            if not self._is_clip:
                values = {name: param.detach() for param, name in self._names.items()}
            with torch.no_grad():
                self._executor.run(
                    grads, values, context=self._context, found_inf=found_inf
                )
        if not self._is_clip:
            return self.readings().get("norm")
        # That of an infinite limit is called value.
        state = self._executor.state
        return getattr(state, "norm", getattr(state, "value", None))

    def readings(self) -> dict[str, Any]:
        """Return the readings of the transform; nothing before the first step."""
        if self._executor is None:
            return {}
        return dict(readings(self.transform, self._executor.state))

    def save(self) -> Any:
        """Return the state as plain data."""
        return state_dict(self._executor.state)

    def check(self, data: Any) -> Callable[[], None]:
        """Validate a saved state, and return a function that loads it."""
        executor, state = self._executor, load_state_dict(self._executor.state, data)
        return lambda: setattr(executor, "state", state)


def _name_params(
    params: Sequence[Tensor], names: Mapping[Tensor, str]
) -> dict[Tensor, str]:
    """Return a name for each parameter: its own, else its number."""
    taken = {names[param] for param in params if param in names}
    named = {}
    for index, param in enumerate(params):
        name = names.get(param, str(index))
        while param not in names and name in taken:
            name = f"_{name}"
        named[param] = name
    return named


def _with_old_entries(new: Any, old: Any) -> Any:
    """Return a new state with the entries that an old one has of the same names."""
    leaves = [
        {**fresh, **{name: known[name] for name in known if name in fresh}}
        if isinstance(fresh, dict) and isinstance(known, dict)
        else known
        for known, fresh in zip(flatten(old), flatten(new), strict=True)
    ]
    return unflatten(new, leaves)


def check_not_owned(transform: Any, owned: Mapping[Role, str], why: str) -> None:
    """Refuse a transform with a role, at any depth, that another part of a step has."""
    for node in walk(transform):
        role = getattr(node.transform, "role", None)
        if isinstance(role, Role) and role in owned:
            raise ConfigValueError(f"{node.transform!r} {why}; {owned[role]}")


def check_optimizer(optimizer: Any) -> None:
    """Refuse what is no optimizer, and one that accumulates as its wrapper does."""
    is_wrapper = hasattr(type(optimizer), "optim_context")
    if is_wrapper or not all(hasattr(optimizer, a) for a in ("param_groups", "step")):
        kind = f"a {type(optimizer).__name__}" if is_wrapper else repr(optimizer)
        msg = f"optimizer must be a torch.optim.Optimizer, got {kind}"
        if isinstance(optimizer, Transform):
            msg += f"; write TransformOptimizer(model.named_parameters(), {kind})"
        raise ConfigTypeError(msg)
    if isinstance(optimizer, TransformOptimizer):
        why = "inside the optimizer of a wrapper would see sums of micro-batches"
        remedy = "the wrapper accumulates in .grad: pass accumulative_counts"
        check_not_owned(optimizer.transform, {Role.ACCUMULATE: remedy}, why)


class ClipGrad(NamedTuple):
    """A way to clip gradients: torch's function, and the same as a transform."""

    kwargs: dict[str, Any]
    func: Callable[..., Any]
    name: str
    transform: GradientTransform | None


_FUNCS: dict[str, Callable[..., Any]] = {
    "norm": torch.nn.utils.clip_grad_norm_,
    "value": torch.nn.utils.clip_grad_value_,
}
_LIMITS = {"norm": "max_norm", "value": "clip_value"}
_KEYS = {
    "norm": {"max_norm", "norm_type", "error_if_nonfinite", "foreach"},
    "value": {"clip_value", "foreach"},
}
_EXPECTED = (
    "If `clip_grad` is not None, it must be a dict such as dict(type='norm', "
    "max_norm=1.0, norm_type=2.0, error_if_nonfinite=False) or dict(type='value', "
    "clip_value=0.5)"
)


def clip_grad_of(config: Any, *, strict: bool = True) -> ClipGrad:
    """Return what `clip_grad` describes; keys of one's own are not `strict`."""
    if not isinstance(config, Mapping) or not config:
        got = "an empty one" if isinstance(config, Mapping) else repr(config)
        raise ConfigTypeError(f"{_EXPECTED}, got {got}")
    kwargs = dict(config)
    kind = kwargs.pop("type", "norm")
    if not isinstance(kind, str) or kind not in _FUNCS:
        raise ConfigValueError(
            "If `clip_grad` is not None, its type must be 'norm' or 'value', got "
            f"{kind!r}"
        )
    transform = None
    if _LIMITS[kind] in kwargs and kwargs.keys() <= _KEYS[kind]:
        try:
            transform = GradientTransform(_transform_of(kind, kwargs), is_clip=True)
        except (TypeError, ValueError) as error:
            is_type = isinstance(error, TypeError)
            raise (ConfigTypeError if is_type else ConfigValueError)(
                f"If `clip_grad` is not None, its numbers must be legal: {error}"
            ) from None
    elif strict:
        raise ConfigValueError(f"{_EXPECTED}, got {config!r}")
    return ClipGrad(kwargs, _FUNCS[kind], f"grad_{kind}", transform)


def _transform_of(kind: str, kwargs: dict[str, Any]) -> Transform:
    limit: float = kwargs[_LIMITS[kind]]
    # A transform takes schedules and maps by name as well; a config does not.
    if isinstance(limit, bool) or not isinstance(limit, numbers.Real):
        raise TypeError(f"{_LIMITS[kind]} must be a number, got {limit!r}")
    if kind == "value":
        return ClipByValue(limit)
    order = kwargs.get("norm_type", 2.0)
    if isinstance(order, str):  # torch takes "inf", from configs that are text.
        if order != "inf":
            raise ValueError(f"norm_type must be a number or 'inf', got {order!r}")
        order = math.inf
    if limit == math.inf:  # A way to have the norm logged, and no more.
        return Observe("norm", op=Norm(order))
    raises = kwargs.get("error_if_nonfinite", False)
    return ClipByGlobalNorm(limit, norm_type=order, error_if_nonfinite=raises)

"""What a wrapper runs between backward and step: a transform, on the gradients."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from functional_optim.algebra._torch_modes import untraced
from functional_optim.core._chain import validate_transform
from functional_optim.core._context import Context, Norm
from functional_optim.core._readings import readings
from functional_optim.core._state_dict import load_state_dict, state_dict
from functional_optim.core._transform import Role
from functional_optim.core._traversal import walk
from functional_optim.execution._gradient_executor import GradientExecutor
from functional_optim.execution._state_tree import nodes_of, rebuilt
from functional_optim.optim_wrapper._errors import ConfigTypeError, ConfigValueError
from functional_optim.torch_optimizer._gradients import gradients_of
from functional_optim.torch_optimizer._sharding import ShardCheck
from functional_optim.transforms import ClipByGlobalNorm, ClipByValue, Observe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from functional_optim.core._transform import Transform

_OWNED = {
    Role.ACCUMULATE: "the wrapper accumulates in .grad: pass accumulative_counts",
    Role.UNSCALE: "the wrapper unscales the loss: use AmpOptimWrapper",
    Role.LEARNING_RATE: "the optimizer takes the step: pass what comes before it, or "
    "OptimWrapper(TransformOptimizer(params, transform))",
    Role.GUARD: "the optimizer would step with zeros: use AmpOptimWrapper, or put it "
    "into a TransformOptimizer",
}


class GradientTransform:
    """A transform on the gradients of an optimizer."""

    def __init__(self, transform: Transform, *, is_clip: bool = False) -> None:
        validate_transform("transform", transform)
        check_not_owned(transform, _OWNED, "cannot stand between backward and step")
        self.transform, self.is_clip = transform, is_clip
        self._executor: GradientExecutor | None = None
        self._names: dict[Tensor, str] = {}
        self._context = Context()

    @untraced
    def run(
        self,
        params: Sequence[Tensor],
        names: Mapping[Tensor, str],
        found_inf: Tensor | None = None,
    ) -> None:
        """Run the transform on the gradients that there are."""
        executor = self._ready(params, names)
        wanted = {p: name for p, name in self._names.items() if p.requires_grad}
        grads = {
            name: grad.detach() if grad.requires_grad else grad
            for name, grad in gradients_of(wanted).items()
        }
        if not grads:
            return
        shown = grads
        if not self.is_clip:
            shown = {name: param.detach() for param, name in self._names.items()}
        with torch.no_grad():
            executor.run(grads, shown, context=self._context, found_inf=found_inf)

    def state(self, params: Sequence[Tensor], names: Mapping[Tensor, str]) -> Any:
        """Return the state of the transform."""
        return self._ready(params, names).state

    @property
    def norm(self) -> Tensor | None:
        """The joint norm of the last step, if the transform clips by one."""
        if self._executor is None:
            return None
        state = self._executor.state
        if self.is_clip:  # The value is that of an infinite limit.
            found: Tensor | None = getattr(state, "norm", getattr(state, "value", None))
            return found
        return readings(self.transform, state).get("norm")

    def can_run(self, params: Sequence[Tensor]) -> bool:
        """Whether the parameters are real numbers of one dtype on one device."""
        if self._executor is not None and self._knows(params):
            return True
        kinds = {(param.device, param.dtype) for param in params}
        return len(kinds) == 1 and all(map(Tensor.is_floating_point, params))

    def readings(self) -> dict[str, Any]:
        """Return what the transform has to tell; nothing before the first step."""
        if self._executor is None:
            return {}
        return dict(readings(self.transform, self._executor.state))

    def saved(self, params: Sequence[Tensor], names: Mapping[Tensor, str]) -> Any:
        """Return the state as plain data."""
        return state_dict(self.state(params, names))

    def loaded(
        self, data: Any, params: Sequence[Tensor], names: Mapping[Tensor, str]
    ) -> Any:
        """Return the state that plain data describes; nothing changes."""
        return load_state_dict(self.state(params, names), data)

    def take(self, state: Any) -> None:
        """Go on from a state that `loaded` returned."""
        assert self._executor is not None
        self._executor.state = state

    def forget_names(self) -> None:
        """Ask for the names of the parameters again."""
        self._names = {}

    def _knows(self, params: Sequence[Tensor]) -> bool:
        known = self._names
        return len(params) == len(known) and all(map(operator.is_, params, known))

    def _ready(
        self, params: Sequence[Tensor], names: Mapping[Tensor, str]
    ) -> GradientExecutor:
        """Return the executor for these parameters, with the state that there was."""
        executor = self._executor
        if executor is None or not self._knows(params):
            named = _named(params, names)
            self._context = ShardCheck(named, self.transform).context()
            self._names = named
            shown = {name: param.detach() for param, name in self._names.items()}
            old, executor = executor, GradientExecutor(self.transform, shown)
            if old is not None:
                executor.state = _grown(old.state, executor.state)
            self._executor = executor
        return executor


def _named(params: Sequence[Tensor], names: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """Return a name for each parameter: its own, else its number."""
    taken = {names[param] for param in params if param in names}
    found = {}
    for index, param in enumerate(params):
        name = names.get(param, str(index))
        while param not in names and name in taken:
            name = f"_{name}"
        found[param] = name
    return found


def _grown(old: Any, new: Any) -> Any:
    """Return a new state with what an old one says about the same parameters."""
    nodes = [
        {**fresh, **{name: known[name] for name in known if name in fresh}}
        if isinstance(fresh, dict) and isinstance(known, dict)
        else known
        for known, fresh in zip(nodes_of(old), nodes_of(new), strict=True)
    ]
    return rebuilt(new, iter(nodes))


def check_not_owned(transform: Any, owned: Mapping[Role, str], why: str) -> None:
    """Refuse a transform that does, at any depth, what somebody else does."""
    for node in walk(transform):
        role = getattr(node.transform, "role", None)
        if isinstance(role, Role) and role in owned:
            raise ConfigValueError(f"{node.transform!r} {why}; {owned[role]}")


_KEYS = {
    "norm": {"max_norm", "norm_type", "error_if_nonfinite", "foreach"},
    "value": {"clip_value", "foreach"},
}


_NEEDED = {"norm": "max_norm", "value": "clip_value"}


class ClipGrad(NamedTuple):
    """How gradients are clipped."""

    kwargs: dict[str, Any]
    func: Callable[..., Any]
    name: str
    transform: Transform | None


def clip_grad_of(config: Any, *, strict: bool = True) -> ClipGrad:
    """Return what `clip_grad` asks for; the config itself does not change.

    Example:
        >>> clip_grad_of({"max_norm": 1, "norm_type": "inf"}).transform
        ClipByGlobalNorm(1.0, norm_type=inf)
    """
    if not isinstance(config, Mapping) or not config:
        kind = "an empty one" if isinstance(config, Mapping) else repr(config)
        raise ConfigTypeError(
            "If `clip_grad` is not None, it must be a dict such as dict(max_norm=1.0) "
            f"or dict(type='value', clip_value=0.5), got {kind}"
        )
    kwargs = dict(config)
    kind = kwargs.pop("type", "norm")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ConfigValueError(
            "If `clip_grad` is not None, its type must be 'norm' or 'value', got "
            f"{kind!r}"
        )
    func: Callable[..., Any] = torch.nn.utils.clip_grad_norm_
    if kind == "value":
        func = torch.nn.utils.clip_grad_value_
    if not strict and not _NEEDED[kind] in kwargs.keys() <= _KEYS[kind]:
        return ClipGrad(kwargs, func, f"grad_{kind}", None)
    _check_keys(kind, kwargs)
    try:
        transform = _transform_of(kind, kwargs)
    except (TypeError, ValueError) as error:
        mistake = ConfigTypeError if isinstance(error, TypeError) else ConfigValueError
        raise mistake(
            f"If `clip_grad` is not None, its numbers must be legal: {error}"
        ) from None
    return ClipGrad(kwargs, func, f"grad_{kind}", transform)


def _check_keys(kind: str, kwargs: dict[str, Any]) -> None:
    unknown = [key for key in kwargs if key not in _KEYS[kind]]
    if unknown:
        other = next((k for k, keys in _KEYS.items() if unknown[0] in keys), None)
        hint = f"; add type={other!r}" if other else ""
        raise ConfigValueError(
            f"If `clip_grad` is not None, its keys with type={kind!r} may be "
            f"{', '.join(sorted(_KEYS[kind]))}, got {unknown[0]!r}{hint}"
        )
    if _NEEDED[kind] not in kwargs:
        raise ConfigValueError(
            f"If `clip_grad` is not None, it must say {_NEEDED[kind]} with type="
            f"{kind!r}, such as dict(type={kind!r}, {_NEEDED[kind]}=1.0)"
        )


def _transform_of(kind: str, kwargs: dict[str, Any]) -> Transform:
    limit = kwargs[_NEEDED[kind]]
    # A transform takes schedules and maps by name as well; a config does not.
    if isinstance(limit, bool) or not isinstance(limit, numbers.Real):
        raise TypeError(f"{_NEEDED[kind]} must be a number, got {limit!r}")
    if kind == "value":
        return ClipByValue(kwargs["clip_value"])
    order = kwargs.get("norm_type", 2.0)
    if isinstance(order, str):  # torch takes "inf", from configs that are text.
        if order != "inf":
            raise ValueError(f"norm_type must be a number or 'inf', got {order!r}")
        order = math.inf
    if kwargs["max_norm"] == math.inf:  # A way to have the norm logged, and no more.
        return Observe("norm", op=Norm(order))
    return ClipByGlobalNorm(
        kwargs["max_norm"],
        norm_type=order,
        error_if_nonfinite=kwargs.get("error_if_nonfinite", False),
    )

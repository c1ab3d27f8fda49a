"""What a wrapper runs between backward and step: a transform, on the gradients."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._chain import checked_transform
from functional_optim._context import Context
from functional_optim._readings import readings
from functional_optim._state import load_state_dict, state_dict
from functional_optim._types import Role, inner_transforms
from functional_optim.execution._nodes import nodes_of, rebuilt
from functional_optim.execution._on_gradients import GradientExecutor
from functional_optim.facade._gradients import gradients_of
from functional_optim.facade._mistakes import MistakenValueError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from functional_optim._types import Transform

_OWNED = {
    Role.ACCUMULATE: "the wrapper accumulates in .grad: pass accumulative_counts",
    Role.UNSCALE: "the wrapper unscales the loss: use AmpOptimWrapper",
}
_CONTEXT = Context()


class Between:
    """A transform on the gradients of an optimizer.

    Args:
        transform: The transform.

    Attributes:
        has_state: Whether its state is worth saving.

    Raises:
        MistakenValueError: it accumulates or unscales, which the wrapper does.
        TypeError: it is no transform.
    """

    def __init__(self, transform: Transform, *, has_state: bool = True) -> None:
        checked_transform("transform", transform)
        _check_not_owned(transform)
        self.transform, self.has_state = transform, has_state
        self._executor: GradientExecutor | None = None
        self._names: dict[Tensor, str] = {}

    def run(
        self,
        params: Sequence[Tensor],
        names: Mapping[Tensor, str],
        found_inf: Tensor | None = None,
    ) -> None:
        """Run the transform on the gradients that there are.

        Args:
            params: The parameters of the optimizer.
            names: Names of parameters, as far as they are known.
            found_inf: Nonzero if the step will be skipped. Tensor, one element.
        """
        executor = self._ready(params, names)
        wanted = {p: name for p, name in self._names.items() if p.requires_grad}
        grads = {
            name: grad.detach() if grad.requires_grad else grad
            for name, grad in gradients_of(wanted).items()
        }
        if not grads:
            return
        shown = grads
        if self.has_state:  # A clip alone does not look at parameters.
            shown = {name: param.detach() for param, name in self._names.items()}
        with torch.no_grad():
            executor.run(grads, shown, context=_CONTEXT, found_inf=found_inf)

    def state(self, params: Sequence[Tensor], names: Mapping[Tensor, str]) -> Any:
        """Return the state of the transform."""
        return self._ready(params, names).state

    @property
    def norm(self) -> Tensor | None:
        """The joint norm of the last step, if the transform is a clip by it."""
        found = None if self._executor is None else self._executor.state
        return getattr(found, "norm", None)

    def can_run(self, params: Sequence[Tensor]) -> bool:
        """Whether the parameters make one map: real numbers on one device."""
        if self._executor is not None and self._knows(params):
            return True
        devices = {param.device for param in params}
        return len(devices) == 1 and all(map(Tensor.is_floating_point, params))

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
        """Return the state that plain data describes; nothing changes.

        Raises:
            ValueError, TypeError: it is of another transform or model.
        """
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
            self._names = {p: names.get(p, str(i)) for i, p in enumerate(params)}
            shown = {name: param.detach() for param, name in self._names.items()}
            old, executor = executor, GradientExecutor(self.transform, shown)
            if old is not None:
                executor.state = _grown(old.state, executor.state)
            self._executor = executor
        return executor


def _grown(old: Any, new: Any) -> Any:
    """Return a new state with what an old one says about the same parameters."""
    nodes = [
        {**fresh, **{name: known[name] for name in known if name in fresh}}
        if isinstance(fresh, dict) and isinstance(known, dict)
        else known
        for known, fresh in zip(nodes_of(old), nodes_of(new), strict=True)
    ]
    return rebuilt(new, iter(nodes))


def _check_not_owned(transform: Any) -> None:
    role = getattr(transform, "role", None)
    if role in _OWNED:
        msg = f"{transform!r} cannot stand between backward and step; {_OWNED[role]}"
        raise MistakenValueError(msg)
    for inner in inner_transforms(transform):
        _check_not_owned(inner)

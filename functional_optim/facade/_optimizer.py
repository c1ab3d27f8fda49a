"""A transform as a real `torch.optim.Optimizer`, executed in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._chain import chain, checked_transform
from functional_optim._context import Context
from functional_optim._readings import readings
from functional_optim.facade._engine import Engine
from functional_optim.facade._gradients import (
    gradients_of,
    scaling_of,
    warn_of_no_gradient,
)
from functional_optim.facade._groups import Groups
from functional_optim.facade._loading import checked_groups, loaded_options
from functional_optim.facade._members import (
    by_choices,
    check_group_parameters,
    members_of,
)

if TYPE_CHECKING:
    from functional_optim._types import TensorMap, Transform

_REST = "transform_state"


class TransformOptimizer(torch.optim.Optimizer):
    """A transform that updates parameters in place, as a `torch.optim.Optimizer`.

        p <- p + u,    (u, state) <- transform.update(p.grad, state, p)

    The same `update` as in the pure way, run on small units of memory: what a step
    allocates does not grow with the model. Schedulers, gradient scalers, checkpoints,
    trainers: whatever takes a torch optimizer takes this one.

    Hyperparameters stand in `param_groups` under the names of their fields (`lr`,
    `betas`, `weight_decay`, ...), and what is written there counts from the next step.
    A group can be given its own values, as in torch: `{"params": ..., "lr": 0.1}`.
    Parameters with different labels of a `Partition` stand in groups of their own.
    `max_norm` is no key of a group: one clip sees all of them. A schedule is shown as
    its value at the next step, a 0-dim tensor; nobody else may write it.

    Args:
        params: Tensors, `(name, tensor)` pairs such as `model.named_parameters()`, or
            group dicts of these. Without names they are called "0", "1", ...; masks
            and labels by name then match nothing.
        transform: The transform, such as `adamw(1e-3)` or a `chain(...)` of yours.
        differentiable: Whether autograd records the steps, for parameters that are
            themselves results. Whole tensors are then updated out of place.

    State:
        `state[p]`: the transform's state of this parameter, under torch's keys where
        torch has them (`step exp_avg exp_avg_sq max_exp_avg_sq momentum_buffer`), else
        "Class.field". It is there from the start. In a state dict what belongs to the
        transform as a whole stands in the first group under "transform_state".

    Raises:
        TypeError: `transform` is no transform, a parameter no dense real tensor.
        ValueError: no parameters, one twice, two in one memory, a non-leaf, several
            devices, a rule that matches nothing, two values for one key of a group.

    Example:
        >>> import functional_optim as fo
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = TransformOptimizer(
        ...     model.named_parameters(),
        ...     fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(1e-3)),
        ... )
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["lr"], sorted(optimizer.state[model.bias])
        (0.001, ['exp_avg', 'exp_avg_sq', 'step'])

    Source:
        torch.optim.Optimizer.
    """

    # GradScaler then hands over scale and flag instead of reading the flag itself.
    _step_supports_amp_scaling = True

    _engine: Engine | None
    _names: dict[Tensor, str]
    _warned: bool

    def __init__(
        self,
        params: Iterable[Any],
        transform: Transform,
        *,
        differentiable: bool = False,
    ) -> None:
        self._transform: Transform = chain(checked_transform("transform", transform))
        self._differentiable = differentiable
        self._start()
        if isinstance(params, Tensor):
            super().__init__(params, {})  # Says what is wrong.
        given = list(params)
        grouped = bool(given) and isinstance(given[0], Mapping)
        groups = [dict(group) for group in given] if grouped else [{"params": given}]
        members = [members_of(group, differentiable=differentiable) for group in groups]
        check_group_parameters(members)
        everyone = [member for some in members for member in some]
        self._groups = Groups(self._transform)
        defaults = self._groups.defaults(list(by_choices(self._transform, everyone, 0)))
        defaults["differentiable"] = differentiable
        super().__init__(groups if given else [], defaults)
        self._engine = self._built(None)

    def _start(self) -> None:
        self._engine, self._names, self._warned = None, {}, False

    # -- groups ----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with hyperparameters of their own where given.

        Args:
            param_group: `{"params": ..., "lr": 0.1, ...}`. Parameters with different
                labels of a `Partition` become several groups.

        Raises:
            ValueError, TypeError: as at construction; nothing is changed then.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # Says what is wrong.
        members = members_of(param_group, differentiable=self._differentiable)
        check_group_parameters([members], list(self._names.items()))
        split = by_choices(self._transform, members, len(self._names))
        options = {
            k: v for k, v in param_group.items() if k not in {"params", "param_names"}
        }
        place = f"param_groups[{len(self.param_groups)}]"
        values = self._groups.values_of_new(list(split), options, self.defaults, place)
        state = None
        if self._engine is not None:
            added = {n: p.detach() for some in split.values() for n, p in some}
            state = self._engine.state_with(added)
        named = any(name is not None for name, _ in members)
        for (labels, some), own in zip(split.items(), values, strict=True):
            params = some if named else [param for _, param in some]
            group = {**options, **own, "params": params}
            super().add_param_group(group)
            self._groups.add(group, labels)
            self._names.update({param: name for name, param in some})
        if self._engine is not None:
            self._engine = self._built(state)

    # -- the engine ------------------------------------------------------------------

    def _built(self, state: Any) -> Engine:
        """Return an engine for the parameters as they are, from a state or afresh."""
        group_of = {
            self._names[param]: index
            for index, group in enumerate(self.param_groups)
            for param in group["params"]
        }
        transforms = self._groups.transforms(self.param_groups)
        engine = Engine(self._transform, self._names, group_of, transforms, state)
        self._groups.connect(engine.state, engine.params())
        self._groups.show_schedules()
        engine.show(self.state)
        return engine

    def _followed(self) -> Engine:
        """Return the engine after what others did to parameters, state and groups."""
        engine = self._engine
        if engine is None or engine.moved:
            state = None if engine is None else engine.state_beside()
            engine = self._engine = self._built(state)
        engine.follow(self.state)
        transforms = self._groups.changed(self.param_groups)
        if transforms is not None:
            engine.set_transforms(transforms)
        return engine

    # -- steps -----------------------------------------------------------------------

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        weight: float | Tensor | None = None,
        last: bool = False,
    ) -> Any:
        """Update the parameters from their gradients.

        A parameter without a gradient keeps its value and its state.

        Args:
            closure: Computes gradients and returns the loss, which transforms see as
                `Context(loss=...)`.
            weight: Weight of this micro-batch, for `Accumulate`.
            last: Whether the data ends here, for `Accumulate`.

        Returns:
            What the closure returned.

        Raises:
            TypeError: a gradient is sparse.
            ValueError: a key of a group is not legal, or has two owners.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        context = Context(
            loss=loss if isinstance(loss, Tensor) else None,
            weight=weight,
            last=last,
            differentiable=self._differentiable,
        )
        with torch.set_grad_enabled(self._differentiable and torch.is_grad_enabled()):
            engine = self._followed()
            grads = gradients_of(self._names)
            if not grads and not self._warned:
                self._warned = True
                warn_of_no_gradient()
            if grads and self._differentiable:
                engine.step_recorded(grads, context=context)
            elif grads:
                engine.step(grads, context=context, scaling=scaling_of(self))
            if grads:
                self._groups.show_schedules()
                engine.follow(self.state)
        return loss

    # -- state -----------------------------------------------------------------------

    @property
    def transform(self) -> Transform:
        """The transform, as a chain, with the numbers that it was built with."""
        return self._transform

    def transform_state(self) -> Any:
        """Return the state in the form of the pure way, by name.

        Its tensors are those of the optimizer: they change with the next step.

        Example:
            >>> import functional_optim as fo
            >>> params = [torch.nn.Parameter(torch.ones(2))]
            >>> optimizer = TransformOptimizer(params, fo.sgd(0.1, momentum=0.9))
            >>> optimizer.transform_state()[0].momentum_buffer
            {'0': tensor([0., 0.])}
        """
        with torch.no_grad():
            return self._followed().state

    def readings(self) -> TensorMap:
        """Return what the transform has to tell, as `functional_optim.readings`.

        Example:
            >>> import functional_optim as fo
            >>> params = [torch.nn.Parameter(torch.ones(2))]
            >>> clipped = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.1))
            >>> sorted(TransformOptimizer(params, clipped).readings())
            ['lr', 'norm']
        """
        with torch.no_grad():
            engine = self._followed()
            return readings(engine.transform, engine.state)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do; see `torch.optim.Optimizer`.

        The first group has what belongs to the transform as a whole, as plain data. The
        indices of parameters run through the groups.
        """
        with torch.no_grad():
            rest = self._followed().rest()
        first = self.param_groups[0]
        first[_REST] = rest
        try:
            return super().state_dict()
        finally:
            del first[_REST]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Everything is checked first. Numbers keep their dtypes.

        Args:
            state_dict: The state dict of an optimizer with the same transform over the
                same parameters in the same groups. It is not changed.

        Raises:
            ValueError: something does not fit; then nothing is changed.
        """
        data = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, data)
            data = data if replaced is None else replaced
        with torch.no_grad():
            self._load(data)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, data: Mapping[str, Any]) -> None:
        engine = self._followed()
        saved = checked_groups(data, self.param_groups, self._groups)
        params = [param for group in self.param_groups for param in group["params"]]
        indices = [index for group in saved for index in group["params"]]
        per_name = {
            self._names[param]: data["state"].get(index, {})
            for param, index in zip(params, indices, strict=True)
        }
        engine.load(per_name, saved[0].get(_REST, {}))
        for index, group in enumerate(self.param_groups):
            group.update(loaded_options(saved[index], self._groups, index, {_REST}))
        self._groups.show_schedules()
        engine.follow(self.state)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: no plan, and no memory of others."""
        with torch.no_grad():
            saved = self._followed().own_copy()
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "_transform": self._transform,
            "_differentiable": self._differentiable,
            "_saved": (list(self._names.items()), saved),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start()
        names, saved = state["_saved"]
        self.state = defaultdict(dict)
        super().__setstate__({k: v for k, v in state.items() if k != "_saved"})
        self._names = dict(names)
        self._groups = Groups(self._transform)
        for group in self.param_groups:
            members = [(self._names[param], param) for param in group["params"]]
            self._groups.add(group, next(iter(by_choices(self._transform, members, 0))))
        self._engine = self._built(saved)

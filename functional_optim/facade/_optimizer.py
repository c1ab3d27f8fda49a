"""A transform as a real `torch.optim.Optimizer`, executed in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._apply import apply_updates
from functional_optim._chain import chain, checked_transform
from functional_optim._context import Context
from functional_optim._readings import readings
from functional_optim.execution._executor import Executor, Scaling
from functional_optim.execution._nodes import Node, nodes_of, rebuilt
from functional_optim.execution._rewriting import joined
from functional_optim.facade._checks import (
    check_apart,
    check_gradient,
    check_group_parameters,
    named_members,
)
from functional_optim.facade._entries import (
    entries_of,
    keys_of,
    loaded_nodes,
    rest_of,
)
from functional_optim.facade._exposure import Choices, choices_of
from functional_optim.facade._groups import OWN_KEYS, Groups
from functional_optim.facade._loading import checked_groups

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

    def __init__(
        self,
        params: Iterable[Any],
        transform: Transform,
        *,
        differentiable: bool = False,
    ) -> None:
        self._transform: Transform = chain(checked_transform("transform", transform))
        self._executor: Executor | None = None
        self._names: dict[Tensor, str] = {}
        self._start(differentiable=differentiable)
        if isinstance(params, Tensor):
            super().__init__(params, {})  # Says what is wrong.
        given = list(params)
        grouped = bool(given) and isinstance(given[0], Mapping)
        groups = [dict(group) for group in given] if grouped else [{"params": given}]
        members = [named_members(group, self._differentiable) for group in groups]
        check_group_parameters(members)
        labels = self._labels(members)
        self._groups = Groups(self._transform)
        defaults = self._groups.defaults(list(dict.fromkeys(labels.values())))
        super().__init__(
            groups if given else [], {**defaults, "differentiable": differentiable}
        )
        self._build(None)

    def _start(self, *, differentiable: bool) -> None:
        self._differentiable = differentiable
        self._warned = False
        self._pointers: list[Any] = []
        self._slots: list[int] = []

    def _labels(
        self, members: list[list[tuple[str | None, Tensor]]]
    ) -> dict[Any, Choices]:
        """Return the labels of parameters that are about to be added."""
        taken = len(self._names)
        found = {}
        for group in members:
            for name, param in group:
                own = str(taken + len(found)) if name is None else name
                found[own] = choices_of(self._transform, own, param)
        return found

    # -- groups --------------------------------------------------------------------

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
        given = dict(param_group)
        members = named_members(given, self._differentiable)
        check_group_parameters([members], list(self._names.items()))
        named = [
            (str(len(self._names) + i) if name is None else name, param)
            for i, (name, param) in enumerate(members)
        ]
        split: dict[Choices, list[tuple[str, Tensor]]] = {}
        for name, param in named:
            labels = choices_of(self._transform, name, param)
            split.setdefault(labels, []).append((name, param))
        options = {k: v for k, v in given.items() if k != "params"}
        self._check_options(options, list(split))
        prepared = []
        for labels, some in (split or {(): []}).items():
            group = {
                **{k: v for k, v in options.items() if k != "param_names"},
                **self._groups.own_values(labels, options),
            }
            has_names = bool(members) and members[0][0] is not None
            group["params"] = some if has_names else [param for _, param in some]
            prepared.append((labels, some, group))
        if self._executor is not None:
            state = self._grown(dict(named))
        for labels, some, group in prepared:
            super().add_param_group(group)
            self._groups.add(group, labels)
            self._names.update({param: name for name, param in some})
        if self._executor is not None:
            self._build(state)

    def _check_options(self, options: dict[str, Any], labels: list[Choices]) -> None:
        """Refuse options that no group of these parameters has."""
        own: set[str] = set(self.defaults)
        for choices in labels:
            own |= set(self._groups.own_values(choices, {}))
        place = f"param_groups[{len(self.param_groups)}]"
        self._groups.check_unknown(options, own, place)

    def _grown(self, added: TensorMap) -> Any:
        """Return the state with more parameters; what was there stays."""
        params = {**self._named_params(), **{n: p.detach() for n, p in added.items()}}
        fresh = self._transform.init(params)
        old = self._built.nodes
        nodes: list[Node] = []
        for new, known in zip(nodes_of(fresh), old, strict=True):
            if isinstance(new, dict) and isinstance(known, dict):
                nodes.append({**new, **known})
            else:
                nodes.append(known)
        return rebuilt(fresh, iter(nodes))

    # -- the plan ------------------------------------------------------------------

    @property
    def _built(self) -> Executor:
        if self._executor is None:
            self._build(None)
        assert self._executor is not None
        return self._executor

    def _named_params(self) -> TensorMap:
        return {name: param.detach() for param, name in self._names.items()}

    def _build(self, state: Any) -> None:
        """Plan how to run, from a state or a fresh one."""
        params = self._named_params()
        check_apart(params)
        if state is None:
            state = self._initial(params)
        group_of = {
            self._names[param]: index
            for index, group in enumerate(self.param_groups)
            for param in group["params"]
        }
        transforms = self._groups.changed(self.param_groups)
        if transforms is None:
            transforms = self._transforms
        self._transforms, self._group_of = transforms, group_of
        self._executor = Executor(params, transforms, group_of, state)
        self._groups.connect(self._executor.state, params)
        self._groups.show_schedules(self.param_groups)
        self._pointers = self._places()
        self._show()

    def _initial(self, params: TensorMap) -> Any:
        try:
            return self._transform.init(params)
        except ValueError as error:
            if all(name.isdecimal() for name in params):
                msg = (
                    f"{error}. These parameters have no names: pass "
                    "model.named_parameters() instead of model.parameters()"
                )
                raise ValueError(msg) from None
            raise

    def _places(self) -> list[Any]:
        """Return where the parameters lie."""
        return [p.data_ptr() for p in self._names]

    def _show(self) -> None:
        """Show the state by parameter, as torch does."""
        executor = self._built
        self._keys = keys_of(executor.nodes, executor.fields)
        for param, name in self._names.items():
            self.state[param] = entries_of(executor.nodes, self._keys, name)
        self._slots = [id(v) for own in self.state.values() for v in own.values()]

    def _follow(self) -> None:
        """Take over what others did to parameters and state since the last step."""
        if self._places() != self._pointers:
            self._build(self._moved())
        if [id(v) for own in self.state.values() for v in own.values()] != self._slots:
            self._adopt()
        transforms = self._groups.changed(self.param_groups)
        if transforms is not None:
            self._transforms = transforms
            self._built.set_transforms(transforms)
        if self._built.take_replaced():
            self._show()

    def _moved(self) -> Any:
        """Return the state on the devices where the parameters lie now."""
        executor = self._built
        device = next(iter(self._names)).device
        nodes: list[Node] = []
        for node in executor.nodes:
            if isinstance(node, dict):
                nodes.append({n: entry.to(device) for n, entry in node.items()})
            else:
                nodes.append(node.to(device) if isinstance(node, Tensor) else node)
        return rebuilt(executor.state, iter(nodes))

    def _adopt(self) -> None:
        """Take over entries of `state` that somebody replaced or removed."""
        executor = self._built
        fresh = nodes_of(self._transform.init(self._named_params()))
        for param, name in self._names.items():
            own = self.state.get(param, {})
            first = entries_of(fresh, self._keys, name)
            for node, key in zip(executor.nodes, self._keys, strict=True):
                if isinstance(node, dict) and name in node:
                    entry = own.get(key, first[key])
                    if entry is not node[name]:
                        node[name].copy_(entry)
        self._build(executor.state)

    # -- steps ---------------------------------------------------------------------

    def step(  # type: ignore[override]
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
            self._step(context)
        return loss

    def _step(self, context: Context) -> None:
        self._follow()
        grads = self._gradients()
        if not grads:
            return
        if self._differentiable:
            self._step_whole(grads, context)
        else:
            self._built.step(grads, context=context, scaling=self._scaling())
        self._groups.show_schedules(self.param_groups)
        if self._built.take_replaced():
            self._show()

    def _gradients(self) -> TensorMap:
        grads: TensorMap = {}
        for param, name in self._names.items():
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                check_gradient(name, grad)
            grads[name] = grad
        if not grads and not self._warned:
            self._warned = True
            warnings.warn(
                "no parameter of this optimizer has a gradient, so step() did nothing; "
                "if the model's parameters were replaced (load_state_dict(assign=True), "
                "a new model), build the optimizer after that",
                stacklevel=5,
            )
        return grads

    def _scaling(self) -> Scaling | None:
        """Return what a gradient scaler asks of this step."""
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        if found_inf is None and grad_scale is None:
            return None
        if self._built.holds:
            msg = (
                "a GradScaler cannot skip a micro-batch inside Accumulate; take it out "
                "of the transform and accumulate in .grad: call backward for each "
                "micro-batch, and step once"
            )
            raise ValueError(msg)
        if found_inf is None:
            found_inf = torch.zeros((), device=grad_scale.device)
        return Scaling(grad_scale, found_inf)

    def _step_whole(self, grads: TensorMap, context: Context) -> None:
        """Step with a graph: everything at once, out of place."""
        params: TensorMap = {name: param for param, name in self._names.items()}
        transform = joined(self._transforms, self._group_of)
        executor = self._built
        moved, state = transform.update(grads, executor.state, params, context=context)
        new = apply_updates(params, moved, differentiable=True)
        for name in moved:
            params[name].copy_(new[name])
        executor.replace(state)
        self._show()

    # -- state ---------------------------------------------------------------------

    @property
    def transform(self) -> Transform:
        """The transform, as a chain."""
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
        self._follow()
        return self._built.state

    def readings(self) -> TensorMap:
        """Return what the transform has to tell, as `functional_optim.readings`.

        Example:
            >>> import functional_optim as fo
            >>> params = [torch.nn.Parameter(torch.ones(2))]
            >>> clipped = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.1))
            >>> sorted(TransformOptimizer(params, clipped).readings())
            ['lr', 'norm']
        """
        return readings(
            joined(self._transforms, self._group_of), self.transform_state()
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do; see `torch.optim.Optimizer`.

        The first group has what belongs to the transform as a whole, as plain data. The
        indices of parameters run through the groups.
        """
        with torch.no_grad():
            self._follow()
        executor = self._built
        first = self.param_groups[0]
        first[_REST] = rest_of(executor.nodes, self._keys)
        try:
            return super().state_dict()
        finally:
            del first[_REST]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
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
            if replaced is not None:
                data = replaced
        with torch.no_grad():
            self._follow()
            self._load(data)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, data: Mapping[str, Any]) -> None:
        saved = checked_groups(data, self.param_groups, self._groups, self._keys)
        names = [self._names[p] for g in self.param_groups for p in g["params"]]
        indices = [i for group in saved for i in group["params"]]
        per_name = {
            name: data["state"].get(index, {})
            for name, index in zip(names, indices, strict=True)
        }
        executor = self._built
        rest = saved[0].get(_REST, {})
        nodes = loaded_nodes(executor.nodes, self._keys, per_name, rest)
        executor.load(nodes)
        scheduled = [
            set(g) - set(k)
            for g, k in zip(self.param_groups, self._groups.keys, strict=True)
        ]
        for group, loaded, fixed in zip(
            self.param_groups, saved, scheduled, strict=True
        ):
            for key, value in loaded.items():
                if (
                    key in OWN_KEYS
                    or key == _REST
                    or (key in fixed and key in self.defaults)
                ):
                    continue
                group[key] = value
        self._groups.show_schedules(self.param_groups)
        self._show()

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: no plan, and no memory of others."""
        with torch.no_grad():
            self._follow()
        executor = self._built
        nodes: list[Any] = []
        for node in executor.nodes:
            if isinstance(node, dict):
                nodes.append({name: entry.clone() for name, entry in node.items()})
            else:
                nodes.append(node.clone() if isinstance(node, Tensor) else node)
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "_transform": self._transform,
            "_differentiable": self._differentiable,
            "_names": list(self._names.items()),
            "_saved": rebuilt(executor.state, iter(nodes)),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        saved = state.pop("_saved")
        self._names = dict(state.pop("_names"))
        self.state = torch.optim.Optimizer.__init__.__globals__["defaultdict"](dict)
        super().__setstate__(state)
        self._start(differentiable=self._differentiable)
        self._groups = Groups(self._transform)
        for group in self.param_groups:
            labels = {
                choices_of(self._transform, self._names[p], p) for p in group["params"]
            }
            self._groups.add(group, labels.pop() if labels else ())
        self._executor = None
        self._build(saved)

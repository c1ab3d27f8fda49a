"""Run a transform in place, as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.algebra._torch_modes import untraced
from functional_optim.core._chain import as_chain, validate_transform
from functional_optim.core._context import Context
from functional_optim.core._readings import readings
from functional_optim.core._transform import Transform
from functional_optim.core._value_class import same_value
from functional_optim.torch_optimizer._engine import Engine
from functional_optim.torch_optimizer._gradients import scaling_of, warn_of_no_gradient
from functional_optim.torch_optimizer._group_keys import (
    OPTIONS,
    TRANSFORM_STATE,
    check_defaults,
    check_has_transform,
    checked_notes,
)
from functional_optim.torch_optimizer._param_groups import ParamGroups
from functional_optim.torch_optimizer._param_state import entries_at, starting_state
from functional_optim.torch_optimizer._params import materialize_params
from functional_optim.torch_optimizer._state_dict import (
    pack_groups,
    pack_state,
    text_of,
    transform_of,
    unpack,
)


class TransformOptimizer(torch.optim.Optimizer):
    """A transform that updates parameters in place, as a `torch.optim.Optimizer`.

        p <- p + u,    (u, state) <- transform.update(p.grad, state, p)

    The same `update` as in the pure way, run on small units of memory: a step allocates
    no more for a larger model, unless rules over whole tensors precede a joint norm
    (see `explain`). Schedulers, gradient scalers, checkpoints and trainers that take an
    optimizer of torch take this one.

    `param_groups` has the hyperparameters under the names of their fields (`lr`,
    `betas`, `weight_decay`, ...); values written there count from the next step. A
    group can be given its own values, as in torch: `{"params": ..., "lr": 0.1}`.
    Parameters with different labels of a `Partition` get groups of their own. Groups
    have no `max_norm` of `ClipByGlobalNorm`, which clips all of them together, and no
    maps by name. A frozen dataclass of yours lists fields that groups have in
    `hyperparameters = ("lr",)`. A schedule is a 0-dim tensor with its value at the next
    step, which nothing else may write.

    Args:
        params: Tensors, `(name, tensor)` pairs such as `model.named_parameters()`, or
            group dicts of these. Without names they are called "0", "1", ...; masks
            and labels by name then match nothing.
        transform: The transform with its hyperparameters, such as `adamw(1e-3)` or a
            `chain(...)` of yours.
        amp_scaling: Whether a `torch.amp.GradScaler` passes its scale and its flag of
            overflow instead of reading the flag on the host, as for torch's fused
            optimizers: a step then needs no sync. Lightning refuses to clip for such
            an optimizer, and Accelerate cannot detect a skipped step.
        compile: Whether the update is compiled by TorchInductor, into one loop over the
            elements for the whole chain. Code is generated once for a kind of
            transform, in seconds, whatever the number of parameters. Results differ by
            an ulp or two. Rules that look at whole tensors or at values run without;
            so does everything if there is no compiler, with a warning.
        notes: Keys of your own in the groups that look like a hyperparameter, such as
            "lrs"; without it, a key that looks like a typo of one is refused.
        **defaults: The rest of the `defaults` of such an optimizer, all of them:
            `type(optimizer)(params, **optimizer.defaults)` is one like it.

    State:
        `state[p]`: the transform's state of this parameter, under torch's keys where
        torch has them (`step exp_avg exp_avg_sq max_exp_avg_sq momentum_buffer`), else
        "Class.field". It exists from the start, for a frozen parameter
        (`requires_grad=False`) from its first gradient. Entries that are written,
        assigned, moved or removed here count at the next step; keys of your own stay.
        The state of the transform as a whole is in the first group, under
        "transform_state".

    Raises:
        TypeError: `transform` is no transform, a parameter no dense real tensor; a
            hyperparameter that is no part of the transform.
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

    @untraced
    def __init__(
        self,
        params: Iterable[Any],
        transform: Transform | None = None,
        *,
        amp_scaling: bool = False,
        compile: bool = False,
        notes: Iterable[str] = (),
        **defaults: Any,
    ) -> None:
        check_has_transform(transform, defaults)
        if not isinstance(compile, bool):
            raise ValueError(f"compile must be True or False, got {compile!r}")
        transform = validate_transform("transform", transform_of(transform))
        self._transform = as_chain(transform)
        self._compiles = compile
        self._step_supports_amp_scaling = amp_scaling
        self._notes = checked_notes(notes)
        self._engine: Engine | None = None
        self._groups = ParamGroups(self._transform, self._notes)
        self._warned = False
        if isinstance(params, Tensor):
            super().__init__(params, {})  # Says what is wrong.
        given = list(params)
        groups = [{"params": given}]
        if given and isinstance(given[0], Mapping):
            groups = [materialize_params(group) for group in given]
        own = self._groups.defaults(groups)
        check_defaults(defaults, own)
        # What a schedule shows at first was set by no user.
        shown = {k for k in own if k in defaults and same_value(defaults[k], own[k])}
        defaults.update({key: own[key] for key in shown})
        self._first_defaults = own
        options = {
            "transform": text_of(self._transform),
            "amp_scaling": amp_scaling,
            "compile": compile,
            "notes": self._notes,
        }
        super().__init__(groups if given else [], {**own, **defaults, **options})
        with torch.no_grad():
            self._install(self._new_engine())

    # -- steps -----------------------------------------------------------------------

    @untraced
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
            TypeError: a gradient is sparse, or `closure` is no function.
            ValueError: a key of a group is not legal, or has two owners. Nothing is
                changed then; but where a transform of yours raises in the middle of
                its work, some parameters may have moved.
        """
        if closure is not None and not callable(closure):
            raise TypeError(
                f"closure must be a function that returns the loss, got {closure!r}"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        known = loss.detach() if isinstance(loss, Tensor) else None
        context = Context(loss=known, weight=weight, last=last)
        # What a step allocates must be of use outside of inference mode, too.
        with torch.inference_mode(mode=False), torch.no_grad():
            engine = self._synced_engine()
            grads = engine.collector.gradients()
            if not grads and not self._warned:
                self._warned = True
                warn_of_no_gradient()
            if grads:
                engine.step(grads, context=context, scaling=scaling_of(self))
                self._groups.write_schedules()
                engine.write_replaced_state(self.state)
        return loss

    # -- state -----------------------------------------------------------------------

    @property
    @untraced
    def transform(self) -> Transform:
        """The transform, as a chain, with the values of the groups.

        Where groups differ it has them by name.

        Example:
            >>> import functional_optim as fo
            >>> params = [torch.nn.Parameter(torch.ones(2))]
            >>> optimizer = TransformOptimizer(params, fo.sgd(0.1))
            >>> optimizer.param_groups[0]["lr"] = 0.5
            >>> optimizer.transform
            chain(ScaleByLearningRate(0.5))
        """
        with torch.no_grad():
            return self._synced_engine().transform

    @untraced
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
            return self._synced_engine(each=True).state

    @untraced
    def load_transform_state(self, state: Any) -> None:
        """Load a state of the pure way, such as `transform_state` returns.

        Args:
            state: A state of this transform over parameters of these names. Its
                tensors are copied.

        Raises:
            ValueError: it does not fit; then nothing is changed.

        Example:
            >>> import functional_optim as fo
            >>> params = {"w": torch.nn.Parameter(torch.ones(2))}
            >>> pipeline = fo.chain(fo.sgd(0.1, momentum=0.9))
            >>> grads = {"w": torch.ones(2)}
            >>> _, state = pipeline.update(grads, pipeline.init(params), params)
            >>> optimizer = TransformOptimizer(params.items(), pipeline)
            >>> optimizer.load_transform_state(state)
            >>> optimizer.state[params["w"]]["momentum_buffer"]
            tensor([1., 1.])
        """
        with torch.no_grad():
            engine = self._synced_engine()
            self._load_state(engine, *engine.split_state(state))
            self._groups.write_schedules()
            self._synced_engine()

    @untraced
    def readings(self) -> TensorMap:
        """Return logged numbers of the transform; see `functional_optim.readings`.

        Example:
            >>> import functional_optim as fo
            >>> params = [torch.nn.Parameter(torch.ones(2))]
            >>> clipped = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.1))
            >>> sorted(TransformOptimizer(params, clipped).readings())
            ['lr', 'norm']
        """
        with torch.no_grad():
            engine = self._synced_engine()
            return readings(engine.transform, engine.state)

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do; see `torch.optim.Optimizer`.

        It shares no memory with the optimizer, and later steps do not change it. The
        first group has the state of the transform as a whole, as plain data. The
        indices of parameters run through the groups; one without state has an empty
        dict.

        Example:
            >>> import functional_optim as fo
            >>> params = [torch.nn.Parameter(torch.ones(2))]
            >>> optimizer = TransformOptimizer(params, fo.sgd(0.1, momentum=0.9))
            >>> best = optimizer.state_dict()
            >>> params[0].grad = torch.ones(2)
            >>> optimizer.step()
            >>> best["state"][0]["momentum_buffer"]
            tensor([0., 0.])
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with torch.no_grad():
            engine = self._synced_engine(each=True)
            engine.write_global_entries()
            saved: dict[str, Any] = {
                "state": pack_state(self.state, self._groups, engine),
                "param_groups": pack_groups(self.param_groups, self._groups),
            }
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, saved)
            saved = saved if replaced is None else replaced
        return saved

    @untraced
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, after validating all of it. Numbers keep their dtypes.

        Args:
            state_dict: The state dict of an optimizer with the same transform over the
                same parameters in the same groups. It is not changed.

        Raises:
            ValueError: something does not fit; then nothing is changed.
        """
        data = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, data)
            data = data if replaced is None else replaced
        with torch.no_grad():
            engine = self._synced_engine()
            saved = unpack(data, self.param_groups, self._groups, self.state, engine)
            self._load_state(engine, saved.per_name, saved.global_entries)
            self._groups.load(self.param_groups, saved.groups)
            for param, entries in saved.notes.items():
                self.state[param].update(entries)
            self.state.update(saved.others)
            self._groups.write_schedules()
            self._synced_engine()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load_state(
        self,
        engine: Engine,
        per_name: Mapping[str, Any],
        global_entries: Mapping[str, Any],
    ) -> None:
        """Load a saved state; parameters without entries in it begin afresh."""
        entries = engine.load_state(per_name, global_entries)
        if entries is None:
            return
        engine = self._new_engine(entries, global_entries)
        engine.check()
        for param, name in self._groups.names.items():
            own = entries_at(self.state, param, name)
            for key in engine.template.entries(name).keys() & own.keys():
                del self.state[param][key]
        self._install(engine)

    # -- changes from outside --------------------------------------------------------

    @untraced
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with hyperparameters of their own where given."""
        is_built = self._engine is not None
        if is_built:
            with torch.no_grad():
                self._synced_engine()
        count = len(self.param_groups)
        new = self._groups.new_groups(param_group, self.defaults, self._first_defaults)
        try:
            for group, labels, params in new:
                super().add_param_group(group)
                for key in OPTIONS:
                    group.pop(key, None)
                self._groups.add(group, labels, params)
            if is_built:
                self._install(self._new_engine())
        except Exception:
            del self.param_groups[count:]
            self._groups.forget(count)
            raise

    def _synced_engine(self, *, each: bool = False) -> Engine:
        """Return the engine after changes from outside to parameters, state and groups.

        Schedulers write into groups, `model.to` moves parameters, trainers put others
        into a group or replace the state.
        """
        engine = self._engine
        if engine is not None and self._groups.have_other_params(self.param_groups):
            engine = self._rebuilt_for_groups()
        elif engine is None or not engine.sync_state(self.state, each=each):
            engine = self._install(self._new_engine())
        transforms = self._groups.changed(self.param_groups)
        if transforms is not None:
            engine.set_transforms(transforms)
        engine.write_replaced_state(self.state)
        return engine

    def _rebuilt_for_groups(self) -> Engine:
        """Return an engine for parameters that were put into groups by hand."""
        before = self._groups
        self._groups = before.reread(self.param_groups)
        try:
            return self._install(self._new_engine())
        except Exception:
            self._groups = before
            raise

    def _new_engine(
        self,
        state: Mapping[Tensor, Any] | None = None,
        global_entries: Mapping[str, Any] | None = None,
    ) -> Engine:
        """Return an engine that goes on from a state, by default from that of now."""
        groups = self._groups
        start = starting_state(
            self._transform,
            groups.names,
            self.state if state is None else state,
            before=None if self._engine is None else self._engine.start,
            global_entries=global_entries,
        )
        transforms, compiles = groups.transforms(self.param_groups), self._compiles
        return Engine(self._transform, groups, transforms, start, compiles=compiles)

    def _install(self, engine: Engine) -> Engine:
        """Use an engine, and write its state into `state` and `param_groups`."""
        self._groups.connect(engine.state, engine.params())
        self._groups.write_schedules()
        engine.write_state(self.state)
        for group in self.param_groups:
            group.pop(TRANSFORM_STATE, None)
        if engine.global_entries:
            self.param_groups[0][TRANSFORM_STATE] = engine.global_entries
        self._engine = engine
        return engine

    @untraced
    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes that pickle and deepcopy store: no engine."""
        with torch.no_grad():
            self._synced_engine(each=True)
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "state": dict(self.state),
            "_transform": self._transform,
            "_compiles": self._compiles,
            "_step_supports_amp_scaling": self._step_supports_amp_scaling,
            "_notes": self._notes,
            "_first_defaults": self._first_defaults,
            "_names": list(self._groups.names.items()),
        }

    @untraced
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set stored attributes, or those that torch's own code sets: some of them."""
        state = dict(state)
        names = state.pop("_names", None)
        super().__setstate__(state)
        if names is None:
            return
        self._engine, self._warned = None, False
        self.defaults.pop("differentiable", None)  # torch puts it there.
        self.defaults["transform"] = text_of(self._transform)
        self.state = defaultdict(dict, state["state"])
        groups = ParamGroups(self._transform, self._notes)
        groups.names = dict(names)
        self._groups = groups.reread(self.param_groups)
        with torch.no_grad():
            saved = self.param_groups[0].get(TRANSFORM_STATE, {})
            self._install(self._new_engine(global_entries=saved))

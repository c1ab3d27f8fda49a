"""A transform as a real `torch.optim.Optimizer`, executed in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.algebra._torch_modes import untraced
from functional_optim.core._chain import as_chain, validate_transform
from functional_optim.core._context import Context
from functional_optim.core._readings import readings
from functional_optim.core._value_class import same_value
from functional_optim.torch_optimizer._gradients import scaling_of, warn_of_no_gradient
from functional_optim.torch_optimizer._group_keys import checked_notes
from functional_optim.torch_optimizer._param_groups import Groups
from functional_optim.torch_optimizer._params import (
    by_choices,
    check_group_parameters,
    members_of,
    read_once,
)
from functional_optim.torch_optimizer._state_dict import text_of, transform_of
from functional_optim.torch_optimizer._tracking import Tracking

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform


class TransformOptimizer(Tracking):
    """A transform that updates parameters in place, as a `torch.optim.Optimizer`.

        p <- p + u,    (u, state) <- transform.update(p.grad, state, p)

    The same `update` as in the pure way, run on small units of memory: what a step
    allocates does not grow with the model, unless rules that look at whole tensors
    stand in front of a joint norm (`explain` tells). Schedulers, gradient scalers,
    checkpoints, trainers: whatever takes a torch optimizer takes this one.

    Hyperparameters stand in `param_groups` under the names of their fields (`lr`,
    `betas`, `weight_decay`, ...), and what is written there counts from the next step.
    A group can be given its own values, as in torch: `{"params": ..., "lr": 0.1}`.
    Parameters with different labels of a `Partition` stand in groups of their own.
    The `max_norm` of `ClipByGlobalNorm` is no key of a group: one clip sees all of
    them; a map by name is none, because the transform decides. A frozen dataclass of
    yours says by `hyperparameters = ("lr",)` which of its fields are. A schedule is
    shown as its value at the next step, a 0-dim tensor; nobody else may write it.

    Args:
        params: Tensors, `(name, tensor)` pairs such as `model.named_parameters()`, or
            group dicts of these. Without names they are called "0", "1", ...; masks
            and labels by name then match nothing.
        transform: The transform, such as `adamw(1e-3)` or a `chain(...)` of yours.
            Hyperparameters stand in it.
        amp_scaling: Whether a `torch.amp.GradScaler` hands over its scale and its flag
            of overflow instead of reading the flag on the host, as for torch's fused
            optimizers: a step then needs no sync. Lightning refuses to clip for such
            an optimizer, and Accelerate cannot tell that a step was skipped.
        compile: Whether what runs on units of memory is compiled, by TorchInductor: one
            loop over the elements for the whole chain. Code is made once for a kind of
            transform, in seconds, whatever the number of parameters: hyperparameters,
            counts and totals go in as tensors. Numbers are rounded otherwise than
            without, by an ulp or two. What cannot be compiled, because a rule looks at
            whole tensors or at values, or there is no compiler, runs without, and a
            warning says so in the second case.
        notes: Keys of your own in the groups that look like a hyperparameter, such as
            "lrs": a key that is a slip of the pen away from one is refused otherwise.
        **defaults: The rest of the `defaults` of such an optimizer, all of them:
            `type(optimizer)(params, **optimizer.defaults)` is one like it.

    State:
        `state[p]`: the transform's state of this parameter, under torch's keys where
        torch has them (`step exp_avg exp_avg_sq max_exp_avg_sq momentum_buffer`), else
        "Class.field". It is there from the start, for a frozen parameter
        (`requires_grad=False`) from its first gradient. What is written, assigned,
        moved or removed here counts at the next step; keys of your own stay. In a state
        dict what belongs to the transform as a whole stands in the first group under
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
        _check_removed(defaults)
        if not isinstance(compile, bool):
            raise ValueError(f"compile must be True or False, got {compile!r}")
        if transform is None:
            raise TypeError(_no_transform(defaults))
        transform = validate_transform("transform", transform_of(transform))
        self._transform = as_chain(transform)
        self._compiles = compile
        self._step_supports_amp_scaling = amp_scaling
        self._notes = checked_notes(notes)
        self._start()
        if isinstance(params, Tensor):
            super().__init__(params, {})  # Says what is wrong.
        given = list(params)
        grouped = bool(given) and isinstance(given[0], Mapping)
        groups = [read_once(g) for g in given] if grouped else [{"params": given}]
        members = [members_of(group) for group in groups]
        check_group_parameters(members)
        everyone = [member for some in members for member in some]
        self._groups = Groups(self._transform, self._notes)
        own = self._groups.defaults(list(by_choices(self._transform, everyone, 0)))
        if defaults and not own.keys() <= defaults.keys():
            raise TypeError(_twice(defaults, own))
        options = {
            "transform": text_of(self._transform),
            "amp_scaling": amp_scaling,
            "compile": compile,
            "notes": self._notes,
        }
        # What a schedule shows at first was set by no user.
        shown = {k for k in own if k in defaults and same_value(defaults[k], own[k])}
        defaults.update({key: own[key] for key in shown})
        self._first_defaults = own
        # With these, `type(optimizer)(params, **optimizer.defaults)` is one like it.
        super().__init__(groups if given else [], {**own, **defaults, **options})
        with torch.no_grad():
            self._engine = self._built(self._next_start(self._names))

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
        told = loss if isinstance(loss, Tensor) else None
        context = Context(
            loss=None if told is None else told.detach(), weight=weight, last=last
        )
        # What a step allocates must be of use outside of inference mode, too.
        with torch.inference_mode(mode=False), torch.no_grad():
            engine = self._followed()
            grads = engine.survey.gradients()
            if not grads and not self._warned:
                self._warned = True
                warn_of_no_gradient()
            if grads:
                engine.step(grads, context=context, scaling=scaling_of(self))
                self._groups.show_schedules()
                engine.show_replaced(self.state)
        return loss

    # -- state -----------------------------------------------------------------------

    @property
    @untraced
    def transform(self) -> Transform:
        """The transform, as a chain, with the numbers that the groups have now.

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
            return self._followed().transform

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
            return self._followed(each=True).state

    @untraced
    def load_transform_state(self, state: Any) -> None:
        """Go on from a state of the pure way; what `transform_state` returns.

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
            engine = self._followed()
            self._take(engine, *engine.saved(state))
            self._groups.show_schedules()
            self._followed()

    @untraced
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

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do; see `torch.optim.Optimizer`.

        All of it is of this moment, in memory of its own: later steps do not change it,
        and each entry can be copied, pickled or sent by itself. The first group has
        what belongs to the transform as a whole, as plain data. The indices of
        parameters run through the groups; one without state has an empty dict.

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
            engine = self._followed(each=True)
            engine.show_rest()
            saved = {
                "state": self._packed(engine),
                "param_groups": self._packed_groups(),
            }
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, saved)
            saved = saved if replaced is None else replaced
        return saved

    @untraced
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Everything is checked first. Numbers keep their dtypes.

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
            self._load(data)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


_REMOVED = {
    "layout": "small tensors are always gathered, as layout='auto' did; leave it out",
    "differentiable": "an optimizer steps in place; for derivatives through a step "
    "call transform.update and apply_updates(..., differentiable=True)",
}
"""Arguments of earlier versions, and what to do instead."""


def _check_removed(given: Mapping[str, Any]) -> None:
    for name in _REMOVED.keys() & given.keys():
        raise TypeError(
            f"TransformOptimizer has no argument {name!r}: {_REMOVED[name]}"
        )


def _no_transform(defaults: Mapping[str, Any]) -> str:
    """Say what is missing, and where hyperparameters stand."""
    numbers = ", ".join(f"{key}={value!r}" for key, value in defaults.items())
    return (
        "TransformOptimizer needs a transform, in which the hyperparameters stand: "
        f"write TransformOptimizer(params, functional_optim.adamw({numbers}))"
    )


def _twice(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Say that numbers stand in the transform."""
    first = next(iter(defaults))
    remedy = "leave it out"
    if first in own:
        remedy = (
            f"hyperparameters stand in the transform: write adamw({first}="
            f"{defaults[first]!r}) there, or {{'params': ..., {first!r}: ...}} for a "
            "group"
        )
    return f"TransformOptimizer has no argument {first!r}; {remedy}"

"""`OptimWrapper`: backward, accumulation, clipping and step behind one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from functional_optim.algebra._torch_modes import untraced
from functional_optim.core._transform import Transform
from functional_optim.optim_wrapper import _checkpoint as checkpoint
from functional_optim.optim_wrapper import _settings as settings
from functional_optim.optim_wrapper._accumulation import (
    AccumulationWindow,
    check_loss,
    window_property,
)
from functional_optim.optim_wrapper._errors import ConfigTypeError, ConfigValueError
from functional_optim.optim_wrapper._gradient_transform import (
    ClipGrad,
    GradientTransform,
    check_optimizer,
    clip_grad_of,
)
from functional_optim.optim_wrapper._merged_groups import MergedGroups
from functional_optim.optim_wrapper._message_hub import MessageHub
from functional_optim.optim_wrapper._no_sync import NoSync


class OptimWrapper:
    """One interface for plain, mixed-precision and accumulated training.

    A drop-in for MMEngine's class of this name. Gradients accumulate in `.grad`, and
    between backward and step a transform runs on them in place.

    Args:
        optimizer: Any `torch.optim.Optimizer`.
        accumulative_counts: Micro-batches in a window, whose mean makes one step. >= 1.
        clip_grad: `dict(max_norm=1.0, norm_type=2, error_if_nonfinite=False)` clips by
            the joint norm, `dict(type="value", clip_value=0.5)` number by number.
        transform: A transform in the place of `clip_grad`, such as
            `chain(Centralize(), ClipByGlobalNorm(1.0))`. Its state is saved with the
            optimizer's. If it raises, gradients may be changed in part.
        merge_groups: Whether groups with equal settings step as one, where the
            optimizer is torch's own: the same bits, in less time.

    Raises:
        ValueError, TypeError: an argument is illegal, or `transform` accumulates,
            unscales, has a learning rate or skips steps: the wrapper and the optimizer
            do. It is an AssertionError, too.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> wrapper = OptimWrapper(optimizer, clip_grad=dict(max_norm=1.0))
        >>> wrapper.update_params(model(torch.ones(1, 1)).sum())
        >>> wrapper.get_lr(), wrapper.get_momentum()
        ({'lr': [0.01]}, {'momentum': [0]})

    Source:
        mmengine.optim.OptimWrapper 0.10.
    """

    clip_func: Callable[..., Any]
    _given_name: str | None = None
    _prefix: str = ""
    _siblings: Collection[OptimWrapper] = ()
    """The wrappers in the same `OptimWrapperDict`, this one as well."""

    # MMEngine's names, which hooks and derived classes read and write.
    _accumulative_counts = window_property("accumulative_counts")
    _inner_count = window_property("inner_count")
    _max_counts = window_property("max_counts")
    _remainder_counts = window_property("remainder_counts")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accumulative_counts: int = 1,
        clip_grad: dict[str, Any] | None = None,
        *,
        transform: Transform | None = None,
        merge_groups: bool = True,
    ) -> None:
        check_optimizer(optimizer)
        if not isinstance(merge_groups, bool):
            raise ConfigTypeError(
                f"merge_groups must be True or False, got {merge_groups!r}"
            )
        if transform is not None and clip_grad is not None:
            raise ConfigValueError(
                "clip_grad and transform stand in the same place; put the clip into "
                "the transform: chain(..., ClipByGlobalNorm(1.0))"
            )
        self._window = AccumulationWindow(accumulative_counts)
        self._transform = None if transform is None else GradientTransform(transform)
        self._clip: ClipGrad | None = None
        self.clip_grad_kwargs: dict[str, Any] | None = None
        if clip_grad is not None:
            # A derived class that clips in a way of its own has keys of its own.
            own = hasattr(type(self), "clip_func")
            own = own or type(self)._clip_grad is not OptimWrapper._clip_grad
            self._clip = clip_grad_of(clip_grad, strict=not own)
            self.clip_grad_kwargs = dict(self._clip.kwargs)
            if not hasattr(self, "clip_func"):
                self.clip_func = self._clip.func
        self.optimizer = optimizer
        self.merge_groups = merge_groups
        self.base_param_settings = settings.base_settings_of(optimizer)
        self.paramwise_sources: dict[str, str] = {}
        self._names = settings.names_in(optimizer.param_groups)
        self._hub: Any = MessageHub()
        self._no_sync = NoSync()

    # -- steps -----------------------------------------------------------------------

    def update_params(
        self,
        loss: Tensor,
        step_kwargs: dict[str, Any] | None = None,
        zero_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Run backward, and at the end of a window step and set gradients to zero.

        Args:
            loss: The loss of this micro-batch, a single number. Shape ().
            step_kwargs: Arguments of `step`.
            zero_kwargs: Arguments of `zero_grad`.
        """
        check_loss(loss, {})
        loss = self.scale_loss(loss)
        self.backward(loss)
        if self.should_update():
            self.step(**(step_kwargs or {}))
            self.zero_grad(**(zero_kwargs or {}))

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Call `loss.backward(**kwargs)`, and count a micro-batch."""
        check_loss(loss, kwargs)
        loss.backward(**kwargs)
        if self._no_sync.model is not None:
            self._no_sync.end()
        self._window.inner_count += 1
        self._window.has_gradients = True

    def step(self, **kwargs: Any) -> Any:
        """Clip or transform the gradients, and call `optimizer.step(**kwargs)`."""
        if self._transform is not None or self.clip_grad_kwargs:
            self._clip_grad()
        return self._step_merged(self.optimizer.step, **kwargs)

    def _step_merged(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # A closure may look at the groups, or step a scheduler.
        merge = self.merge_groups and len(self.optimizer.param_groups) > 1
        if not merge or "closure" in kwargs:
            return step(*args, **kwargs)
        with MergedGroups(self.optimizer):
            return step(*args, **kwargs)

    def zero_grad(self, **kwargs: Any) -> None:
        """Call `optimizer.zero_grad(**kwargs)`."""
        if self._no_sync.model is not None:
            self._no_sync.end()
        self.optimizer.zero_grad(**kwargs)
        self._window.has_gradients = False

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Return a context for the forward of a model, inside its DDP or FSDP.

        Gradients are synchronised between processes only where a window ends.
        """
        self._no_sync.end()
        if self.should_sync():
            self._no_sync.force_sync(model)
        else:
            self._no_sync.begin(model)
        try:
            yield
        except BaseException:
            self._no_sync.end()
            raise

    def initialize_count_status(
        self, model: nn.Module, init_counts: int, max_counts: int
    ) -> None:
        """Set after how many micro-batches training begins and ends (-1: unknown)."""
        self._window.initialize(model, init_counts, max_counts)

    def should_update(self) -> bool:
        """Return after a backward whether it ended a window."""
        return self._window.ends_at(self._window.inner_count)

    def should_sync(self) -> bool:
        """Return before a backward whether it will end a window."""
        return self._window.ends_at(self._window.inner_count + 1)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss divided by the length of the window it belongs to."""
        if self._window.accumulative_counts == 1:
            return loss
        return loss / self._window.length()

    @property
    def inner_count(self) -> int:
        """Micro-batches so far."""
        return self._window.inner_count

    # -- between backward and step ---------------------------------------------------

    def _clip_grad(self) -> None:
        """Clip or transform the gradients, and log the norm; it may be overridden."""
        params = self._parameters()
        if self._transform is None:
            norm = self._clip_as_set(params)
        else:
            self._transform.prepare(params, self._names)
            norm = self._transform.run(self._overflow())
        if norm is not None:
            # The hub of a host would wait for the device.
            self._hub.update_scalar(f"train/{self.grad_name}", norm)

    def _clip_as_set(self, params: list[Tensor]) -> Any:
        """Clip by what `clip_grad_kwargs` and `clip_func` are now; return the norm."""
        kwargs, clip = self.clip_grad_kwargs, self._clip
        if not kwargs:
            return None
        if not self._has_own_clip():
            if clip is None or kwargs != clip.kwargs:
                kind = "value" if "clip_value" in kwargs else "norm"
                self._clip = clip = clip_grad_of({"type": kind, **kwargs})
                self.clip_func = clip.func
            if clip.transform and clip.transform.prepare(params, self._names):
                return clip.transform.run()
        # A function of the user's; or several devices, whose norms torch joins itself.
        with_grad = [p for p in params if p.requires_grad and p.grad is not None]
        return self.clip_func(with_grad, **kwargs) if with_grad else None

    def _has_own_clip(self) -> bool:
        """Return whether `clip_func` is the user's."""
        func = getattr(self, "clip_func", None)
        return func is not None and (self._clip is None or func is not self._clip.func)

    def _overflow(self) -> Tensor | None:
        """Return a tensor, nonzero if the step will be skipped; None if it never is."""
        return None

    def _running(self) -> GradientTransform | None:
        """Return the transform of gradients, unless `clip_func` is a user's."""
        if self._transform is not None or self._clip is None or self._has_own_clip():
            return self._transform
        return self._clip.transform

    @property
    def transform(self) -> Transform | None:
        """The transform between backward and step, unless `clip_func` is a user's."""
        running = self._running()
        return None if running is None else running.transform

    def readings(self) -> dict[str, Any]:
        """Return the readings of the clip or transform; `fetch` brings them over."""
        running = self._running()
        return {} if running is None else running.readings()

    @property
    def message_hub(self) -> Any:
        """Where numbers are logged: the current hub of MMEngine, if it trains."""
        return self._hub.current if isinstance(self._hub, MessageHub) else self._hub

    @message_hub.setter
    def message_hub(self, hub: Any) -> None:
        self._hub = hub

    @property
    def grad_name(self) -> str:
        """The name of the norm in the log, after that of the wrapper if several log."""
        name = "grad_norm" if self._clip is None else self._clip.name
        name = name if self._given_name is None else self._given_name
        others = (other for other in self._siblings if other is not self)
        return f"{self._prefix}{name}" if any(o._logs() for o in others) else name

    @grad_name.setter
    def grad_name(self, name: str) -> None:
        self._given_name = name

    def _logs(self) -> bool:
        """Return whether a norm may be logged: a clip by value has none."""
        kwargs = self.clip_grad_kwargs or {"clip_value": None}
        return self._transform is not None or "clip_value" not in kwargs

    # -- settings --------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer, and `base_param_settings` behind several."""
        if self.base_param_settings is None:
            return self.optimizer.param_groups
        return [*self.optimizer.param_groups, self.base_param_settings]

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the optimizer."""
        return self.optimizer.defaults

    def get_lr(self) -> dict[str, list[Any]]:
        """Return the learning rate of each group; with several the base rate, too."""
        rates = {"lr": [group["lr"] for group in self.optimizer.param_groups]}
        if self.base_param_settings is None:
            return rates
        return {"base_lr": [self.base_param_settings["lr"]], **rates}

    def get_momentum(self) -> dict[str, list[Any]]:
        """Return the momentum of each group: `momentum`, else `betas[0]`, else 0."""
        groups = self.optimizer.param_groups
        return {
            "momentum": [g.get("momentum", g.get("betas", (0,))[0]) for g in groups]
        }

    @property
    def parameter_names(self) -> dict[int, str]:
        """Names of the parameters by `id`, for rules by name and for messages."""
        return {id(param): name for param, name in self._names.items()}

    @parameter_names.setter
    def parameter_names(self, names: Mapping[int, str]) -> None:
        # By the tensors themselves, which copies and pickles of a wrapper keep.
        params = self._parameters()
        self._names = {p: names[id(p)] for p in params if id(p) in names}

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Print which parameter has which settings, and why, as one table."""
        groups, names = self.optimizer.param_groups, self.parameter_names
        print_fn(settings.summary_of(groups, names, self.paramwise_sources))

    def __repr__(self) -> str:
        return (
            f"Type: {type(self).__name__}\n"
            f"_accumulative_counts: {self._accumulative_counts}\n"
            f"optimizer: \n{self.optimizer!r}\n"
        )

    def _parameters(self) -> list[Tensor]:
        # A group of a mock has none.
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group.get("params", ())]

    # -- checkpoints -----------------------------------------------------------------

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, and beside it that of the wrapper.

        Gradients that wait for a step are those of this process.
        """
        return checkpoint.save(self)

    @untraced
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class or of MMEngine's; if it does not fit, nothing.

        Without counts in it, as MMEngine saves it, an open window is given up.
        """
        checkpoint.load([self._check_state(state_dict)])

    def _check_state(self, state_dict: Any) -> checkpoint.CheckedState:
        return checkpoint.check(self, state_dict)

    def _loss_scale(self) -> float:
        """Return the factor of gradients that wait for a step."""
        return 1.0

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no OptimWrapperDict.
        left_out = {"_prefix", "_siblings"}
        return {k: v for k, v in self.__dict__.items() if k not in left_out}

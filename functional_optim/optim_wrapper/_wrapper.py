"""`OptimWrapper`: backward, accumulation, clipping and step behind one call."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from functional_optim.core._transform import Role, Transform
from functional_optim.optim_wrapper._accumulation import check_counts
from functional_optim.optim_wrapper._checkpoint import WrapperState
from functional_optim.optim_wrapper._errors import ConfigTypeError, ConfigValueError
from functional_optim.optim_wrapper._gradient_transform import (
    ClipGrad,
    GradientTransform,
    check_not_owned,
    clip_grad_of,
)
from functional_optim.optim_wrapper._merged_groups import MergedGroups
from functional_optim.optim_wrapper._message_hub import MessageHub
from functional_optim.optim_wrapper._no_sync import Suppression
from functional_optim.torch_optimizer._optimizer import TransformOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator


class OptimWrapper(WrapperState):
    """One interface for plain, mixed-precision and accumulated training.

    A drop-in for MMEngine's class of this name. Gradients accumulate in `.grad`, so
    that reductions over processes stay right; what stands between backward and step is
    a transform, run in place on `.grad`; the optimizer is any `torch.optim.Optimizer`.

    Args:
        optimizer: The optimizer.
        accumulative_counts: Micro-batches in a window, whose mean makes one step. >= 1.
        clip_grad: `dict(max_norm=1.0, norm_type=2, error_if_nonfinite=False)` clips by
            the joint norm, `dict(type="value", clip_value=0.5)` number by number. None
            does not clip.
        transform: A transform in the place of `clip_grad`, such as
            `chain(Centralize(), ClipByGlobalNorm(1.0))`. Its state is saved with the
            optimizer's. If it raises, gradients may be changed in part.
        merge_groups: Whether groups with equal settings step as one, where the
            optimizer is torch's own: the same bits, in less time.

    Raises:
        ValueError: a count below 1, a bad `clip_grad`, both `clip_grad` and
            `transform`, or a transform that accumulates, unscales, has a learning rate
            or skips steps: the wrapper and the optimizer do. Like the next an
            AssertionError, too.
        TypeError: an argument of a wrong type.

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
    """Who stands in the same `OptimWrapperDict`, this wrapper as well."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accumulative_counts: int = 1,
        clip_grad: dict[str, Any] | None = None,
        *,
        transform: Transform | None = None,
        merge_groups: bool = True,
    ) -> None:
        _check_optimizer(optimizer)
        if not isinstance(merge_groups, bool):
            raise ConfigTypeError(
                f"merge_groups must be True or False, got {merge_groups!r}"
            )
        check_counts("accumulative_counts", accumulative_counts, 1)
        self._start_counts(accumulative_counts)
        self.optimizer = optimizer
        self.clip_grad_kwargs: dict[str, Any] | None = None
        self._clip: ClipGrad | None = None  # What `_on_gradients` was made of.
        self._on_gradients: GradientTransform | None = None
        if transform is not None:
            if clip_grad is not None:
                raise ConfigValueError(
                    "clip_grad and transform stand in the same place; put the clip "
                    "into the transform: chain(..., ClipByGlobalNorm(1.0))"
                )
            self._on_gradients = GradientTransform(transform)
        if clip_grad is not None:
            # Who clips in a way of his own has keys of his own.
            own = hasattr(type(self), "clip_func")
            own = own or type(self)._clip_grad is not OptimWrapper._clip_grad
            clip = clip_grad_of(clip_grad, strict=not own)
            self.clip_grad_kwargs = dict(clip.kwargs)
            self._set_clip(clip)
        self.merge_groups = merge_groups
        self._own_hub = MessageHub()
        self._given_hub: Any = None
        self._suppression = Suppression()
        self._start_settings()

    # -- steps -----------------------------------------------------------------------

    def update_params(
        self,
        loss: Tensor,
        step_kwargs: dict[str, Any] | None = None,
        zero_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Run backward, and at the end of a window step and set gradients to zero.

        Args:
            loss: The loss of this micro-batch. Shape ().
            step_kwargs: Arguments of `step`.
            zero_kwargs: Arguments of `zero_grad`.

        Raises:
            ValueError: the loss is not a single number.
        """
        self._check_loss(loss, {})
        loss = self.scale_loss(loss)
        self.backward(loss)
        if self.should_update():
            self.step(**(step_kwargs or {}))
            self.zero_grad(**(zero_kwargs or {}))

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add the gradients of a loss to `.grad`, and count a micro-batch.

        Args:
            loss: The loss, scaled by `scale_loss`. Shape ().
            kwargs: Arguments of `torch.Tensor.backward`.

        Raises:
            ValueError: the loss is not a single number.
        """
        self._check_loss(loss, kwargs)
        loss.backward(**kwargs)
        self._counted()

    def step(self, **kwargs: Any) -> Any:
        """Clip or transform the gradients, and let the optimizer step.

        Args:
            kwargs: Arguments of the optimizer's `step`.

        Returns:
            What the optimizer's `step` returns.
        """
        if self._on_gradients is not None or self.clip_grad_kwargs:
            self._clip_grad()
        # A closure may look at the groups, or step a scheduler.
        if not self._merges() or "closure" in kwargs:
            return self.optimizer.step(**kwargs)
        with MergedGroups(self.optimizer):
            return self.optimizer.step(**kwargs)

    def zero_grad(self, **kwargs: Any) -> None:
        """Set all gradients to None, or to zero.

        Args:
            kwargs: Arguments of the optimizer's `zero_grad`.
        """
        self._suppression.end()
        self.optimizer.zero_grad(**kwargs)
        self._unspent = False

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Return a context for the forward.

        In it, and in the backward that follows, gradients are not synchronised between
        processes if the micro-batch does not end its window (DDP, FSDP1, FSDP2).

        Args:
            model: The model as it is called, in its DDP or FSDP.
        """
        self._suppression.end()
        if self.should_sync():
            self._suppression.lift(model)
        else:
            self._suppression.begin(model)
        try:
            yield
        except BaseException:
            self._suppression.end()
            raise

    @property
    def transform(self) -> Transform | None:
        """What stands between backward and step, unless it is a user's `clip_func`."""
        own = self._running()
        return None if own is None else own.transform

    @property
    def message_hub(self) -> Any:
        """Where numbers for the log go: the current hub of MMEngine, if it trains."""
        if self._given_hub is not None:
            return self._given_hub
        host = self._own_hub.host
        return self._own_hub if host is None else host.current

    @message_hub.setter
    def message_hub(self, hub: Any) -> None:
        self._given_hub = hub

    def readings(self) -> dict[str, Any]:
        """Return the readings of the clip or transform, such as a norm.

        Numbers are tensors on their device; `fetch` brings all to the host at once.
        """
        own = self._running()
        return {} if own is None else own.readings()

    @property
    def grad_name(self) -> str:
        """What the norm is logged as; it may be set.

        In an `OptimWrapperDict` the wrapper's name there stands in front, unless nobody
        else in it logs a norm.
        """
        name = "grad_norm" if self._clip is None else self._clip.name
        name = name if self._given_name is None else self._given_name
        others = (other for other in self._siblings if other is not self)
        return f"{self._prefix}{name}" if any(o._logs() for o in others) else name

    @grad_name.setter
    def grad_name(self, name: str) -> None:
        self._given_name = name

    def __getstate__(self) -> dict[str, Any]:
        # A copy stands in no dict, and does not copy those who do.
        left_out = {"_prefix", "_siblings"}
        return {k: v for k, v in self.__dict__.items() if k not in left_out}

    def _logs(self) -> bool:
        """Whether a norm may be logged: a clip by value has none."""
        own, kwargs = self._on_gradients, self.clip_grad_kwargs or {}
        clips_by_norm = bool(kwargs) and "clip_value" not in kwargs
        return clips_by_norm or (own is not None and not own.is_clip)

    def _running(self) -> GradientTransform | None:
        own = self._on_gradients
        replaced = own is not None and own.is_clip and self._has_own_clip()
        return None if replaced else own

    @staticmethod
    def _check_loss(loss: Any, kwargs: dict[str, Any]) -> None:
        """Refuse a loss that is not a single number."""
        if not hasattr(loss, "backward"):
            kind = type(loss).__name__
            raise ConfigTypeError(
                f"loss must be a tensor, got a {kind}; add up its parts first"
            )
        is_tensor = issubclass(type(loss), Tensor)  # A mock of one has no numbers.
        if is_tensor and loss.numel() != 1 and "gradient" not in kwargs:
            raise ConfigValueError(
                f"loss must be a single number, got shape {tuple(loss.shape)}; pass "
                "loss.mean() or loss.sum()"
            )

    def _merges(self) -> bool:
        return self.merge_groups and len(self.optimizer.param_groups) > 1

    def _counted(self) -> None:
        self._suppression.end()
        self._inner_count += 1
        self._unspent = True

    # -- between backward and step ----------------------------------------------------

    def _clip_grad(self) -> None:
        """Run what stands between backward and step; it may be overridden."""
        own = self._on_gradients
        if own is None or own.is_clip:
            norm = self._clipped()
        else:
            own.run(self._parameters(), self._named, self._overflow())
            norm = own.norm
        if norm is not None:
            # Not to the hub of a host, which would wait for the device.
            hub = self._own_hub if self._given_hub is None else self._given_hub
            hub.update_scalar(f"train/{self.grad_name}", norm)

    def _clipped(self) -> Any:
        """Clip as `clip_grad_kwargs` and `clip_func` say now, and return the norm."""
        if not self.clip_grad_kwargs:  # Somebody took it away.
            return None
        params = self._parameters()
        own = None if self._has_own_clip() else self._current_clip()
        if own is not None and own.can_run(params):
            own.run(params, self._named)
            return own.norm
        # A function of the user's; or several devices, whose norms torch joins itself.
        moved = [p for p in params if p.requires_grad and p.grad is not None]
        return self.clip_func(moved, **self.clip_grad_kwargs) if moved else None

    def _has_own_clip(self) -> bool:
        """Whether the user set `clip_func`."""
        func = getattr(self, "clip_func", None)
        return func is not None and (self._clip is None or func is not self._clip.func)

    def _overflow(self) -> Tensor | None:
        """Return what is nonzero if the step will be skipped; None if it never is."""
        return None

    def _set_clip(self, clip: ClipGrad) -> GradientTransform | None:
        if not self._has_own_clip():
            self.clip_func = clip.func
        self._clip, self._on_gradients = clip, None
        if clip.transform is not None:
            self._on_gradients = GradientTransform(clip.transform, is_clip=True)
        return self._on_gradients

    def _current_clip(self) -> GradientTransform | None:
        """Return the clip that `clip_grad_kwargs` asks for now: it may be written."""
        kwargs, last = self.clip_grad_kwargs or {}, self._clip
        if last is not None and kwargs == last.kwargs:
            return self._on_gradients
        kind = "value" if "clip_value" in kwargs else "norm"
        return self._set_clip(clip_grad_of({"type": kind, **kwargs}))


def _check_optimizer(optimizer: Any) -> None:
    is_wrapper = isinstance(optimizer, WrapperState)
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

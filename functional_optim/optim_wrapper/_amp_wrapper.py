"""`AmpOptimWrapper`: the same in mixed precision, with a scaled loss."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from functional_optim.optim_wrapper._errors import ConfigTypeError
from functional_optim.optim_wrapper._grad_scaler import (
    SharedScaler,
    check_scaler_state,
    checked_dtype,
    scaler_of,
)
from functional_optim.optim_wrapper._merged_groups import MergedGroups
from functional_optim.optim_wrapper._wrapper import OptimWrapper
from functional_optim.torch_optimizer._state_dict import plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from functional_optim.optim_wrapper._checkpoint import Take


class AmpOptimWrapper(OptimWrapper):
    """An `OptimWrapper` whose forward runs in autocast and whose loss is scaled.

    A drop-in for MMEngine's class of this name, on every device. `loss_scaler` is a
    `torch.amp.GradScaler`; several wrappers may share one (`b.loss_scaler =
    a.loss_scaler`): its scale then changes when no wrapper is between a backward and
    its step, so that it is the same throughout a window.

    Args:
        loss_scale: "dynamic", a number that stays, or a dict of the arguments of
            `torch.amp.GradScaler`.
        dtype: The dtype of autocast, such as "float16" or `torch.bfloat16`; None is the
            device's default. With "float32" and "float64" nothing is cast. With an
            explicit bfloat16 and "dynamic" no loss is scaled: its range is that of
            float32.
        use_fsdp: Whether to use FSDP1's scaler, which joins overflows over processes.
        autocast: Whether the forward runs in autocast; else only the loss is scaled.
        kwargs: Arguments of `OptimWrapper`.

    Raises:
        ValueError: a number that is not finite or not above 0, an unknown key or dtype.
        TypeError: `loss_scale` or `dtype` is nothing of the above.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> wrapper = AmpOptimWrapper(optimizer=optimizer, dtype="bfloat16")
        >>> with wrapper.optim_context(model):
        ...     loss = model(torch.ones(1, 2)).sum()
        >>> wrapper.update_params(loss)
        >>> loss.dtype, wrapper.skipped
        (torch.bfloat16, False)

    Source:
        mmengine.optim.AmpOptimWrapper 0.10; torch.amp.
    """

    valid_dtypes = ("float16", "bfloat16", "float32", "float64")

    def __init__(
        self,
        loss_scale: str | float | dict[str, Any] = "dynamic",
        dtype: str | torch.dtype | None = None,
        use_fsdp: bool = False,
        *,
        autocast: bool = True,
        **kwargs: Any,
    ) -> None:
        if hasattr(loss_scale, "param_groups"):
            raise ConfigTypeError(
                "loss_scale comes first; write AmpOptimWrapper(optimizer=optimizer)"
            )
        super().__init__(**kwargs)
        self.cast_dtype = checked_dtype(dtype, self.valid_dtypes)
        device = _device_type(self._parameters())
        plain = self.cast_dtype is torch.bfloat16 and loss_scale == "dynamic"
        self.loss_scaler, self._scale_update_param = scaler_of(
            loss_scale, device, enabled=not plain, use_fsdp=use_fsdp
        )
        self.autocast = autocast
        self._found_inf: list[Tensor] = []

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add the gradients of a loss, times the loss scale, to `.grad`.

        Args:
            loss: The loss, divided by `scale_loss`. Shape ().
            kwargs: Arguments of `torch.Tensor.backward`.

        Raises:
            ValueError: the loss is not a single number.
        """
        self._check_loss(loss, kwargs)
        self.loss_scaler.scale(loss).backward(**kwargs)
        SharedScaler.of(self.loss_scaler).add(self)
        self._counted()

    def step(self, **kwargs: Any) -> Any:
        """Unscale, clip or transform, and step if all gradients are finite.

        Args:
            kwargs: Arguments of the optimizer's `step`.

        Returns:
            What the optimizer's `step` returns; None if it was skipped.
        """
        scaler, shared = self.loss_scaler, SharedScaler.of(self.loss_scaler)
        shared.remove(self)
        self._found_inf = []
        if not scaler.is_enabled():
            return super().step(**kwargs)
        pushed = next((p for p in self._parameters() if p.grad is not None), None)
        if pushed is None:
            # Nothing to check; a GradScaler takes that for a mistake.
            result = self.optimizer.step(**kwargs)
        else:
            shared.reopen(self.optimizer, pushed)
            result = self._scaled_step(kwargs)
        shared.update(self._scale_update_param)
        return result

    def _scaled_step(self, kwargs: dict[str, Any]) -> Any:
        scaler, optimizer = self.loss_scaler, self.optimizer
        shared = SharedScaler.of(scaler)
        if self._on_gradients is not None or self.clip_grad_kwargs:
            if not shared.is_unscaled(optimizer):
                scaler.unscale_(optimizer)
            self._clip_grad()
        with MergedGroups(optimizer) if self._merges() else contextlib.nullcontext():
            result = scaler.step(optimizer, **kwargs)
        self._found_inf = shared.found_inf(optimizer)
        return result

    def _overflow(self) -> Tensor | None:
        shared, optimizer = SharedScaler.of(self.loss_scaler), self.optimizer
        if not shared.is_unscaled(optimizer):
            return None
        return _joined(shared.found_inf(optimizer))

    def zero_grad(self, **kwargs: Any) -> None:
        """Set all gradients to None, or to zero.

        Args:
            kwargs: Arguments of the optimizer's `zero_grad`.
        """
        super().zero_grad(**kwargs)
        shared = SharedScaler.of(self.loss_scaler)
        shared.remove(self)  # Nothing waits for a scale any more,
        shared.forget(self.optimizer)  # nor is anything unscaled.

    @property
    def skipped(self) -> bool:
        """Whether the last step was skipped, because a gradient was not finite.

        What tells lies on the device; no step waits for it if the optimizer is a
        `TransformOptimizer` with `amp_scaling`. Asking for it does.
        """
        return any(bool(found.item()) for found in self._found_inf)

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Return a context for the forward: autocast, and no needless synchronisation.

        Args:
            model: The model as it is called, in its DDP or FSDP.
        """
        param = next(model.parameters(), None)
        device = "cpu" if param is None else param.device.type
        wide = self.cast_dtype in {torch.float32, torch.float64}
        enabled = self.autocast and not wide
        dtype = None if wide else self.cast_dtype
        with (
            super().optim_context(model),
            torch.autocast(device, dtype=dtype, enabled=enabled),
        ):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return the state of an `OptimWrapper`, and `loss_scaler` if it scales."""
        found = super().state_dict()
        if self.loss_scaler.is_enabled():
            found["loss_scaler"] = plain(self.loss_scaler.state_dict())
        return found

    def _loss_scale(self) -> float:
        scaler = self.loss_scaler
        return float(scaler.get_scale()) if scaler.is_enabled() else 1.0

    def _took_gradients(self) -> None:
        super()._took_gradients()
        SharedScaler.of(self.loss_scaler).add(self)

    def _checked(self, given: dict[str, Any]) -> Iterator[Take]:
        data = given.pop("loss_scaler", None)
        # It is empty where it was saved without scaling.
        if data is not None and data != {} and self.loss_scaler.is_enabled():
            check_scaler_state(data, self.loss_scaler.state_dict())
            yield lambda: self.loss_scaler.load_state_dict(dict(data))
        yield from super()._checked(given)


def _device_type(params: list[Any]) -> str:
    return params[0].device.type if params else "cpu"


def _joined(found: list[Tensor]) -> Tensor:
    """Return whether any device found an infinity, on the first of them."""
    first = found[0]
    if len(found) == 1:
        return first
    return torch.stack([f.to(first.device) for f in found]).sum(0)

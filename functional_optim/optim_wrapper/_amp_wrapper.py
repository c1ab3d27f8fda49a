"""`AmpOptimWrapper`: the same in mixed precision, with a scaled loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from functional_optim.optim_wrapper import _grad_scaler as scaling
from functional_optim.optim_wrapper._accumulation import check_loss
from functional_optim.optim_wrapper._checkpoint import CheckedState
from functional_optim.optim_wrapper._errors import ConfigTypeError
from functional_optim.optim_wrapper._wrapper import OptimWrapper
from functional_optim.torch_optimizer._state_dict import plain


class AmpOptimWrapper(OptimWrapper):
    """An `OptimWrapper` that runs the forward in autocast and scales the loss.

    A drop-in for MMEngine's class of this name, on every device. Several wrappers may
    share a `loss_scaler`: its scale changes when none is between a backward and its
    step, so that it is the same throughout a window.

    Args:
        loss_scale: "dynamic", a number that stays, or a dict of the arguments of
            `torch.amp.GradScaler`.
        dtype: The dtype of autocast, such as "float16" or `torch.bfloat16`; None is the
            device's default. "float32" and "float64" cast nothing. With an explicit
            bfloat16 and "dynamic" no loss is scaled: its range is that of float32.
        use_fsdp: Whether to use FSDP1's scaler, which joins overflows over processes.
        autocast: Whether the forward runs in autocast; else only the loss is scaled.
        kwargs: Arguments of `OptimWrapper`.

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
        self.cast_dtype = scaling.checked_dtype(dtype, self.valid_dtypes)
        device = next((p.device.type for p in self._parameters()), "cpu")
        unscaled = self.cast_dtype is torch.bfloat16 and loss_scale == "dynamic"
        self.loss_scaler, self._scale_update_param = scaling.scaler_of(
            loss_scale, device, enabled=not unscaled, use_fsdp=use_fsdp
        )
        self.autocast = autocast
        self._found_infs: list[Tensor] = []

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Call `backward(**kwargs)` of the scaled loss, and count a micro-batch."""
        check_loss(loss, kwargs)
        super().backward(self.loss_scaler.scale(loss), **kwargs)
        scaling.hold_scale(self.loss_scaler, self)

    def step(self, **kwargs: Any) -> Any:
        """Unscale, clip or transform, and step if all gradients are finite."""
        scaler, optimizer = self.loss_scaler, self.optimizer
        scaling.release_scale(scaler, self)
        self._found_infs = []
        if not scaler.is_enabled():
            return super().step(**kwargs)
        with_grad = next((p for p in self._parameters() if p.grad is not None), None)
        if with_grad is None:
            # Nothing to check; a GradScaler takes that for a mistake.
            result = optimizer.step(**kwargs)
        else:
            scaling.reopen(scaler, optimizer, with_grad)
            if self._transform is not None or self.clip_grad_kwargs:
                if not scaling.is_unscaled(scaler, optimizer):
                    scaler.unscale_(optimizer)
                self._clip_grad()
            result = self._step_merged(scaler.step, optimizer, **kwargs)
            self._found_infs = scaling.found_infs(scaler, optimizer)
        scaling.update_scale(scaler, self._scale_update_param)
        return result

    def _overflow(self) -> Tensor | None:
        if not scaling.is_unscaled(self.loss_scaler, self.optimizer):
            return None
        first, *others = scaling.found_infs(self.loss_scaler, self.optimizer)
        return sum((other.to(first.device) for other in others), start=first)

    def zero_grad(self, **kwargs: Any) -> None:
        """Call `optimizer.zero_grad(**kwargs)`."""
        super().zero_grad(**kwargs)
        scaling.release_scale(self.loss_scaler, self)
        scaling.forget_unscaled(self.loss_scaler, self.optimizer)

    @property
    def skipped(self) -> bool:
        """Whether the last step was skipped: a gradient was not finite.

        Reading it waits for the device.
        """
        return any(bool(found.item()) for found in self._found_infs)

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Return the context of an `OptimWrapper`, with autocast in it."""
        device = next((p.device.type for p in model.parameters()), "cpu")
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
        saved = super().state_dict()
        if self.loss_scaler.is_enabled():
            saved["loss_scaler"] = plain(self.loss_scaler.state_dict())
        return saved

    def _check_state(self, state_dict: Any) -> CheckedState:
        checked = super()._check_state(state_dict)
        scaler, data = self.loss_scaler, state_dict.get("loss_scaler")
        load_scaler = []
        # It is empty where it was saved without scaling.
        if data is not None and data != {} and scaler.is_enabled():
            scaling.check_scaler_state(data, scaler.state_dict())
            load_scaler.append(lambda: scaler.load_state_dict(dict(data)))

        def hold_scale() -> None:
            if self._window.has_gradients:
                scaling.hold_scale(scaler, self)

        # The scale is loaded before the gradients, which are rescaled to it.
        return checked._replace(entries=[*load_scaler, *checked.entries, hold_scale])

    def _loss_scale(self) -> float:
        scaler = self.loss_scaler
        return float(scaler.get_scale()) if scaler.is_enabled() else 1.0

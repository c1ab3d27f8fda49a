"""A gradient scaler that several wrappers may use, each in its own time."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from torch.amp.grad_scaler import OptState

from functional_optim._compiling import untraced

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class SharedScaler:
    """A scaler, and the wrappers of it that are between a backward and their step.

    torch's scaler is for one loop that unscales all, steps all, and updates the scale.
    Here wrappers step when their windows end; the scale stays while one of them has
    gradients that were multiplied by it.

    Args:
        scaler: The scaler.
    """

    _known: ClassVar[Any] = weakref.WeakKeyDictionary()

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler = weakref.ref(scaler)
        self._wrappers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._earlier = 0

    @classmethod
    @untraced
    def of(cls, scaler: torch.amp.GradScaler) -> SharedScaler:
        """Return those of a scaler."""
        found: SharedScaler | None = cls._known.get(scaler)
        if found is None:
            found = cls._known[scaler] = cls(scaler)
        return found

    @untraced
    def add(self, wrapper: Any) -> None:
        """Note that a wrapper ran a backward."""
        self._wrappers.add(wrapper)

    @untraced
    def remove(self, wrapper: Any) -> None:
        """Note that it steps."""
        self._wrappers.discard(wrapper)

    def is_unscaled(self, optimizer: Any) -> bool:
        """Whether the gradients of an optimizer were unscaled since its last step."""
        state = self._states().get(id(optimizer))  # None yet, or no scaling.
        return state is not None and state["stage"] is OptState.UNSCALED

    def found_inf(self, optimizer: Any) -> list[Tensor]:
        """Return what tells whether gradients were not finite, for each device."""
        found = self._states()[id(optimizer)]["found_inf_per_device"].values()
        # `update` adds up the findings of all optimizers in one of these.
        return [tensor.clone() for tensor in found]

    def reopen(self, optimizer: Any, param: Tensor) -> None:
        """Let an optimizer step again although the scale was not updated meanwhile.

        What its last step found still counts when it is: under a key of its own.

        Args:
            optimizer: The optimizer.
            param: One of its parameters.
        """
        scaler: Any = self._scaler()
        if scaler._scale is None:  # Gradients were loaded, and no loss was scaled yet.
            scaler.scale(param.detach().new_zeros(()))
        states = self._states()
        if states[id(optimizer)]["stage"] is OptState.STEPPED:
            self._earlier += 1
            states[-self._earlier] = states.pop(id(optimizer))

    def forget(self, optimizer: Any) -> None:
        """Forget that gradients were unscaled: they are gone, their step failed."""
        if self.is_unscaled(optimizer):
            self._states().pop(id(optimizer))

    def update(self, new_scale: float | None) -> None:
        """Update the scale if no wrapper waits for it to stay."""
        scaler = self._scaler()
        if scaler is None or self._wrappers:
            return
        if any(state["found_inf_per_device"] for state in self._states().values()):
            scaler.update(new_scale)

    def _states(self) -> dict[int, dict[str, Any]]:
        scaler: Any = self._scaler()
        states: dict[int, dict[str, Any]]
        states = getattr(scaler, "_per_optimizer_states", {})
        return states

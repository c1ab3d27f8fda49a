"""`OptimWrapperDict`: several wrappers by name, saved and logged together."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from functional_optim.algebra._torch_modes import untraced
from functional_optim.optim_wrapper._checkpoint import undo_of
from functional_optim.optim_wrapper._errors import (
    ConfigKeyError,
    ConfigTypeError,
    ConfigValueError,
)
from functional_optim.optim_wrapper._wrapper import OptimWrapper

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


class OptimWrapperDict(OptimWrapper):
    """Several wrappers by name, such as those of a generator and a discriminator.

    A mapping that is only read. State, rates and `zero_grad` reach all wrappers; each
    runs its own backward and step, because only the training loop knows when. Where
    several have a norm, each logs it under its name: `train/gen.grad_norm`.

    Args:
        optim_wrappers: The wrappers by name.

    Raises:
        TypeError: one is no `OptimWrapper`. It is an AssertionError, too.

    Example:
        >>> import torch
        >>> gen, disc = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> wrappers = OptimWrapperDict(
        ...     gen=OptimWrapper(torch.optim.SGD(gen.parameters(), lr=0.01)),
        ...     disc=OptimWrapper(torch.optim.SGD(disc.parameters(), lr=0.02)),
        ... )
        >>> wrappers.get_lr()
        {'gen.lr': [0.01], 'disc.lr': [0.02]}

    Source:
        mmengine.optim.OptimWrapperDict 0.10.
    """

    def __init__(self, /, **optim_wrappers: OptimWrapper) -> None:
        for name, wrapper in optim_wrappers.items():
            nested = isinstance(wrapper, OptimWrapperDict)
            if nested or not isinstance(wrapper, OptimWrapper):
                raise ConfigTypeError(
                    "`OptimWrapperDict` only accept OptimWrapper instance, but got "
                    f"{name}: {type(wrapper).__module__}.{type(wrapper).__name__}; "
                    "wrap an optimizer: OptimWrapper(optimizer)"
                )
        self.optim_wrappers = optim_wrappers
        self._join()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._join()

    def _join(self) -> None:
        """Log the norm of each wrapper under the wrapper's name."""
        siblings = weakref.WeakSet(self.optim_wrappers.values())
        for name, wrapper in self.optim_wrappers.items():
            wrapper._prefix, wrapper._siblings = f"{name}.", siblings

    # -- what each wrapper does by itself ---------------------------------------------

    def update_params(
        self,
        loss: Tensor,
        step_kwargs: dict[str, Any] | None = None,
        zero_kwargs: dict[str, Any] | None = None,
    ) -> NoReturn:
        """Raise NotImplementedError: each wrapper updates its own parameters."""
        self._refuse("update_params")

    def backward(self, loss: Tensor, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError: each wrapper runs its own backward."""
        self._refuse("backward")

    def step(self, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError: each wrapper steps by itself."""
        self._refuse("step")

    def scale_loss(self, loss: Tensor) -> NoReturn:
        """Raise NotImplementedError: windows belong to each wrapper."""
        self._refuse("scale_loss")

    def should_update(self) -> NoReturn:
        """Raise NotImplementedError: windows belong to each wrapper."""
        self._refuse("should_update")

    def should_sync(self) -> NoReturn:
        """Raise NotImplementedError: windows belong to each wrapper."""
        self._refuse("should_sync")

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Raise NotImplementedError: each wrapper has a context of its own."""
        self._refuse("optim_context")
        yield

    def _refuse(self, method: str) -> NoReturn:
        name = next(iter(self.optim_wrappers), "name")
        raise NotImplementedError(
            f"`{method}` should be called by each optimizer separately: "
            f"wrappers[{name!r}].{method}(...)"
        )

    # -- what reaches all -------------------------------------------------------------

    def zero_grad(self, **kwargs: Any) -> None:
        """Set the gradients of all wrappers to None, or to zero."""
        for wrapper in self.optim_wrappers.values():
            wrapper.zero_grad(**kwargs)

    def initialize_count_status(
        self, model: nn.Module, init_counts: int, max_counts: int
    ) -> None:
        """Do nothing: only the training loop knows how often each wrapper is used."""

    @property
    def param_groups(self) -> Any:
        """The groups of each wrapper, by its name."""
        return {name: w.param_groups for name, w in self.optim_wrappers.items()}

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of each optimizer, by the name of its wrapper."""
        return {name: w.defaults for name, w in self.optim_wrappers.items()}

    @property
    def inner_count(self) -> NoReturn:
        """Raise NotImplementedError: each wrapper counts its own micro-batches."""
        self._refuse("inner_count")

    def get_lr(self) -> dict[str, list[Any]]:
        """Return the rates of all wrappers under `name.lr` and `name.base_lr`."""
        return {
            f"{name}.{key}": rates
            for name, wrapper in self.optim_wrappers.items()
            for key, rates in wrapper.get_lr().items()
        }

    def get_momentum(self) -> dict[str, list[Any]]:
        """Return the momenta of all wrappers under `name.momentum`."""
        return {
            f"{name}.momentum": wrapper.get_momentum()["momentum"]
            for name, wrapper in self.optim_wrappers.items()
        }

    def readings(self) -> dict[str, Any]:
        """Return the readings of all wrappers under `name.reading`."""
        return {
            f"{name}.{key}": value
            for name, wrapper in self.optim_wrappers.items()
            for key, value in wrapper.readings().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each wrapper, by its name."""
        return {name: w.state_dict() for name, w in self.optim_wrappers.items()}

    @untraced
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from saved states.

        Args:
            state_dict: What `state_dict` returned; it does not change.

        Raises:
            ValueError, TypeError: a name is unknown, or a state does not fit; nothing
                has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise ConfigTypeError(
                f"state_dict must be a dict, got a {type(state_dict).__name__}"
            )
        extra = [name for name in state_dict if name not in self.optim_wrappers]
        missing = [name for name in self.optim_wrappers if name not in state_dict]
        for verb, names in (("has", extra), ("lacks", missing)):
            if names:
                told = ", ".join(map(repr, names))
                raise ConfigValueError(
                    f"Mismatched `state_dict`: it {verb} {told}, the wrappers are "
                    f"{', '.join(self.optim_wrappers)}; build those that were saved, "
                    "or load one alone: wrappers[name].load_state_dict(...)"
                )
        # Who loads in a way of his own may have saved what only he knows.
        alone = {name: w for name, w in self.items() if _loads_by_itself(w)}
        loads = {
            name: wrapper.prepared(state_dict[name])
            for name, wrapper in self.items()
            if name not in alone
        }
        undo = []
        with torch.inference_mode(mode=False):
            try:
                for name, load in loads.items():
                    optimizer = self.optim_wrappers[name].optimizer
                    undo.append(undo_of(optimizer))
                    optimizer.load_state_dict(load.optimizer)
                for name, wrapper in alone.items():
                    undo.append(undo_of(wrapper.optimizer))
                    wrapper.load_state_dict(state_dict[name])
            except Exception:
                for back in undo:
                    back()
                raise
            for load in loads.values():
                for take in load.takes:
                    take()

    def summary(self, print_fn: Any = print) -> None:
        """Print the settings of each wrapper under its name."""
        for name, wrapper in self.optim_wrappers.items():
            print_fn(f"{name}:")
            wrapper.summary(print_fn)

    # -- a mapping --------------------------------------------------------------------

    def items(self) -> Iterator[tuple[str, OptimWrapper]]:
        """Yield names and wrappers."""
        yield from self.optim_wrappers.items()

    def values(self) -> Iterator[OptimWrapper]:
        """Yield the wrappers."""
        yield from self.optim_wrappers.values()

    def keys(self) -> Iterator[str]:
        """Yield the names."""
        yield from self.optim_wrappers.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.optim_wrappers)

    def __getitem__(self, key: str) -> OptimWrapper:
        if key not in self.optim_wrappers:
            raise ConfigKeyError(
                f"Cannot find {key!r} in OptimWrapperDict, it has "
                f"{', '.join(self.optim_wrappers)}"
            )
        return self.optim_wrappers[key]

    def __contains__(self, key: object) -> bool:
        return key in self.optim_wrappers

    def __len__(self) -> int:
        return len(self.optim_wrappers)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"OptimWrapperDict has no attribute {name!r}; its wrappers may have: "
            f"wrappers[name].{name}"
        )

    def __repr__(self) -> str:
        return "".join(f"name: {name}\n{w!r}" for name, w in self.items())


def _loads_by_itself(wrapper: OptimWrapper) -> bool:
    return type(wrapper).load_state_dict is not OptimWrapper.load_state_dict

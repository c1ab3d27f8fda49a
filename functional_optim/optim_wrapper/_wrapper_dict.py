"""`OptimWrapperDict`: several wrappers by name, saved and logged together."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from functional_optim.algebra._torch_modes import untraced
from functional_optim.optim_wrapper import _checkpoint as checkpoint
from functional_optim.optim_wrapper._errors import (
    ConfigKeyError,
    ConfigTypeError,
    ConfigValueError,
)
from functional_optim.optim_wrapper._wrapper import OptimWrapper


def _left_to_each(method: str) -> Any:
    """Return a method that refuses to run for several wrappers."""

    def refuse(self: OptimWrapperDict, *_: Any, **__: Any) -> Any:
        """Raise NotImplementedError: each wrapper has its own."""
        name = next(iter(self.optim_wrappers), "name")
        raise NotImplementedError(
            f"`{method}` should be called by each optimizer separately: "
            f"wrappers[{name!r}].{method}(...)"
        )

    return refuse


class OptimWrapperDict(OptimWrapper):
    """Several wrappers by name, such as those of a generator and a discriminator.

    A read-only mapping. State, rates and `zero_grad` reach all wrappers; each runs its
    own backward and step, because only the training loop knows when. Where several
    have a norm, each logs it under its name: `train/gen.grad_norm`.

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

    update_params = _left_to_each("update_params")
    backward = _left_to_each("backward")
    step = _left_to_each("step")
    scale_loss = _left_to_each("scale_loss")
    should_update = _left_to_each("should_update")
    should_sync = _left_to_each("should_sync")
    optim_context = _left_to_each("optim_context")
    inner_count = property(_left_to_each("inner_count"))

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

    # -- what reaches all ------------------------------------------------------------

    def zero_grad(self, **kwargs: Any) -> None:
        """Set the gradients of all wrappers to None, or to zero."""
        for wrapper in self.values():
            wrapper.zero_grad(**kwargs)

    def initialize_count_status(
        self, model: nn.Module, init_counts: int, max_counts: int
    ) -> None:
        """Do nothing: only the training loop knows how often each wrapper is used."""

    @property
    def param_groups(self) -> Any:
        """The groups of each wrapper, by its name."""
        return {name: wrapper.param_groups for name, wrapper in self.items()}

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of each optimizer, by the name of its wrapper."""
        return {name: wrapper.defaults for name, wrapper in self.items()}

    def get_lr(self) -> dict[str, list[Any]]:
        """Return the rates of all wrappers under `name.lr` and `name.base_lr`."""
        return self._by_name("get_lr")

    def get_momentum(self) -> dict[str, list[Any]]:
        """Return the momenta of all wrappers under `name.momentum`."""
        return self._by_name("get_momentum")

    def readings(self) -> dict[str, Any]:
        """Return the readings of all wrappers under `name.reading`."""
        return self._by_name("readings")

    def _by_name(self, method: str) -> dict[str, Any]:
        return {
            f"{name}.{key}": value
            for name, wrapper in self.items()
            for key, value in getattr(wrapper, method)().items()
        }

    def summary(self, print_fn: Any = print) -> None:
        """Print the settings of each wrapper under its name."""
        for name, wrapper in self.items():
            print_fn(f"{name}:")
            wrapper.summary(print_fn)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each wrapper, by its name."""
        return {name: wrapper.state_dict() for name, wrapper in self.items()}

    @untraced
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state for each wrapper; if a name or a state does not fit, none."""
        checkpoint.check_mapping("state_dict", state_dict)
        extra = [name for name in state_dict if name not in self]
        missing = [name for name in self if name not in state_dict]
        for verb, names in (("has", extra), ("lacks", missing)):
            if names:
                raise ConfigValueError(
                    f"Mismatched `state_dict`: it {verb} "
                    f"{', '.join(map(repr, names))}, the wrappers are "
                    f"{', '.join(self)}; build those that were saved, "
                    "or load one alone: wrappers[name].load_state_dict(...)"
                )
        checked, own_ways = [], []
        for name, wrapper in self.items():
            if type(wrapper).load_state_dict is OptimWrapper.load_state_dict:
                checked.append(wrapper._check_state(state_dict[name]))
            else:  # An override may have saved what only it knows.
                load = partial(wrapper.load_state_dict, state_dict[name])
                own_ways.append(checkpoint.CheckedState(wrapper.optimizer, load))
        checkpoint.load(checked + own_ways)

    # -- a mapping -------------------------------------------------------------------

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

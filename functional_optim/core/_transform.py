"""The words of the library: tensor maps, transforms, scopes, roles, static values.

A transform is a value with two pure methods, `init` and `update`. Everything else in
this package either is one, combines some, or runs one.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from torch.utils import _pytree

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._context import Context

T = TypeVar("T")


T_co = TypeVar("T_co", covariant=True)


class Scope(enum.IntEnum):
    """What one number of a transform's output may depend on, besides `Context.reduce`.

    Ordered from narrow to wide; the scope of a chain is the widest of its members'.

    Example:
        >>> max(Scope.ELEMENTWISE, Scope.PER_TENSOR).name
        'PER_TENSOR'
    """

    ELEMENTWISE = 0
    """The same element of update, state and parameter: may be cut anywhere."""
    PER_TENSOR = 1
    """Its own whole tensor: may be cut between tensors."""
    GLOBAL = 2
    """Other tensors, not through `Context.reduce`: may never be cut."""


class Role(enum.Enum):
    """What a transform is for, where the order of a chain depends on it.

    Optional: a transform without the class attribute `role` may stand anywhere.

    Example:
        >>> from functional_optim.transforms import Trace
        >>> Trace(0.9).role is Role.MOMENT
        True
    """

    UNSCALE = "unscale"
    ACCUMULATE = "accumulate"
    CLIP = "clip"
    MOMENT = "moment"
    LEARNING_RATE = "learning rate"
    GUARD = "guard"


@runtime_checkable
class Transform(Protocol):
    """A pure update rule. Any object with these three members is one.

    Inputs never change, and outputs share no memory with them (state carried over
    from the old state excepted). An empty map of updates means hold.

    More members are optional, and looked for on users' transforms as on ours: `role`,
    for the order of a chain; `stands_for`, a tuple of transforms whose roles count in
    its place; `resolved(name, param)`, see `resolve`; `readings(state)`, see
    `readings`; `parts(state, params)`, see `Part`; `selections(params)`, see `explain`;
    `hyperparameters`, a tuple of names of a dataclass' fields that each group of a
    `TransformOptimizer` may have its own value of. Where an executor lends memory,
    `consumes_updates` and `consumes_state` allow to overwrite: they say that `update`
    reads each entry of its updates, or of its state, once, and returns new updates.

    Example:
        >>> class Double:
        ...     scope = Scope.ELEMENTWISE
        ...
        ...     def init(self, params):
        ...         return ()
        ...
        ...     def update(self, updates, state, params, *, context=None):
        ...         return {name: 2 * u for name, u in updates.items()}, state
        >>> isinstance(Double(), Transform)
        True
    """

    @property
    def scope(self) -> Scope:
        """What one number of the output may depend on."""

    def init(self, params: TensorMap) -> Any:
        """Return the state before the first update: `()` or a NamedTuple of tensors.

        Args:
            params: Parameters by name.
        """

    def update(
        self,
        updates: TensorMap,
        state: Any,
        params: TensorMap,
        *,
        context: Context = ...,
    ) -> tuple[TensorMap, Any]:
        """Return the transformed updates and the new state.

        Args:
            updates: Gradients or updates by name; names may be missing.
            state: What `init` or the previous `update` returned.
            params: Current parameters by name.
            context: What the training loop knows; None, the usual default, is an
                empty one. `Context()` as the default works, too, but not where the
                transform is made in a compiled function. A chain always passes one.
        """


def missing_members(value: object) -> list[str]:
    """Return the members that a value lacks to be a transform."""
    return [name for name in ("init", "update", "scope") if not hasattr(value, name)]


def is_transform(value: object) -> bool:
    """Return whether a value has the members of a transform.

    As `isinstance(value, Transform)`, which is False under torch.compile for a
    combinator that is made inside the compiled function.
    """
    return not missing_members(value)


@dataclasses.dataclass(frozen=True)
class Static(Generic[T_co]):
    """A value in a state that the host must know: a pytree node without leaves.

    For what decides the *structure* of a result, such as the position in an
    accumulation window. `vmap` and `torch.compile` see it as a constant.

    Args:
        value: Plain hashable data: int, str, bool, or a tuple of these.

    Example:
        >>> import torch
        >>> torch.utils._pytree.tree_leaves(Static(3))
        []
    """

    value: T_co


_pytree.register_pytree_node(
    Static,
    lambda static: ([], static.value),
    lambda _, value: Static(value),
    serialized_type_name="functional_optim.Static",
    flatten_with_keys_fn=lambda static: ([], static.value),
)


def inner_transforms(transform: object) -> tuple[Transform, ...]:
    """Return the transforms that a combinator was built from, in field order.

    Example:
        >>> from functional_optim.transforms import Masked, Scale
        >>> inner_transforms(Masked(Scale(2.0), mask="*.bias"))
        (Scale(2.0),)
    """
    if not dataclasses.is_dataclass(transform):
        return ()
    found: list[Transform] = []
    for field in dataclasses.fields(transform):
        value = getattr(transform, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        if isinstance(value, Mapping):
            parts = tuple(value.values())
        # A look at all members of each number of a map by name would take seconds.
        candidates = (part for part in parts if type(part) is not float)
        found.extend(part for part in candidates if is_transform(part))
    return tuple(found)


def with_inner(transform: T, change: Callable[[Transform], Transform]) -> T:
    """Return a combinator with other transforms inside; the same one if none differs.

    Example:
        >>> from functional_optim.transforms import Masked, Scale
        >>> with_inner(Masked(Scale(2.0), mask="*.bias"), lambda inner: Scale(3.0))
        Masked(Scale(3.0), '*.bias')
    """
    if not dataclasses.is_dataclass(transform) or isinstance(transform, type):
        return transform
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(transform):
        old = getattr(transform, field.name)
        new = _changed(old, change)
        if new is not old:
            changes[field.name] = new
    return dataclasses.replace(transform, **changes) if changes else transform


def _changed(value: Any, change: Callable[[Transform], Transform]) -> Any:
    """Change a transform, or those of a tuple or map, if any differs."""
    if is_transform(value) and not isinstance(value, type):
        return change(value)
    if isinstance(value, tuple):
        parts = tuple(_changed(part, change) for part in value)
        return (
            parts
            if any(a is not b for a, b in zip(parts, value, strict=True))
            else value
        )
    if isinstance(value, dict):
        entries = {key: _changed(part, change) for key, part in value.items()}
        return entries if any(entries[k] is not value[k] for k in value) else value
    return value

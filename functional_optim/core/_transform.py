"""The protocol of transforms: scopes, roles, static values in states.

A transform is a value with two pure methods, `init` and `update`.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from torch.utils import _pytree

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._context import Context

T = TypeVar("T")

T_co = TypeVar("T_co", covariant=True)


class Scope(enum.IntEnum):
    """The values that one number of an update may depend on, besides `Context.reduce`.

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
    """The purpose of a transform, where the order of a chain depends on it.

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

    More members are optional, and looked for on users' transforms as on ours:

    - `role`, for the order of a chain; `stands_for`, a tuple of transforms whose roles
      count in its place.
    - `hyperparameters`, a tuple of names of a dataclass' fields that each group of a
      `TransformOptimizer` may have its own value of; `resolved(name, param)`, see
      `resolve`.
    - `readings(state)`, see `readings`; `selections(params)`, see `explain`.
    - A combinator, a transform made of transforms, has `children() -> {label:
      transform}`, `with_children(children)`, which returns it with others inside, and
      `split_state(state) -> {label: state}`; `route(name, param) -> label or None` if
      one child at most serves a parameter. It gives `context.child(label)` to a child.
      A router runs in place on packed memory only if it has `resolved`, too.
      A label is a position (int) or a name (string).
    - `consumes_state` allows an executor to let it overwrite its state: `update` reads
      each entry of it once.

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
    """A value in a state that is known on the host: a pytree node without leaves.

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

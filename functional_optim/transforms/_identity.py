"""Pass updates through, or name a transform."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from functional_optim.algebra._tensor_map import TensorMap, copied
from functional_optim.core._chain import validate_transform
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import checked, value_class
from functional_optim.core._transform import Scope, Transform
from functional_optim.core._traversal import Label
from functional_optim.core._validation import check_parameters, validate_name


@final
@value_class
class Identity:
    """Pass updates through: u <- u.

    The result is a copy, so that no output is the caller's tensor.

    Shapes:
        Every update keeps its shape, dtype, device and name.

    Example:
        >>> import torch
        >>> Identity().update({"w": torch.ones(2)}, (), {"w": torch.ones(2)})
        ({'w': tensor([1., 1.])}, ())

    Source:
        optax.identity.
    """

    scope: ClassVar[Scope] = Scope.ELEMENTWISE

    def init(self, params: TensorMap) -> tuple[()]:
        """Return the empty state."""
        check_parameters(params)
        return ()

    def update(
        self,
        updates: TensorMap,
        state: tuple[()],
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, tuple[()]]:
        """Return a copy of the updates."""
        return copied(updates), state


@final
@value_class
class Named:
    """Give a transform a name, and change nothing: u <- inner(u).

    By the name `state_of` finds its state, and `readings` prefixes what it has to tell:
    the norm of `Named("outer", ClipByGlobalNorm(1.0))` is `"outer.norm"`. `chain` sees
    through it: what must stand first or last must so with a name, too.

    Args:
        name: The name. Not empty, without ".".
        inner: The transform.

    State:
        The state of `inner` itself: a checkpoint does not know the name.

    Shapes:
        As `inner`.

    Raises:
        ValueError: `name` is empty or contains ".".
        TypeError: `name` is no string, `inner` is no transform.

    Example:
        >>> import torch
        >>> from functional_optim import ClipByGlobalNorm, chain, state_of
        >>> pipeline = chain(Named("outer", ClipByGlobalNorm(1.0)))
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> _, state = pipeline.update(params, pipeline.init(params), params)
        >>> state_of(pipeline, state, "outer").norm
        tensor(5., dtype=torch.float64)

    Source:
        optax.named_chain.
    """

    name: str = checked(check=validate_name)
    inner: Transform = checked(check=validate_transform)

    consumes_state: ClassVar[bool] = True

    @property
    def stands_for(self) -> tuple[Transform, ...]:
        """The transform whose role counts in a chain: the inner one."""
        return (self.inner,)

    @property
    def scope(self) -> Scope:
        """The scope of the inner transform."""
        return self.inner.scope

    def init(self, params: TensorMap) -> Any:
        """Return the inner state."""
        check_parameters(params)
        return self.inner.init(params)

    def update(
        self,
        updates: TensorMap,
        state: Any,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, Any]:
        """Return inner(u)."""
        context = (context or Context()).child(self.name)
        return self.inner.update(updates, state, params, context=context)

    def children(self) -> dict[Label, Transform]:
        """Return the inner transform by its name."""
        return {self.name: self.inner}

    def with_children(self, children: Mapping[Label, Transform]) -> Named:
        """Return the name with another transform."""
        return Named(self.name, children[self.name])

    def split_state(self, state: Any) -> dict[Label, Any]:
        """Return the same state."""
        return {self.name: state}

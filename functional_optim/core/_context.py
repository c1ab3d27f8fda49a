"""`Context`: what a training loop passes to transforms, and sums over all tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from functional_optim.core._value_class import value_equal, value_hash


@dataclasses.dataclass(frozen=True)
class Norm:
    """The `op` of `Context.reduce` that joins partial p-norms into their joint p-norm.

    Args:
        p: Order of the norm. > 0; `math.inf` is the largest magnitude.

    Raises:
        ValueError: `p` is not greater than 0.

    Example:
        >>> Context().reduce(torch.tensor([3.0, 4.0]), Norm(2.0))
        tensor(5.)
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise ValueError(f"p must be > 0 (math.inf is allowed), got {self.p}")


ReduceOp: TypeAlias = Literal["sum", "max", "all"] | Norm


class Reducer(Protocol):
    """A function that answers `Context.reduce` in an update of a part.

    Example:
        >>> def half_of_all(path, partial, op):
        ...     return 2 * reduce_locally(partial, op)
        >>> Context(reducer=half_of_all).reduce(torch.ones(3), "sum")
        tensor(6.)
    """

    def __call__(
        self, path: tuple[int | str, ...], partial: Tensor, op: ReduceOp
    ) -> Tensor:
        """Return the total over all parts for this call, the 0-dim result of `op`."""


def reduce_locally(partial: Tensor, op: ReduceOp) -> Tensor:
    """Reduce per-tensor values to one number, without a reducer.

    Example:
        >>> reduce_locally(torch.tensor([1.0, 2.0]), "sum")
        tensor(3.)
    """
    if isinstance(op, Norm):
        if partial.numel() == 0:
            return partial.sum()
        norm: Tensor = torch.linalg.vector_norm(partial, op.p)
        return norm
    if op == "sum":
        return partial.sum()
    if op == "all":
        return partial.all()
    if op == "max":
        if partial.numel() == 0:
            return partial.new_full((), -math.inf)
        return partial.max()
    raise ValueError(f"op must be 'sum', 'max', 'all' or Norm(p), got {op!r}")


@dataclasses.dataclass(frozen=True, init=False, eq=False)
class Context:
    """Values that the training loop passes to transforms beside gradients.

    Args:
        loss: Loss of this step, for transforms that look at it. Shape ().
        weight: Weight of this micro-batch in a mean, such as its number of tokens. A
            plain number must be finite and >= 0; a tensor, of shape (), is not looked
            at. None counts as 1. Plain numbers here and in `loss` become float64
            tensors, so that torch.compile makes one graph for all of them.
        last: Whether the data ends here: an open accumulation window is closed.
        differentiable: Whether to record the autograd graph of the update.
        reducer: Who answers `reduce`; None answers from the tensors at hand.
        path: Where in the chain this context is used, outermost index first.

    Raises:
        ValueError: `weight` is a number that is negative or not finite, or a tensor
            that is not 0-dim.
        TypeError: `weight` or `loss` is neither.

    Example:
        >>> Context(weight=512, last=True).weight
        tensor(512., dtype=torch.float64)
    """

    loss: Tensor | None = None
    weight: Tensor | None = None
    last: bool = False
    differentiable: bool = False
    reducer: Reducer | None = None
    path: tuple[int | str, ...] = ()

    def __init__(
        self,
        *,
        loss: float | Tensor | None = None,
        weight: float | Tensor | None = None,
        last: bool = False,
        differentiable: bool = False,
        reducer: Reducer | None = None,
        path: tuple[int | str, ...] = (),
    ) -> None:
        self.__dict__.update(
            loss=_as_tensor("loss", loss),
            weight=_as_tensor("weight", _checked_weight(weight)),
            last=last,
            differentiable=differentiable,
            reducer=reducer,
            path=path,
        )

    # Not those of a dataclass: it compares tensors by number, and hashes by identity.
    __eq__ = value_equal
    __hash__ = value_hash

    def reduce(self, partial: Tensor | Callable[[], Tensor], op: ReduceOp) -> Tensor:
        """Reduce one value per tensor over all tensors of the model.

        A transform computes one value per tensor it was given, and gets the total.
        When an update runs on a part of the parameters (a bucket, a shard), whoever
        runs it supplies the total of all parts, so the same code serves both. Calls
        must not depend on the values of tensors.

        Args:
            partial: One value per tensor, in the order of the map. Shape (n,). Or a
                function that returns it: where the total is known from a pass before
                it is not called.
            op: `"sum"`, `"max"`, `"all"` or `Norm(p)`.

        Returns:
            The total. Shape ().

        Raises:
            ValueError: `partial` is not 1-dim, or `op` is none of the above.

        Example:
            >>> Context().reduce(torch.tensor([True, False]), "all")
            tensor(False)
        """
        if not isinstance(partial, Tensor):
            known = getattr(self.reducer, "known", None)
            total: Tensor | None = None if known is None else known(self.path)
            if total is not None:
                return total
            partial = partial()
        if partial.ndim != 1:
            raise ValueError(
                "partial must hold one value per tensor, shape (n,), got shape "
                f"{tuple(partial.shape)}"
            )
        if self.reducer is None:
            return reduce_locally(partial, op)
        return self.reducer(self.path, partial, op)

    @property
    def is_partial(self) -> bool:
        """Whether the update may run on a part of the tensors: a reducer is set.

        Example:
            >>> Context().is_partial
            False
        """
        return self.reducer is not None

    def child(self, label: int | str) -> Context:
        """Return the context for a child: the same, one step further down the path.

        Args:
            label: Position or name of the child in its combinator.

        Example:
            >>> Context(reducer=lambda path, partial, op: partial.sum()).child(2).path
            (2,)
        """
        if self.reducer is None:  # Nobody will ask for the path.
            return self
        return self._replaced(path=(*self.path, label))

    def with_reducer(self, reducer: Reducer, **changes: Any) -> Context:
        """Return the context of an update that runs on a part of the parameters.

        Args:
            reducer: Who answers `reduce`.
            changes: Other fields, which are not checked again.

        Example:
            >>> context = Context(weight=2.0)
            >>> context.with_reducer(lambda path, partial, op: partial.sum()).weight
            tensor(2., dtype=torch.float64)
        """
        return self._replaced(reducer=reducer, **changes)

    def _replaced(self, **changes: object) -> Context:
        """Replace fields without checks: this runs for every child."""
        other = object.__new__(Context)
        other.__dict__.update(self.__dict__, **changes)
        return other


def _checked_weight(weight: Any) -> Any:
    """Validate the weight of a micro-batch."""
    if isinstance(weight, Tensor) and weight.ndim != 0:
        raise ValueError(
            "weight must be a number or a 0-dim tensor, got shape "
            f"{tuple(weight.shape)}; pass weight.sum()"
        )
    if isinstance(weight, (int, float)) and not 0 <= weight < math.inf:
        raise ValueError(f"weight must be finite and >= 0, got {weight}")
    return weight


def _as_tensor(name: str, value: Any) -> Tensor | None:
    """Return a number as a tensor; tensors and None as they are."""
    if value is None or isinstance(value, Tensor):
        return value
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a 0-dim tensor, got {value!r}")
    # Not torch.tensor(value): to it each value is a constant of a graph.
    return torch.ones((), dtype=torch.float64, device="cpu") * value

"""Track `Accumulate` in place: which steps hold, and which parameters a step moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from functional_optim.core._context import Context
from functional_optim.core._transform import Role, Static, Transform
from functional_optim.core._traversal import children_of, routes, walk
from functional_optim.execution._state_tree import (
    flatten,
    statics_of,
    tree_map,
    unflatten,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    from torch import Tensor

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.execution._state_tree import Leaf

_MOST_KNOWN = 256
"""Where gradients are missing by chance, no effect comes again."""


class StepEffect(NamedTuple):
    """The effect of a step: new `Static` values, and the parameters that it moves."""

    statics: dict[int, Static[Any]]
    moved: list[str]


class AccumulationTracker:
    """Finds the effect of a step by running it on tensors without memory.

    A unit sees its own parameters only. The effect depends on nothing but values on the
    host, so it is kept.
    """

    def __init__(self, transform: Transform, template: Any, params: TensorMap) -> None:
        self._transform, self._template = transform, template
        self._params = params
        self._known: dict[Hashable, StepEffect] = {}

    def effect_of(
        self,
        dtypes: Mapping[str, torch.dtype | None],
        leaves: list[Leaf],
        *,
        last: bool = False,
    ) -> StepEffect:
        """Return the effect of a step with gradients of these dtypes."""
        key = tuple(dtypes.items()), statics_of(leaves), last
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            try:
                effect = self._run(lambda t: t.to("meta"), dtypes, leaves, last=last)
            except RuntimeError:
                # A number is read on the host, as by error_if_nonfinite: zeros have
                # one, at the price of results as large as the parameters.
                effect = self._run(_zeros, dtypes, leaves, last=last)
            self._known[key] = effect
        return self._known[key]

    def _run(
        self,
        stand_in: Callable[[Tensor], Tensor],
        dtypes: Mapping[str, torch.dtype | None],
        leaves: list[Leaf],
        *,
        last: bool,
    ) -> StepEffect:
        state = tree_map(unflatten(self._template, leaves), stand_in)
        params = {name: stand_in(param) for name, param in self._params.items()}
        updates = {n: params[n].to(dtype) for n, dtype in dtypes.items() if dtype}
        moved, new = self._transform.update(
            updates, state, params, context=Context(last=last)
        )
        statics = {
            index: leaf
            for index, leaf in enumerate(flatten(new))
            if isinstance(leaf, Static)
        }
        return StepEffect(statics, list(moved))


def _zeros(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(()).expand(tensor.shape)


def check_accumulation(transform: Transform) -> None:
    """Refuse `Accumulate` in place anywhere but first, or behind `Unscale` at most."""
    earlier: Transform | None = None
    for member in _members(transform):
        if not any(_accumulates(node.transform) for node in walk(member)):
            if getattr(member, "role", None) is not Role.UNSCALE:
                earlier = earlier or member
            continue
        if not _accumulates(member):
            found = f"{member!r} has one inside; take it out"
        elif earlier is None:
            earlier = member
            continue
        elif _accumulates(earlier):
            found = f"{earlier!r} comes before {member!r}; keep one"
        else:
            found = f"{earlier!r} comes before {member!r}; move it behind Accumulate"
        raise ValueError(
            f"in place, Accumulate must be the first member of the chain: {found}, or, "
            "where it must act on each micro-batch, use the pure way: transform.update "
            "and apply_updates"
        )


def _members(transform: Transform) -> Iterator[Transform]:
    """Yield the members of a chain, through names and the chains in them."""
    children = children_of(transform)
    if not children or routes(transform):
        yield transform
    else:
        for child in children.values():
            yield from _members(child)


def _accumulates(transform: object) -> bool:
    return getattr(transform, "role", None) is Role.ACCUMULATE

"""Which optimizer of torch computes what the transforms of a group compute."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from functional_optim._resolving import is_zero
from functional_optim.core._chain import Chain
from functional_optim.core._transform import inner_transforms
from functional_optim.torch_optimizer._group_hyperparameters import (
    Choices,
    on_path,
    options_of,
)
from functional_optim.transforms import (
    AddDecayedWeights,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Identity,
    Named,
    Observe,
    Partition,
    Scale,
    ScaleByAdam,
    ScaleByLearningRate,
    SkipNonfinite,
    Trace,
    Unscale,
    ZeroNans,
)

if TYPE_CHECKING:
    from functional_optim.core._transform import Transform

_TRANSPARENT = (Chain, Named, Partition, SkipNonfinite)
"""What only holds other transforms, as far as hyperparameters and state go."""

_OPTIMIZERS: Mapping[tuple[type, ...], type[torch.optim.Optimizer]] = {
    (ScaleByAdam, AddDecayedWeights, ScaleByLearningRate): torch.optim.AdamW,
    (ScaleByAdam, ScaleByLearningRate): torch.optim.Adam,
    (AddDecayedWeights, ScaleByAdam, ScaleByLearningRate): torch.optim.Adam,
    (AddDecayedWeights, Trace, ScaleByLearningRate): torch.optim.SGD,
    (AddDecayedWeights, ScaleByLearningRate): torch.optim.SGD,
    (Trace, ScaleByLearningRate): torch.optim.SGD,
    (ScaleByLearningRate,): torch.optim.SGD,
}
_CORE = {kind for kinds in _OPTIMIZERS for kind in kinds}
_BEFORE = (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Identity,
    Observe,
    Unscale,
    ZeroNans,
)
"""What a loop around an optimizer of torch does to gradients by itself."""


@functools.cache
def _defaults(optimizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = optimizer([torch.zeros(())]).defaults
    return found


class Counterpart(NamedTuple):
    """An optimizer of torch, and what of it the transforms of a group have.

    Attributes:
        optimizer: Its class.
        keys: The keys of its groups that the transforms have, too.
        dampens: Whether momentum is dampened, so that the first update is special.
        decays: Whether weights decay; without, Adam and AdamW are the same.
    """

    optimizer: type[torch.optim.Optimizer]
    keys: frozenset[str]
    dampens: bool
    decays: bool

    @property
    def defaults(self) -> dict[str, Any]:
        """All options of the class, in the version of torch that is installed."""
        make: Any = self.optimizer
        return dict(_defaults(make))


def counterparts(transform: Transform, groups: Sequence[Choices]) -> list[Counterpart]:
    """Return the optimizer of torch that does the same, for each group.

    What stands in front of it, such as a clip, is what a torch loop does before the
    step.

    Args:
        transform: The transform of all groups.
        groups: The labels of the parameters of each.

    Raises:
        ValueError: there is none, or not one for all groups; it says why.
    """
    found = [
        _counterpart(transform, choices, f"param_groups[{index}]")
        for index, choices in enumerate(groups)
    ]
    adams = {torch.optim.Adam, torch.optim.AdamW}
    decided = {one.optimizer for one in found if one.decays}
    if len(decided & adams) == 1:
        [adam] = decided & adams
        found = [
            one._replace(optimizer=adam) if one.optimizer in adams else one
            for one in found
        ]
    names = sorted({one.optimizer.__name__ for one in found})
    if len(names) > 1:
        msg = (
            f"the groups have no counterpart in torch.optim: they are those of "
            f"{' and '.join(names)}, and a state dict is of one class"
        )
        raise ValueError(msg)
    return found


def _counterpart(transform: Transform, choices: Choices, place: str) -> Counterpart:
    """Return the optimizer of torch that does the same to one group."""
    path = [found.transform for found in on_path(transform, choices)]
    leaves = [one for one in path if not inner_transforms(one)]
    for one in path:
        if inner_transforms(one) and not isinstance(one, _TRANSPARENT):
            raise _without(place, f"{one!r} acts on some of its parameters only")
    kinds = list(map(type, leaves))
    start = next((i for i, kind in enumerate(kinds) if kind in _CORE), len(kinds))
    found = _OPTIMIZERS.get(tuple(kinds[start:]))
    if found is None:
        written = " -> ".join(kind.__name__ for kind in kinds) or "nothing"
        raise _without(place, f"it is none of sgd, adam and adamw, but {written}")
    for leaf in leaves[:start]:
        # The sign is what torch calls maximize.
        if not isinstance(leaf, _BEFORE) and leaf != Scale(-1.0):
            raise _without(place, f"torch has no {leaf!r} before its rule")
    for leaf in leaves[start:]:
        _check_plain(leaf, place)
    options = options_of(transform, choices)
    for option in options:
        if option.scheduled:
            raise _without(
                place,
                f"{option.key} is a schedule, whose count torch keeps in an "
                "LRScheduler; put a number into the transform",
            )
    dampens = any(isinstance(x, Trace) and not is_zero(x.dampening) for x in leaves)
    return Counterpart(
        optimizer=found,
        keys=frozenset(option.key for option in options),
        dampens=dampens,
        decays=AddDecayedWeights in kinds,
    )


def _check_plain(leaf: object, place: str) -> None:
    """Refuse what torch has no place for in one transform."""
    if isinstance(leaf, AddDecayedWeights) and leaf.mask is not None:
        raise _without(
            place,
            f"{leaf!r} decays some of its parameters; use two groups, or a Partition "
            "with a preset for each",
        )
    for name, value in vars(leaf).items():
        parts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, Mapping) for part in parts):
            raise _without(
                place, f"{name} differs by parameter; use a group for each value"
            )


def _without(place: str, reason: str) -> ValueError:
    return ValueError(f"{place} has no counterpart in torch.optim: {reason}")

"""Convert state dicts to those of torch's optimizers, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._torch_modes import untraced
from functional_optim.core._hyperparameters import is_zero
from functional_optim.core._transform import Role, Transform
from functional_optim.core._traversal import children_of, routes
from functional_optim.torch_optimizer._engine import Engine
from functional_optim.torch_optimizer._group_keys import (
    OWN_KEYS,
    group_value,
    parts_of,
    stages_of,
)
from functional_optim.torch_optimizer._optimizer import TransformOptimizer
from functional_optim.torch_optimizer._param_groups import GroupRecord
from functional_optim.torch_optimizer._state_dict import pack_groups, saved_groups
from functional_optim.transforms import (
    AddDecayedWeights,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Identity,
    Observe,
    Scale,
    ScaleByAdam,
    ScaleByLearningRate,
    Trace,
    Unscale,
    ZeroNans,
)

_STARTED = "Trace.started"
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
_NUMBERS = {"lr", "betas", "eps", "weight_decay", "momentum", "dampening"}
_FLAGS = {"amsgrad", "nesterov", "maximize"}


@untraced
def to_torch_state_dict(optimizer: TransformOptimizer) -> dict[str, Any]:
    """Return the state of an optimizer for the class of torch that does the same.

    For `sgd`, `adam` and `adamw`, alone or behind what a torch loop does before the
    step, such as `ClipByGlobalNorm`; also one for each label of a `Partition`.
    `torch.optim.AdamW` over the same parameters in the same groups, given

        theirs.load_state_dict(to_torch_state_dict(optimizer))

    goes on where the optimizer stands: in float64 with the same numbers up to rounding.
    What the transforms before it keep, such as the last norm, has no place there.

    Args:
        optimizer: A `TransformOptimizer`.

    Returns:
        A state dict of its own memory: nothing is shared with the optimizer.

    Raises:
        ValueError: no class of torch does the same: another rule, a decay with a mask,
            a schedule, an `Accumulate`. It names the group and the reason.
        TypeError: `optimizer` is no `TransformOptimizer`.

    Example:
        >>> import functional_optim as fo
        >>> params = [torch.nn.Parameter(torch.ones(2))]
        >>> ours = fo.TransformOptimizer(params, fo.adamw(1e-3, weight_decay=0.1))
        >>> params[0].grad = torch.ones(2)
        >>> ours.step()
        >>> theirs = torch.optim.AdamW(params)
        >>> theirs.load_state_dict(fo.to_torch_state_dict(ours))
        >>> theirs.param_groups[0]["weight_decay"], theirs.state[params[0]]["step"]
        (0.1, tensor(1.))

    Source:
        torch.optim.SGD, Adam, AdamW.
    """
    engine, kinds = _counterparts(optimizer)
    packed = pack_groups(optimizer.param_groups, optimizer._groups)
    groups = [
        {**_torch_options(group, kind), "params": group["params"]}
        for group, kind in zip(packed, kinds, strict=True)
    ]
    names = optimizer._groups.names.values()
    entries = [_torch_entries(engine.entries(name)) for name in names]
    state = {index: own for index, own in enumerate(entries) if own}
    return {"state": state, "param_groups": groups}


@untraced
def from_torch_state_dict(
    optimizer: TransformOptimizer, state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state dict of one of torch's optimizers in the form of this one.

        optimizer.load_state_dict(from_torch_state_dict(optimizer, theirs.state_dict()))

    goes on where theirs stands: in float64 with the same numbers up to rounding. What
    the transforms before it keep stays as it is in the optimizer.

    Args:
        optimizer: A `TransformOptimizer`; it is only read.
        state_dict: Of `torch.optim.SGD`, `Adam` or `AdamW`, over the same parameters in
            the same groups. It is not changed.

    Returns:
        What `optimizer.load_state_dict` takes.

    Raises:
        ValueError: no class of torch does the same as the optimizer; or the state dict
            is of another class, of other groups, or differs in `amsgrad`, `nesterov`,
            `maximize`, in whether momentum is dampened, or in where weights decay; or
            it asks for a decay or a momentum that the transform does not have.
        TypeError: `optimizer` is no `TransformOptimizer`.

    Example:
        >>> import functional_optim as fo
        >>> params = [torch.nn.Parameter(torch.ones(2))]
        >>> theirs = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        >>> params[0].grad = torch.ones(2)
        >>> theirs.step()
        >>> ours = fo.TransformOptimizer(params, fo.sgd(1e-3, momentum=0.5))
        >>> ours.load_state_dict(fo.from_torch_state_dict(ours, theirs.state_dict()))
        >>> ours.param_groups[0]["momentum"], ours.state[params[0]]["momentum_buffer"]
        (0.9, tensor([1., 1.]))

    Source:
        torch.optim.SGD, Adam, AdamW.
    """
    engine, kinds = _counterparts(optimizer)
    theirs = saved_groups(state_dict, optimizer.param_groups)
    result = optimizer.state_dict()
    ours = result["param_groups"]
    for index, (group, own, kind) in enumerate(zip(theirs, ours, kinds, strict=True)):
        _check_torch_options(group, own, kind, f"param_groups[{index}]")
        own.update(_own_options(group, kind))
    first = engine.first_entries()
    indices = [index for group in theirs for index in group["params"]]
    members = zip(optimizer._groups.names.items(), indices, strict=True)
    for position, ((param, name), index) in enumerate(members):
        given = state_dict["state"].get(index, {})
        if given or param in engine.names:
            result["state"][position] = _own_entries(given, first[name])
    return result


# -- to torch ----------------------------------------------------------------------
def _torch_options(group: Mapping[str, Any], kind: Counterpart) -> dict[str, Any]:
    """Return the options of one group as the class of torch has them."""
    options = kind.defaults
    off = {"weight_decay", "momentum"} & options.keys() - kind.keys
    # What schedulers and users keep in a group goes along.
    options |= {
        key: copy.deepcopy(group_value(value))
        for key, value in group.items()
        if key not in OWN_KEYS and (key in options or key not in kind.keys)
    }
    return options | dict.fromkeys(off, 0.0)


def _torch_entries(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of one parameter as torch has it; none before its first step."""
    started = entries.get("step", entries.get(_STARTED))
    if started is not None and not started:
        return {}
    moments = {key: entries[key].clone() for key in _MOMENTS if key in entries}
    if "step" not in entries:
        return moments
    # torch counts on the host, in the default dtype.
    wide = torch.get_default_dtype() is torch.float64
    dtype = torch.float64 if wide else torch.float32
    return {"step": entries["step"].to("cpu", dtype, copy=True), **moments}


# -- from torch --------------------------------------------------------------------
def _check_torch_options(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], kind: Counterpart, place: str
) -> None:
    """Refuse options of torch that differ from those of the transforms."""
    name = kind.optimizer.__name__
    required = kind.defaults.keys() & (_NUMBERS | _FLAGS)
    missing = sorted(required - theirs.keys() - {"maximize"})  # torch 1.10 had none.
    if missing:
        raise ValueError(
            f"{place} of the state dict lacks {format_names(missing)}, which "
            f"torch.optim.{name} has; it is of another class"
        )
    for key in ("weight_decay", "momentum"):
        if key in required - kind.keys and theirs[key] != 0:
            raise ValueError(
                f"{place} has {key}={theirs[key]} in the state dict, and the transform "
                f"here has none; build the optimizer with a preset with {key}"
            )
    for key in _FLAGS & ours.keys():
        if bool(theirs.get(key, False)) != ours[key]:
            raise _unlike(place, key, theirs.get(key, False), ours[key])
    decoupled = kind.optimizer is torch.optim.AdamW
    theirs_decoupled = theirs.get("decoupled_weight_decay", decoupled)
    if theirs_decoupled != decoupled and theirs["weight_decay"] != 0:
        raise _unlike(place, "decoupled_weight_decay", theirs_decoupled, decoupled)
    if "momentum" in kind.keys:
        given, own = theirs["dampening"], ours["dampening"]
        if (given == 0) != is_zero(own):
            raise _unlike(place, "dampening", given, own)


def _unlike(place: str, key: str, theirs: object, ours: object) -> ValueError:
    return ValueError(
        f"{place} has {key}={theirs} in the state dict, {ours} here; it decides what "
        "is remembered: build the optimizer with the options of the one that was saved"
    )


def _own_options(theirs: Mapping[str, Any], kind: Counterpart) -> dict[str, Any]:
    """Return the options of a group here from those of one of torch."""
    # What schedulers and users keep in a group goes along.
    known = kind.defaults.keys() | (OWN_KEYS - {"param_names"}) | _FLAGS
    options = {k: v for k, v in theirs.items() if k in kind.keys or k not in known}
    if "betas" in options:  # JSON has no tuples.
        options["betas"] = tuple(options["betas"])
    return copy.deepcopy(options)


def _own_entries(
    theirs: Mapping[str, Any], first: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the state of one parameter from that of torch."""
    entries = {key: value for key, value in theirs.items() if value is not None}
    if not entries:
        return dict(first)
    if _STARTED in first:
        entries[_STARTED] = torch.ones((), dtype=torch.bool)
    if "step" in first and "step" in entries:  # Once a Python number.
        entries["step"] = torch.as_tensor(entries["step"]).to(first["step"])
    return entries


# -- counterparts ------------------------------------------------------------------

_OPTIMIZERS: Mapping[tuple[type, ...], type[torch.optim.Optimizer]] = {
    (ScaleByAdam, AddDecayedWeights, ScaleByLearningRate): torch.optim.AdamW,
    (ScaleByAdam, ScaleByLearningRate): torch.optim.Adam,
    (AddDecayedWeights, ScaleByAdam, ScaleByLearningRate): torch.optim.Adam,
    (AddDecayedWeights, Trace, ScaleByLearningRate): torch.optim.SGD,
    (AddDecayedWeights, ScaleByLearningRate): torch.optim.SGD,
    (Trace, ScaleByLearningRate): torch.optim.SGD,
    (ScaleByLearningRate,): torch.optim.SGD,
}
_RULES = {kind for kinds in _OPTIMIZERS for kind in kinds}
_ADAMS = {torch.optim.Adam, torch.optim.AdamW}

_BEFORE = (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Identity,
    Observe,
    Unscale,
    ZeroNans,
)
"""What a training loop with an optimizer of torch does to gradients itself."""


class Counterpart(NamedTuple):
    """A class of torch, and the keys of it that the transforms of a group have."""

    optimizer: type[torch.optim.Optimizer]
    keys: frozenset[str]

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of the class, in the version of torch that is installed."""
        make: Any = self.optimizer
        return dict(make([torch.zeros(())]).defaults)


def _counterparts(optimizer: TransformOptimizer) -> tuple[Engine, list[Counterpart]]:
    """Return the engine of an optimizer, and the counterpart of each of its groups."""
    if not isinstance(optimizer, TransformOptimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a TransformOptimizer, got a {kind}")
    with torch.no_grad():
        engine = optimizer._synced_engine()
    if engine.executor.holds:
        raise ValueError(
            "torch.optim has no place for the open window of an Accumulate; leave it "
            "out of the transform and accumulate in .grad"
        )
    records = optimizer._groups.records
    kinds = [_counterpart(optimizer._transform, record) for record in records]
    for record, group in zip(records, optimizer.param_groups, strict=True):
        if group.get("eps_root", 0.0) != 0:
            reason = f"it has eps_root={group['eps_root']}, and torch has none"
            raise _without(record.place, reason)
    # A group without decay is of either Adam: of that of the others.
    decided = {one.optimizer for one in kinds if "weight_decay" in one.keys} & _ADAMS
    if len(decided) == 1:
        [adam] = decided
        kinds = [
            one._replace(optimizer=adam) if one.optimizer in _ADAMS else one
            for one in kinds
        ]
    names = sorted({one.optimizer.__name__ for one in kinds})
    if len(names) > 1:
        raise ValueError(
            f"the groups have no counterpart in torch.optim: they are those of "
            f"{' and '.join(names)}, and a state dict is of one class"
        )
    return engine, kinds


def _counterpart(transform: Transform, record: GroupRecord) -> Counterpart:
    """Return the class of torch that does the same to one group."""
    place = record.place
    stages = stages_of(transform, record.labels).values()
    leaves = [one for one in stages if not children_of(one)]
    for one in stages:
        if children_of(one) and not _is_transparent(one):
            raise _without(
                place,
                f"{one!r} acts on some of its parameters only; use two groups, or a "
                "Partition with a preset for each",
            )
    kinds = list(map(type, leaves))
    start = next((i for i, kind in enumerate(kinds) if kind in _RULES), len(kinds))
    optimizer = _OPTIMIZERS.get(tuple(kinds[start:]))
    if optimizer is None:
        written = " -> ".join(kind.__name__ for kind in kinds) or "nothing"
        raise _without(place, f"it is none of sgd, adam and adamw, but {written}")
    for leaf in leaves[:start]:
        # The sign is what torch calls maximize.
        if not isinstance(leaf, _BEFORE) and leaf != Scale(-1.0):
            raise _without(place, f"torch has no {leaf!r} before its rule")
    for leaf in leaves[start:]:
        for name, value in vars(leaf).items():
            if any(isinstance(part, Mapping) for part in parts_of(value)):
                reason = f"{name} differs by parameter; use a group for each value"
                raise _without(place, reason)
    for option in record.options:
        if option.scheduled:
            raise _without(
                place,
                f"{option.key} is a schedule, whose count torch keeps in an "
                "LRScheduler; put a number into the transform",
            )
    return Counterpart(optimizer, frozenset(option.key for option in record.options))


def _is_transparent(combinator: Transform) -> bool:
    """Whether a combinator does no more than its children to the groups they serve."""
    named = all(isinstance(label, str) for label in children_of(combinator))
    return (
        hasattr(combinator, "stands_for")
        or getattr(combinator, "role", None) is Role.GUARD
        or (routes(combinator) and named)
    )


def _without(place: str, reason: str) -> ValueError:
    return ValueError(f"{place} has no counterpart in torch.optim: {reason}")

"""The parameters of a group: their names, and which of them belong together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from functional_optim.facade._exposure import Choices, choices_of

if TYPE_CHECKING:
    from functional_optim._types import Transform

Members: TypeAlias = Sequence[tuple[str | None, Tensor]]
"""Parameters with their names, None where there is none."""

_WRAPPERS = {"module", "_orig_mod"}
"""What wrappers such as DistributedDataParallel and torch.compile put into names."""


def bare(name: str) -> str:
    """Return the name of a parameter without what wrappers of its model put there."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def by_choices(
    transform: Transform, members: Members, start: int
) -> dict[Choices, list[tuple[str, Tensor]]]:
    """Return parameters by the labels that they have; one entry if there are none.

    Args:
        transform: The transform.
        members: The parameters.
        start: How many there are before them; those without a name are numbered.
    """
    found: dict[Choices, list[tuple[str, Tensor]]] = {} if members else {(): []}
    for index, (given, param) in enumerate(members, start=start):
        name = str(index) if given is None else given
        found.setdefault(choices_of(transform, name, param), []).append((name, param))
    return found


def read_once(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a group whose parameters may be looked at again.

    Args:
        group: The group; its parameters may be a generator.
    """
    params = group.get("params")
    if isinstance(params, (Tensor, Collection)) or not isinstance(params, Iterable):
        return dict(group)
    return {**group, "params": list(params)}


def members_of(group: Mapping[str, Any], *, differentiable: bool) -> Members:
    """Return the parameters of a group, with names where given.

    Args:
        group: The group.
        differentiable: Whether results of operations are welcome.

    Raises:
        TypeError: something that is no tensor, or a set.
        ValueError: some have a name and some have none; a tensor that is no leaf.
    """
    if "params" not in group:
        msg = f"a group must have 'params', got the keys {sorted(group)}"
        raise ValueError(msg)
    params = group["params"]
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, (set, frozenset)):
        msg = (
            "params must be in an order that is always the same, got a set; pass a list"
        )
        raise TypeError(msg)
    names = group.get("param_names")
    members: list[tuple[str | None, Tensor]] = []
    for index, entry in enumerate(list(params)):
        name, param = entry if isinstance(entry, tuple) else (None, entry)
        if name is None and names is not None:
            name = names[index]
        if not isinstance(param, Tensor):
            msg = (
                f"params must be tensors, or (name, tensor) pairs as in "
                f"model.named_parameters(), got a {type(param).__name__} at position "
                f"{index}"
            )
            raise TypeError(msg)
        members.append((name, param))
    if len({name is None for name, _ in members}) > 1:
        msg = "some parameters have a name and some have none; give all of them one"
        raise ValueError(msg)
    for index, (name, param) in enumerate(members):
        if not (differentiable or param.is_leaf or param.retains_grad):
            msg = (
                f"can't optimize a non-leaf Tensor: parameter {name or index!r} is the "
                "result of an operation; pass param.detach().requires_grad_(), or "
                "differentiable=True"
            )
            raise ValueError(msg)
    return members


def named_members(
    group: Mapping[str, Any], place: str, known: Mapping[Tensor, str], count: int
) -> list[tuple[str, Tensor]]:
    """Return the parameters that stand in a group now, with their names.

    Args:
        group: The group.
        place: How to call it in an error.
        known: The names of the parameters that were there before.
        count: How many parameters stand in the groups before it.

    Raises:
        ValueError: a new parameter has no name where the others have one.
    """
    params = list(group["params"])
    given = group.get("param_names")
    if given is not None and len(given) == len(params):
        return list(zip(given, params, strict=True))
    members = []
    for index, param in enumerate(params):
        name = known.get(param)
        if name is None and given is not None:
            msg = (
                f"{place} has a new parameter at position {index}, and no name for it "
                "in param_names; add it with add_param_group"
            )
            raise ValueError(msg)
        members.append((str(count + index) if name is None else name, param))
    return members


def check_group_parameters(
    groups: Sequence[Members], known: Sequence[tuple[Tensor, str]] = ()
) -> None:
    """Refuse parameters that come twice, and names that do.

    Args:
        groups: The parameters of each new group.
        known: The parameters that there are, with their names.

    Raises:
        ValueError: naming the parameter.
    """
    seen = {id(param): name for param, name in known}
    names = {name for _, name in known}
    count = len(known)
    for members in groups:
        for name, param in members:
            own = str(count) if name is None else name
            count += 1
            if id(param) in seen:
                msg = (
                    "some parameters appear in more than one parameter group: "
                    f"parameter {own!r} comes twice, also as {seen[id(param)]!r}; "
                    "model.named_parameters() has tied parameters once"
                )
                raise ValueError(msg)
            if own in names:
                msg = (
                    f"two parameters have the name {own!r}; give each its own, such as "
                    'by named_parameters(prefix="encoder")'
                )
                raise ValueError(msg)
            seen[id(param)] = own
            names.add(own)

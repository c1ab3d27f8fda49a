"""What a constructor's `add_params` made: groups of parameters, or parameters alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from functional_optim.facade._members import read_once

Groups: TypeAlias = list[dict[str, Any]]

_REMEDY = "pass the parameters themselves: params=[model.get_parameter(name)]"


def listed(group: dict[str, Any]) -> Any:
    """Put the parameters of a group into a list, which can be read more than once.

    Returns:
        What the group has as `params` now.
    """
    params = read_once(group)["params"]
    group["params"] = params = [params] if isinstance(params, Tensor) else params
    return params


def as_groups(added: list[Any]) -> Groups:
    """Return groups whose parameters are lists; parameters alone are one group.

    Raises:
        TypeError: a group is no dict.
        ValueError: a group has no `params`.
    """
    if not (added and isinstance(added[0], Mapping)):
        return [{"params": added}]
    groups = []
    for index, group in enumerate(added):
        if not isinstance(group, Mapping):
            kind = type(group).__name__
            msg = f"param_group must be a dict, but got a {kind} as group {index}"
            raise TypeError(msg)
        if "params" not in group:
            msg = f"group {index} must have 'params', got the keys {sorted(group)}"
            raise ValueError(msg)
        groups.append(dict(group))
        listed(groups[-1])
    return groups


def check_groups(groups: Groups, names: Mapping[int, Sequence[str]]) -> None:
    """Refuse what is no parameter, and a parameter that comes twice.

    Args:
        groups: The groups, with lists of parameters or of `(name, parameter)` pairs.
        names: All names that a parameter has in the model, by `id`.

    Raises:
        TypeError: naming the place, what is there, and the remedy.
        ValueError: with all names of the parameter.
    """
    seen: dict[int, tuple[str, str]] = {}
    for index, group in enumerate(groups):
        place = f"params of group {index}"
        _check_ordered(place, group["params"])
        for position, entry in enumerate(group["params"]):
            name, param = _member(entry)
            if not isinstance(param, Tensor):
                raise TypeError(_no_parameter(place, position, entry, names))
            known = names.get(id(param), ())
            name = name or next(iter(known), f"{position} in {place}")
            if id(param) not in seen:
                seen[id(param)] = name, place
                continue
            first, there = seen[id(param)]
            called = list(dict.fromkeys([first, name, *known]))
            what = " and ".join(map(repr, called))
            if len(called) > 1:
                what += " are the same parameter, which"
            msg = (
                f"some parameters appear in more than one parameter group: {what} "
                f"would get into the optimizer twice, by {there} and by {place}; add "
                "it once, or let bypass_duplicate=True in paramwise_cfg keep the first"
            )
            raise ValueError(msg)


def with_names(groups: Groups, names: Mapping[int, str]) -> Groups:
    """Return groups with a name for each parameter: given, the model's, or a number."""
    found, count = [], 0
    taken = set(names.values())
    for group in groups:
        given = group.get("param_names") or [None] * len(group["params"])
        own: list[str] = []
        members = [_member(entry) for entry in group["params"]]
        for (paired, param), other in zip(members, given, strict=True):
            name = paired or other or names.get(id(param))
            if name is None:
                name = str(count)
                while name in taken:
                    name = f"_{name}"
            own.append(name)
            count += 1
        params = [param for _, param in members]
        found.append({**group, "params": params, "param_names": own})
    return found


def _member(entry: Any) -> tuple[str | None, Any]:
    """Return the name that comes with a parameter, and the parameter."""
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
        return entry
    return None, entry


def _check_ordered(place: str, params: Any) -> None:
    if isinstance(params, (set, frozenset)):
        msg = (
            "optimizer parameters need to be organized in ordered collections, but "
            f"{place} are a set; pass a list"
        )
        raise TypeError(msg)
    if isinstance(params, (str, bytes, Mapping)) or not isinstance(params, Iterable):
        msg = (
            f"optimizer can only optimize Tensors, but {place} are {_told(params)}; "
            f"{_REMEDY}"
        )
        raise TypeError(msg)


def _no_parameter(
    place: str, position: int, entry: Any, names: Mapping[int, Sequence[str]]
) -> str:
    told, remedy = _told(entry), _REMEDY
    if isinstance(entry, (list, tuple)):
        inside = [names.get(id(p), ("a parameter",))[0] for p in entry]
        told += f" of {', '.join(map(repr, inside))}"
        remedy = "put its parameters there one by one: params=[*inner]"
    return (
        f"optimizer can only optimize Tensors, but {place} have {told} at position "
        f"{position}; {remedy}"
    )


def _told(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"

"""The parameters of a group: their names, and which of them belong together."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from functional_optim.core._validation import check_parameters
from functional_optim.execution._tensor_memory import is_dense
from functional_optim.torch_optimizer._group_hyperparameters import Choices, choices_of
from functional_optim.torch_optimizer._sharding import check_no_dtensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform

Members: TypeAlias = Sequence[tuple[str | None, Tensor]]
"""Parameters with their names, None where there is none."""


_WRAPPERS = {"module", "_orig_mod"}
"""What wrappers such as DistributedDataParallel and torch.compile put into names."""


_UNKNOWN: Mapping[int, Sequence[str]] = MappingProxyType({})


_REMEDY = (
    "pass the parameters themselves, or (name, parameter) pairs as in "
    "model.named_parameters()"
)


def bare(name: str) -> str:
    """Return the name of a parameter without what wrappers of its model put there."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def by_choices(
    transform: Transform, members: Members, start: int
) -> dict[Choices, list[tuple[str, Tensor]]]:
    """Return parameters by the labels that they have; one entry if there are none."""
    found: dict[Choices, list[tuple[str, Tensor]]] = {} if members else {(): []}
    for index, (given, param) in enumerate(members, start=start):
        name = str(index) if given is None else given
        found.setdefault(choices_of(transform, name, param), []).append((name, param))
    return found


def read_once(group: Any, index: int | None = None) -> dict[str, Any]:
    """Return a copy of a group whose parameters may be looked at again."""
    if not isinstance(group, Mapping):
        where = "" if index is None else f" as group {index}"
        raise TypeError(
            f"param_group must be a dict, but got {_described(group)}{where}"
        )
    params = group.get("params")
    if isinstance(params, (Tensor, Collection)) or not isinstance(params, Iterable):
        return dict(group)
    return {**group, "params": list(params)}


def pairs_of(
    group: Mapping[str, Any],
    index: int | None = None,
    names: Mapping[int, Sequence[str]] = _UNKNOWN,
) -> Members:
    """Return the parameters of a group in pairs with their names, None without one."""
    if "params" not in group:
        what = "a group" if index is None else f"group {index}"
        raise ValueError(f"{what} must have 'params', got the keys {sorted(group)}")
    params = group["params"]
    if isinstance(params, Tensor):
        params = [params]
    place = "params" if index is None else f"params of group {index}"
    _check_ordered(place, params)
    given = group.get("param_names")
    members: list[tuple[str | None, Tensor]] = []
    for position, entry in enumerate(params):
        is_pair = isinstance(entry, tuple) and len(entry) == 2
        name, param = entry if is_pair and isinstance(entry[0], str) else (None, entry)
        if not isinstance(param, Tensor):
            raise TypeError(_no_parameter(place, position, param, names))
        if name is None and given is not None:
            name = given[position]
        members.append((name, param))
    return members


def _check_ordered(place: str, params: Any) -> None:
    if isinstance(params, (set, frozenset)):
        raise TypeError(
            "optimizer parameters need to be organized in ordered collections, but "
            f"{place} are a set; pass a list"
        )
    if isinstance(params, (str, bytes, Mapping)) or not isinstance(params, Iterable):
        raise TypeError(
            f"optimizer can only optimize Tensors, but {place} are "
            f"{_described(params)}; {_REMEDY}"
        )


def _no_parameter(
    place: str, position: int, entry: Any, names: Mapping[int, Sequence[str]]
) -> str:
    what, remedy = _described(entry), _REMEDY
    if isinstance(entry, (list, tuple)):
        inside = [repr(names[id(p)][0]) for p in entry if id(p) in names]
        what += f" of {', '.join(inside)}" if inside else ""
        remedy = "put its parameters there one by one: params=[*inner]"
    return (
        f"optimizer can only optimize Tensors, but {place} have {what} at position "
        f"{position}; {remedy}"
    )


def _described(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


def members_of(group: Mapping[str, Any]) -> Members:
    """Return the parameters of a group, with names for all of them or for none."""
    members = pairs_of(group)
    if len({name is None for name, _ in members}) > 1:
        raise ValueError(
            "some parameters have a name and some have none; give all of them one"
        )
    for index, (name, param) in enumerate(members):
        if not (param.is_leaf or param.retains_grad):
            raise ValueError(
                f"can't optimize a non-leaf Tensor: parameter {name or index!r} is the "
                "result of an operation; pass param.detach().requires_grad_(), or, for "
                "derivatives through a step, call transform.update and "
                "apply_updates(..., differentiable=True)"
            )
    return members


def named_members(
    group: Mapping[str, Any], place: str, known: Mapping[Tensor, str], count: int
) -> list[tuple[str, Tensor]]:
    """Return the parameters that stand in a group now, with their names."""
    params, given = list(group["params"]), group.get("param_names")
    if given is not None and len(given) != len(params):
        given = []
    taken = set(known.values())
    members = []
    for index, param in enumerate(params):
        name = known.get(param)
        if name is None and given is not None:
            name = next(iter(given[index : index + 1]), None)
            if name is None or name in taken:
                raise ValueError(
                    f"{place} has a new parameter at position {index}, and no name for "
                    "it in param_names; add it with add_param_group"
                )
        elif name is None:
            name = _free_number(count + index, taken)
        taken.add(name)
        members.append((name, param))
    return members


def numbered(members: Members, taken: Collection[str]) -> list[tuple[str, Tensor]]:
    """Return parameters with names; those that have none get the next free numbers."""
    names, found = set(taken), []
    for index, (given, param) in enumerate(members, start=len(names)):
        name = _free_number(index, names) if given is None else given
        names.add(name)
        found.append((name, param))
    return found


def _free_number(first: int, taken: Collection[str]) -> str:
    """Return the first number from one on that is no name yet."""
    return next(str(n) for n in itertools.count(first) if str(n) not in taken)


def check_group_parameters(
    groups: Sequence[Members], known: Sequence[tuple[Tensor, str]] = ()
) -> None:
    """Refuse parameters that come twice, and names that do."""
    check_no_duplicates(groups, known)
    names = {name for _, name in known}
    everyone = (name for members in groups for name, _ in members)
    for count, name in enumerate(everyone, start=len(known)):
        own = str(count) if name is None else name
        if own in names:
            raise ValueError(
                f"two parameters have the name {own!r}; give each its own, such as "
                'by named_parameters(prefix="encoder")'
            )
        names.add(own)


def check_no_duplicates(
    groups: Sequence[Members],
    known: Sequence[tuple[Tensor, str]] = (),
    names: Mapping[int, Sequence[str]] = _UNKNOWN,
    remedy: str = "model.named_parameters() has tied parameters once",
) -> None:
    """Refuse parameters that come twice."""
    seen: dict[int, tuple[str, int | None]] = {id(p): (name, None) for p, name in known}
    count = len(known)
    for index, members in enumerate(groups):
        for given, param in members:
            called = names.get(id(param), ())
            own = next(iter(called), str(count)) if given is None else given
            count += 1
            if id(param) not in seen:
                seen[id(param)] = own, index
                continue
            first, there = seen[id(param)]
            others = [repr(n) for n in dict.fromkeys([first, *called]) if n != own]
            msg = (
                "some parameters appear in more than one parameter group: parameter "
                f"{own!r} comes twice"
            )
            if others:
                msg += f", also as {' and '.join(others)}"
            if there is not None and there != index:
                msg += f", in groups {there} and {index}"
            msg += f"; {remedy}"
            raise ValueError(msg)


def check_apart(params: TensorMap) -> None:
    """Refuse parameters that lie in the same memory."""
    check_parameters(params)
    check_no_dtensor(params)
    near: list[tuple[int, str]] = []
    for start, end, name in sorted(_spans(params)):
        near = [(its_end, other) for its_end, other in near if start < its_end]
        for _, other in near:
            if _meet(params, other, name):
                raise ValueError(_together(other, name))
        near.append((end, name))


def _together(first: str, second: str) -> str:
    return (
        f"parameters {first!r} and {second!r} lie in the same memory: an update of one "
        "would change the other; pass one of them, or tie the modules (a.weight = "
        "b.weight) instead of the memory"
    )


def _spans(params: TensorMap) -> Iterator[tuple[int, int, str]]:
    """Yield where parameters begin and end; refuse those that overlap themselves."""
    for name, param in params.items():
        if param.numel() == 0 or param.is_meta:
            continue
        dense = is_dense(param)
        if not dense and _places(param).unique().numel() < param.numel():
            raise ValueError(
                f"parameter {name!r} overlaps itself: several elements lie in one "
                "place in memory (expand); pass param.clone()"
            )
        sides = zip(param.shape, param.stride(), strict=True)
        length = 1 + sum((size - 1) * stride for size, stride in sides)
        start = param.data_ptr()
        yield start, start + length * param.itemsize, name


def _meet(params: TensorMap, first: str, second: str) -> bool:
    """Whether two parameters whose spans overlap share an element."""
    one, two = params[first], params[second]
    if is_dense(one) and is_dense(two):
        return True
    if one.dtype != two.dtype:
        return True  # Nobody means it.
    places = [_places(p) + p.data_ptr() // p.itemsize for p in (one, two)]
    return bool(torch.isin(*places).any())


def _places(tensor: Tensor) -> Tensor:
    """Return where the elements lie, counted in elements from the first."""
    found = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = (found[:, None] + stride * torch.arange(size)).reshape(-1)
    return found

"""What a constructor's `add_params` made: groups of parameters, or parameters alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from functional_optim.torch_optimizer._params import pairs_of, read_once


def as_groups(added: list[Any]) -> list[dict[str, Any]]:
    """Return groups that may be read again; parameters alone are one group.

    Raises:
        TypeError: a group is no dict.
    """
    if not (added and isinstance(added[0], Mapping)):
        return [{"params": added}]
    return [read_once(group, index) for index, group in enumerate(added)]


def with_names(
    groups: list[dict[str, Any]], names: Mapping[int, str]
) -> list[dict[str, Any]]:
    """Return groups with a name for each parameter: given, the model's, or a number."""
    found, count = [], 0
    taken = set(names.values())
    for index, group in enumerate(groups):
        members = pairs_of(group, index)
        own: list[str] = []
        for given, param in members:
            name = given or names.get(id(param))
            if name is None:
                name = str(count)
                while name in taken:
                    name = f"_{name}"
            own.append(name)
            count += 1
        params = [param for _, param in members]
        found.append({**group, "params": params, "param_names": own})
    return found

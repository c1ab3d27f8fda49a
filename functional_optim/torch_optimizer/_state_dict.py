"""State dicts: what must fit before anything is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from functional_optim._messages import shown
from functional_optim.torch_optimizer._group_keys import OWN_KEYS, lacking
from functional_optim.torch_optimizer._params import bare

if TYPE_CHECKING:
    from functional_optim.torch_optimizer._param_groups import Groups


def saved_groups(data: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of a state dict if there are as many, of as many parameters.

    Args:
        data: The state dict.
        groups: The groups of the optimizer.

    Raises:
        ValueError: no state dict, or one of other groups.
    """
    if not isinstance(data, Mapping) or not {"state", "param_groups"} <= set(data):
        got = shown(data) if isinstance(data, Mapping) else repr(data)
        msg = f"a state dict has 'state' and 'param_groups', got {got}"
        raise ValueError(msg)
    saved: list[dict[str, Any]] = list(data["param_groups"])
    if len(saved) != len(groups):
        msg = (
            f"the state dict has {len(saved)} groups, the optimizer {len(groups)}; "
            "build it with the groups and the transform that it was saved with"
        )
        raise ValueError(msg)
    for index, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        place = f"param_groups[{index}]"
        if "params" not in theirs:
            raise ValueError(lacking(f"{place} of the state dict", ["params"]))
        if len(theirs["params"]) != len(ours["params"]):
            msg = (
                f"{place} has {len(theirs['params'])} parameters in the state dict, "
                f"{len(ours['params'])} here; the state dict is of another model or "
                "another layout of groups"
            )
            raise ValueError(msg)
    return saved


def checked_groups(
    data: Any,
    groups: list[dict[str, Any]],
    exposed: Groups,
) -> list[dict[str, Any]]:
    """Return the groups of a state dict if they fit those of the optimizer.

    Args:
        data: The state dict.
        groups: The groups of the optimizer.
        exposed: What they show.

    Raises:
        ValueError: another number of groups or parameters, other names or structural
            options, a missing key, a value that is not legal.
    """
    saved = saved_groups(data, groups)
    for index, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        place = f"param_groups[{index}]"
        _check_names(place, theirs.get("param_names"), ours.get("param_names"))
        wanted = [*exposed.keys[index], *exposed.structure[index]]
        missing = [key for key in wanted if key not in theirs]
        if missing:
            msg = (
                f"{place} lacks {shown(missing)} in the state dict; it is of another "
                f"transform. For one of torch.optim use from_torch_state_dict"
            )
            raise ValueError(msg)
        for key, value in exposed.structure[index].items():
            if theirs[key] != value:
                msg = (
                    f"{place} has {key}={theirs[key]} in the state dict, {value} here; "
                    "build the optimizer with the transform that it was saved with"
                )
                raise ValueError(msg)
        exposed.check_saved(index, theirs)
    return saved


def loaded_options(
    saved: Mapping[str, Any], exposed: Groups, index: int
) -> dict[str, Any]:
    """Return what a group takes over from a saved one; nothing is shared.

    Names are among it where the group has none, as with torch.

    Args:
        saved: The saved group, checked.
        exposed: What the groups show.
        index: Which group it is.
    """
    fixed = exposed.fixed_keys(index) | OWN_KEYS - {"param_names"}
    return {k: copy.deepcopy(v) for k, v in saved.items() if k not in fixed}


def _check_names(place: str, theirs: Any, ours: Any) -> None:
    if theirs is None or ours is None:
        return
    for a, b in zip(theirs, ours, strict=True):
        if bare(a) != bare(b):
            msg = (
                f"{place} has the parameter {a!r} in the state dict where {b!r} stands "
                "here; the state dict is of another model, or of parameters in another "
                "order"
            )
            raise ValueError(msg)

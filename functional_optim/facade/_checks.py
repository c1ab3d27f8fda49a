"""What an optimizer refuses to take, by name and with the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from functional_optim._structure import check_parameters, check_updates
from functional_optim.execution._memory import is_dense

if TYPE_CHECKING:
    from functional_optim._types import TensorMap

Members: TypeAlias = "list[tuple[str | None, Tensor]]"
"""Parameters with their names, None where there is none."""


def named_members(group: Mapping[str, Any], differentiable: bool) -> Members:  # noqa: FBT001
    """Return the parameters of a group, with names where given.

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
    members: Members = []
    for index, entry in enumerate(list(params)):
        name, param = entry if isinstance(entry, tuple) else (None, entry)
        if name is None and names is not None:
            name = names[index]
        if not isinstance(param, Tensor):
            msg = f"params must be tensors, got {param!r} at position {index}"
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
                    f"parameter {own!r} comes twice, also as {seen[id(param)]!r}; "
                    "model.named_parameters() has tied parameters once"
                )
                raise ValueError(msg)
            if own in names:
                msg = f"two parameters have the name {own!r}; give each its own"
                raise ValueError(msg)
            seen[id(param)] = own
            names.add(own)


def check_apart(params: TensorMap) -> None:
    """Refuse parameters that lie in the same memory.

    Raises:
        ValueError: naming both.
    """
    check_parameters(params)
    spans = sorted(_spans(params))
    for (_, end, first), (start, _, second) in zip(spans, spans[1:], strict=False):
        if start < end:
            msg = (
                f"parameters {first!r} and {second!r} lie in the same memory: an update "
                "of one would change the other; pass one of them, or tie the modules "
                "(a.weight = b.weight) instead of the memory"
            )
            raise ValueError(msg)


def _spans(params: TensorMap) -> Iterable[tuple[int, int, str]]:
    for name, param in params.items():
        if param.numel() == 0 or param.is_meta:
            continue
        if torch._debug_has_internal_overlap(param) == 1:
            msg = (
                f"parameter {name!r} overlaps itself: several elements lie in one place "
                "in memory (expand); pass param.clone()"
            )
            raise ValueError(msg)
        if is_dense(param):
            start = param.data_ptr()
            yield start, start + param.numel() * param.itemsize, name


def check_gradient(name: str, grad: Tensor) -> None:
    """Refuse a gradient that is not dense, naming the parameter.

    Raises:
        TypeError: always for sparse gradients.
    """
    check_updates({name: grad}, {name: torch.empty(grad.shape, device=grad.device)})

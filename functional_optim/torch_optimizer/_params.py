"""Read and validate the parameters of groups: names, duplicates, shared memory."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._context import Context
from functional_optim.core._transform import Scope, Transform
from functional_optim.core._validation import check_parameters
from functional_optim.execution._tensor_memory import is_dense
from functional_optim.torch_optimizer._group_keys import Labels, labels_of

NamedParams: TypeAlias = list[tuple[str, Tensor]]

GivenParams: TypeAlias = Sequence[tuple[str | None, Tensor]]
"""Parameters with the names that a user gave them, None where there is none."""

_WRAPPERS = {"module", "_orig_mod"}
"""Parts that DistributedDataParallel, torch.compile and the like put into names."""

_NONE: Mapping[Any, Any] = MappingProxyType({})

_REMEDY = (
    "pass the parameters themselves, or (name, parameter) pairs as in "
    "model.named_parameters()"
)


def strip_wrapper_prefix(name: str) -> str:
    """Return the name of a parameter without what wrappers of its model add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def split_by_labels(
    transform: Transform, params: Iterable[tuple[str, Tensor]]
) -> dict[Labels, NamedParams]:
    """Return parameters by their labels; one entry without labels if there are none."""
    split: dict[Labels, NamedParams] = {}
    for name, param in params:
        split.setdefault(labels_of(transform, name, param), []).append((name, param))
    return split or {(): []}


def materialize_params(group: Any, index: int | None = None) -> dict[str, Any]:
    """Return a copy of a group with parameters that can be iterated over again."""
    if not isinstance(group, Mapping):
        where = "" if index is None else f" as group {index}"
        raise TypeError(f"param_group must be a dict, but got {_kind_of(group)}{where}")
    params = group.get("params")
    if isinstance(params, (Tensor, Collection)) or not isinstance(params, Iterable):
        return dict(group)
    return {**group, "params": list(params)}


def pairs_of(
    group: Mapping[str, Any],
    index: int | None = None,
    names: Mapping[int, Sequence[str]] = _NONE,
) -> GivenParams:
    """Return the parameters of a group in pairs with their names, None without one."""
    what = "a group" if index is None else f"group {index}"
    if "params" not in group:
        raise ValueError(f"{what} must have 'params', got the keys {sorted(group)}")
    params = group["params"]
    if isinstance(params, Tensor):
        params = [params]
    place = "params" if index is None else f"params of {what}"
    if isinstance(params, (set, frozenset)):
        raise TypeError(
            "optimizer parameters need to be organized in ordered collections, but "
            f"{place} are a set; pass a list"
        )
    if isinstance(params, (str, bytes, Mapping)) or not isinstance(params, Iterable):
        raise TypeError(
            f"optimizer can only optimize Tensors, but {place} are "
            f"{_kind_of(params)}; {_REMEDY}"
        )
    members: list[tuple[str | None, Tensor]] = []
    for position, entry in enumerate(params):
        is_pair = isinstance(entry, tuple) and len(entry) == 2
        name, param = entry if is_pair and isinstance(entry[0], str) else (None, entry)
        if not isinstance(param, Tensor):
            what, remedy = _kind_of(param), _REMEDY
            if isinstance(param, (list, tuple)):
                inside = [repr(names[id(p)][0]) for p in param if id(p) in names]
                what += f" of {', '.join(inside)}" if inside else ""
                remedy = "put its parameters there one by one: params=[*inner]"
            raise TypeError(
                f"optimizer can only optimize Tensors, but {place} have {what} at "
                f"position {position}; {remedy}"
            )
        members.append((name, param))
    given = group.get("param_names")
    if given is None:
        return members
    if len(given) != len(members):
        raise ValueError(
            f"{what} has {len(members)} parameters and {len(given)} param_names; give "
            "each parameter a name"
        )
    pairs = zip(members, given, strict=True)
    return [(own if name is None else name, param) for (name, param), own in pairs]


def _kind_of(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


def given_params(group: Mapping[str, Any]) -> GivenParams:
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


def named_params(members: GivenParams, taken: Collection[str]) -> NamedParams:
    """Return parameters with names; those without one get the next free numbers."""
    names, named = set(taken), []
    for index, (given, param) in enumerate(members, start=len(names)):
        name = _free_number(index, names) if given is None else given
        names.add(name)
        named.append((name, param))
    return named


def renamed_params(
    group: Mapping[str, Any], place: str, known: Mapping[Tensor, str], count: int
) -> NamedParams:
    """Return the parameters that a group has now; new ones are named by param_names."""
    params = list(group["params"])
    given: Any = group.get("param_names")
    taken = set(known.values())
    members = []
    for index, param in enumerate(params):
        name = known.get(param)
        if name is None and given is None:
            name = _free_number(count + index, taken)
        elif name is None:
            name = given[index] if len(given) == len(params) else None
            if name is None or name in taken:
                raise ValueError(
                    f"{place} has a new parameter at position {index}, and no name for "
                    "it in param_names; add it with add_param_group"
                )
        taken.add(name)
        members.append((name, param))
    return members


def _free_number(first: int, taken: Collection[str]) -> str:
    return next(str(n) for n in itertools.count(first) if str(n) not in taken)


def check_distinct(
    groups: Sequence[NamedParams], known: Mapping[Tensor, str] = _NONE
) -> None:
    """Refuse parameters that come twice, and names that do."""
    check_no_duplicates(groups, known)
    names = set(known.values())
    for name, _ in itertools.chain.from_iterable(groups):
        if name in names:
            raise ValueError(
                f"two parameters have the name {name!r}; give each its own, such as "
                'by named_parameters(prefix="encoder")'
            )
        names.add(name)


def check_no_duplicates(
    groups: Sequence[GivenParams],
    known: Mapping[Tensor, str] = _NONE,
    names: Mapping[int, Sequence[str]] = _NONE,
    remedy: str = "model.named_parameters() has tied parameters once",
) -> None:
    """Refuse parameters that come twice."""
    seen: dict[int, tuple[str, int | None]] = {
        id(p): (n, None) for p, n in known.items()
    }
    for index, members in enumerate(groups):
        for given, param in members:
            called = names.get(id(param), ())
            own = next(iter(called), str(len(seen))) if given is None else given
            if id(param) not in seen:
                seen[id(param)] = own, index
                continue
            first, there = seen[id(param)]
            others = [repr(n) for n in dict.fromkeys([first, *called]) if n != own]
            also = f", also as {' and '.join(others)}" if others else ""
            if there is not None and there != index:
                also += f", in groups {there} and {index}"
            raise ValueError(
                "some parameters appear in more than one parameter group: parameter "
                f"{own!r} comes twice{also}; {remedy}"
            )


def check_memory(params: TensorMap) -> None:
    """Refuse parameters that share memory, or that are not updated in place."""
    check_parameters(params)
    for name, param in params.items():
        if hasattr(param, "_local_tensor") and hasattr(param, "placements"):
            raise ValueError(
                f"parameter {name!r} is a DTensor ({param.placements}), and in place "
                "only plain tensors are updated; use the pure way, updates, state = "
                "transform.update(grads, state, parameters(model)) and "
                "load_parameters(model, apply_updates(...)), which runs on DTensors, "
                "or an optimizer of torch.optim"
            )
    near: list[tuple[int, str]] = []
    for start, end, name in sorted(_spans(params)):
        near = [(its_end, other) for its_end, other in near if start < its_end]
        for _, other in near:
            if _share_elements(params[other], params[name]):
                raise ValueError(
                    f"parameters {other!r} and {name!r} lie in the same memory: an "
                    "update of one would change the other; pass one of them, or tie "
                    "the modules (a.weight = b.weight) instead of the memory"
                )
        near.append((end, name))


def _spans(params: TensorMap) -> Iterator[tuple[int, int, str]]:
    """Yield the first and last addresses of parameters; refuse overlapping elements."""
    for name, param in params.items():
        if param.numel() == 0 or param.is_meta:
            continue
        if not is_dense(param) and _offsets(param).unique().numel() < param.numel():
            raise ValueError(
                f"parameter {name!r} overlaps itself: several elements lie in one "
                "place in memory (expand); pass param.clone()"
            )
        sides = zip(param.shape, param.stride(), strict=True)
        length = 1 + sum((size - 1) * stride for size, stride in sides)
        start = param.data_ptr()
        yield start, start + length * param.itemsize, name


def _share_elements(one: Tensor, two: Tensor) -> bool:
    """Whether two parameters with overlapping spans share an element."""
    if one.dtype != two.dtype or (is_dense(one) and is_dense(two)):
        return True
    offsets = [_offsets(p) + p.data_ptr() // p.itemsize for p in (one, two)]
    return bool(torch.isin(*offsets).any())


def _offsets(tensor: Tensor) -> Tensor:
    """Return the offsets of the elements from the first one."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + stride * torch.arange(size)).reshape(-1)
    return offsets


_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_TOTAL = (
    "what looks at all gradients (context.reduce: ClipByGlobalNorm, SkipNonfinite, "
    "Observe, DynamicLossScale) would get another number in each process"
)


class ShardCheck:
    """Checks of transforms where this process has a part of the parameters."""

    def __init__(self, names: Mapping[Tensor, str], transform: Transform) -> None:
        self._first = next(iter(names.values()), "")
        self._cut = _cut_parameter(names)
        if self._cut is not None and transform.scope is not Scope.ELEMENTWISE:
            raise ValueError(
                f"{transform!r} looks at whole tensors ({transform.scope}), and of "
                f"{self._cut!r} only a piece is here: FullyShardedDataParallel has cut "
                "it; use elementwise transforms, or fully_shard and the pure way"
            )

    def check_totals(self) -> None:
        """Refuse totals over parameters that are cut, or in other processes, too."""
        if self._cut is not None:
            self._refuse()
        if _in_zero():
            raise ValueError(
                "ZeroRedundancyOptimizer gives a part of the parameters to each "
                f"process, {self._first!r} and others to this one: {_TOTAL}; leave it "
                "out of the transform, and clip before the step by torch.nn.utils."
                "clip_grad_norm_, or by OptimWrapper(zero, clip_grad=...)"
            )

    def context(self) -> Context:
        """Return a context that refuses totals over a parameter that FSDP1 has cut."""
        return Context(reducer=None if self._cut is None else self._refuse)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"FullyShardedDataParallel has cut {self._cut!r}, and only a piece of its "
            f"gradient is here: {_TOTAL}; leave it out of the transform, and clip "
            "before the step by the model's own clip_grad_norm_"
        )


def _cut_parameter(names: Mapping[Tensor, str]) -> str | None:
    """Return a parameter that FSDP1 has cut, None if all are whole."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several or torch.distributed.get_world_size() == 1:
        return None
    views = []
    param: Any
    for param, name in names.items():
        if getattr(param, "_is_flat_param", False):
            if param._sharded_size != param._unpadded_unsharded_size:
                return name
        elif getattr(param, "_fsdp_flattened", False):
            views.append((param.ndim, name))
    # With use_orig_params: pieces have one dimension, whole ones their own shapes.
    return views[0][1] if views and {ndim for ndim, _ in views} == {1} else None


def _in_zero() -> bool:
    """Whether a ZeroRedundancyOptimizer of several processes makes this step.

    It leaves no trace in the optimizer that it holds, so its callers are looked at.
    """
    module: Any = sys.modules.get(_ZERO)
    frame = sys._getframe(1) if module else None
    while frame is not None:
        if frame.f_code.co_filename == module.__file__:
            owner = frame.f_locals.get("self")
            if isinstance(owner, module.ZeroRedundancyOptimizer):
                return bool(owner.world_size > 1)
        frame = frame.f_back
    return False

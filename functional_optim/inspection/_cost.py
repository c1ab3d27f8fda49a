"""What an update costs: bytes of state, passes over memory, bytes moved.

Found out on the meta device, where tensors have shapes and no memory: a model of any
size costs nothing to ask about.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import copied
from functional_optim.core._context import Context, ReduceOp, local_total
from functional_optim.core._traversal import Stage, walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from functional_optim.core._transform import TensorMap, Transform

Path: TypeAlias = tuple[int | str, ...]

_SMALL = 2**28
"""Bytes of parameters up to which an update may be tried out as they are."""


class Pass(NamedTuple):
    """One pass over memory, of an update in place.

    Attributes:
        path: Of the transform that asks for a total; None for the update itself.
        reads: Bytes.
        writes: Bytes.
    """

    path: Path | None
    reads: int
    writes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What an update costs.

    Attributes:
        stages: The transform and all that it is made of, in the order they run.
        own: Bytes of the state of each stage, without those of its parts.
        passes: The passes over memory; None if they could not be found out.
        remarks: What could not be found out as usual, and why.
    """

    stages: list[Stage]
    own: list[int]
    passes: list[Pass] | None
    remarks: list[str]


def size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors.

    Example:
        >>> size([torch.ones(3), torch.ones((), dtype=torch.float64)])
        20
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cost(pipeline: Transform, params: TensorMap) -> Cost:
    """Find out what an update costs, without memory for it.

    Raises:
        ValueError: the transform does not fit the parameters.
    """
    remarks: list[str] = []
    on_meta = {name: torch.empty_like(p, device="meta") for name, p in params.items()}
    try:
        given, state = on_meta, pipeline.init(on_meta)
    except ValueError:
        raise
    except Exception as error:  # A user's transform may do anything here.
        remarks.append(f"init was run on the parameters as they are, {_said(error)}")
        given, state = params, pipeline.init(params)
    stages = list(walk(pipeline, state, params))
    calls = _calls(pipeline, given, params, state, remarks)
    return Cost(
        stages=stages,
        own=[_own_size(stage) for stage in stages],
        passes=None if calls is None else _passes(calls, stages, params),
        remarks=remarks,
    )


# -- bytes -------------------------------------------------------------------------


def _own(state: Any, inner: list[Any]) -> Iterator[TensorMap | Tensor]:
    """Yield the maps and tensors of a state that are in none of the inner states."""
    if any(state is part for part in inner):
        return
    if isinstance(state, (dict, Tensor)):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from _own(part, inner)


def _own_fields(stage: Stage) -> list[TensorMap | Tensor]:
    return list(_own(stage.state, [part.state for part in stage.parts]))


def _own_size(stage: Stage) -> int:
    distinct: dict[int, Tensor] = {}  # Names may share a count.
    for field in _own_fields(stage):
        tensors = field.values() if isinstance(field, dict) else [field]
        distinct |= {id(tensor): tensor for tensor in tensors}
    return size(distinct.values())


def _elementwise_size(stage: Stage, names: TensorMap) -> int:
    """Return the bytes of the state in the shape of the parameters, for some names."""
    total = 0
    for field in _own_fields(stage):
        if isinstance(field, dict) and all(
            name in stage.params and x.shape == stage.params[name].shape
            for name, x in field.items()
        ):
            total += size(x for name, x in field.items() if name in names)
    return total


# -- passes ------------------------------------------------------------------------


def _calls(
    pipeline: Transform,
    given: TensorMap,
    params: TensorMap,
    state: Any,
    remarks: list[str],
) -> list[Path] | None:
    """Return the paths of the calls of `reduce` in one update that emits."""
    calls, error = _tried(pipeline, given, lambda: state)
    if calls is None:  # Totals on the host let through who looks at them.
        calls, _ = _tried(pipeline, given, lambda: state, totals_on="cpu")
    if calls is None and given is not params and size(params.values()) <= _SMALL:
        own = copied(params)  # A user's transform may write into them.
        calls, again = _tried(pipeline, own, lambda: pipeline.init(own))
        if calls is not None:
            remarks.append(
                f"update was run on the parameters as they are, {_said(error)}"
            )
        error = again or error
    if calls is None:
        remarks.append(
            f"passes are unknown, update cannot be tried out: {_said(error)}"
        )
    elif calls and calls[-1] is None:
        remarks.append("the first update is held: what comes behind is not counted")
    return None if calls is None else [path for path in calls if path is not None]


def _tried(
    pipeline: Transform,
    params: TensorMap,
    make_state: Callable[[], Any],
    totals_on: str | None = None,
) -> tuple[list[Path | None] | None, Exception | None]:
    """Run one update; return the paths of its calls, None at the end if it held."""
    calls: list[Path | None] = []

    def reducer(path: Path, partial: Tensor, op: ReduceOp) -> Tensor:
        calls.append(path)
        total = local_total(partial, op)
        return torch.ones_like(total, device=totals_on) if totals_on else total

    updates = {name: torch.zeros_like(p) for name, p in params.items()}
    context = Context(last=True, reducer=reducer)  # last closes a window.
    try:
        emitted, _ = pipeline.update(updates, make_state(), params, context=context)
    except Exception as error:  # A user's transform may do anything here.
        return None, error
    if params and not emitted:
        calls.append(None)
    return calls, None


def _passes(calls: list[Path], stages: list[Stage], params: TensorMap) -> list[Pass]:
    found = []
    for path in calls:
        # A user's combinator may go deeper than the parts it tells.
        at = max(
            (stage for stage in stages if stage.path == path[: len(stage.path)]),
            key=lambda stage: len(stage.path),
        )
        reads = size(at.params.values()) + sum(
            _elementwise_size(stage, at.params)
            for stage in stages
            if _runs_before(stage.path, path)
        )
        found.append(Pass(path, reads, 0))
    state = sum(_elementwise_size(stage, params) for stage in stages)
    own = size(params.values())
    return [*found, Pass(None, 2 * own + state, own + state)]


def _runs_before(path: Path, other: Path) -> bool:
    """Whether what one stage returns reaches another: they stand in one chain."""
    for a, b in zip(path, other, strict=False):
        if a != b:
            # Members of a chain have numbers; labels stand side by side.
            return isinstance(a, int) and isinstance(b, int) and a < b
    return len(path) < len(other)


def _said(error: Exception | None) -> str:
    text = str(error).strip().split("\n", maxsplit=1)[0]
    return f"{type(error).__name__}: {text[:120]}"

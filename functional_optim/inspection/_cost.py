"""What an update costs: bytes of state, passes over memory, bytes moved.

Found out on the meta device, where tensors have shapes and no memory: a model of any
size costs nothing to ask about.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from functional_optim.algebra._buffers import Donated, Workspace
from functional_optim.algebra._tensor_map import copied
from functional_optim.core._context import Context, ReduceOp, local_total
from functional_optim.core._traversal import Stage, walk
from functional_optim.execution._memoized import num_remembered
from functional_optim.execution._reductions import Recorded
from functional_optim.execution._state_tree import nodes_of, rebuilt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._transform import Transform
    from functional_optim.execution._bucketing import Bucket
    from functional_optim.execution._reductions import Call
    from functional_optim.execution._state_tree import Field, Node
    from functional_optim.execution._units import Unit

Path: TypeAlias = tuple[int | str, ...]


_SMALL = 2**28
"""Bytes of parameters up to which an update may be tried out as they are."""


class Pass(NamedTuple):
    """One pass over memory, of an update in place."""

    path: Path | None
    reads: int
    writes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What an update costs."""

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
    """Find out what an update costs, without memory for it."""
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


_TRIED_BYTES = 32 * 2**20
"""Parameters of a unit up to this size are tried in memory, others without any."""


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live."""

    def __init__(self, given: Any) -> None:
        TorchDispatchMode.__init__(self)
        self.most = 0
        leaves = [x for x in _pytree.tree_leaves(given) if isinstance(x, Tensor)]
        self._given = [StorageWeakRef(x.untyped_storage()) for x in leaves]
        self._known = {weak.cdata for weak in self._given}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for cdata in [c for c, (weak, _) in self._live.items() if weak.expired()]:
            del self._live[cdata]
        for made in _pytree.tree_leaves(result):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                weak = StorageWeakRef(storage)
                if weak.cdata not in self._known:
                    self._live.setdefault(weak.cdata, (weak, storage.nbytes()))
        self.most = max(self.most, sum(count for _, count in self._live.values()))
        return result


def temporary_bytes(bucket: Bucket, fields: list[Field]) -> int | None:
    """Return the bytes that an update of a unit takes for a while."""
    unit = max(bucket.units, key=lambda unit: size(unit.params.values()))
    device = "meta" if size(unit.params.values()) > _TRIED_BYTES else None
    params = {n: torch.zeros_like(p, device=device) for n, p in unit.params.items()}
    grads = {name: torch.zeros_like(param) for name, param in params.items()}
    state = _zeros(unit, fields, device)
    peak = Peak([params, grads, [n for n in nodes_of(state) if not _is_static(n)]])
    calls: list[Call] = []
    context = Context(last=True, reducer=Recorded(calls))  # Closes a window.
    try:
        with Workspace(), peak:
            bucket.transform.update(grads, state, params, context=context)
    except Exception:  # A user's transform may do anything here.
        return None
    if not calls:
        return peak.most
    # What looks at whole tensors is remembered, for all units, from pass to pass.
    everything = sum(size(unit.params.values()) for unit in bucket.units)
    return peak.most + num_remembered(bucket.transform) * everything


def _is_static(node: Node) -> bool:
    return not isinstance(node, (dict, Tensor))


def _zeros(unit: Unit, fields: list[Field], device: str | None) -> Any:
    """Return a state of zeros, to be written over where that of the unit would be."""
    nodes: list[Node] = []
    for node, field in zip(nodes_of(unit.state), fields, strict=True):
        if isinstance(node, dict):
            zeros = {n: torch.zeros_like(x, device=device) for n, x in node.items()}
            nodes.append(Donated(zeros) if field.donated else zeros)
        elif isinstance(node, Tensor):
            nodes.append(torch.zeros_like(node, device=device))
        else:
            nodes.append(node)
    return rebuilt(unit.state, iter(nodes))

"""Trace an update into two graphs of tensor operations.

Operations on single numbers alone, step counts or totals, are the *prologue*: it runs
once a step. The rest, the *kernel*, runs on every unit, with the numbers as inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from functional_optim.algebra._scalars import memoize_scalars

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MOST = 64
"""Elements that a tensor of single numbers has at most."""

_EXAMPLE = 1003
"""Elements of the units that a trace is made with: a number that nothing else has."""


class NoCodeError(Exception):
    """An update cannot be compiled; it can run without."""


class TensorSpec(NamedTuple):
    """Dtype, device and shape of an input; None is the shape of a unit."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...] | None


class Graph(NamedTuple):
    """Tensor operations, and what their inputs are like."""

    module: fx.GraphModule
    inputs: list[TensorSpec]


class SplitGraph(NamedTuple):
    """A traced function: the prologue on single numbers, the kernel on units."""

    prologue: Graph
    kernel: Graph
    long: list[int]
    """Which of the long inputs the kernel takes."""
    short: list[int]
    """Which of the short inputs the prologue takes."""
    num_crossing: int
    """How many of the prologue's results the kernel takes."""
    is_late: list[bool]
    """Whether a result is one of the kernel's."""


def traced(
    function: Callable[..., Sequence[Tensor]],
    long: Sequence[Tensor],
    short: Sequence[Tensor],
) -> SplitGraph:
    """Trace a function that may write into its inputs."""
    if any(x.numel() != 1 for x in short):
        raise NoCodeError(
            "a part of the state that is neither one number nor like the parameters"
        )

    def watched(*tensors: Tensor) -> Sequence[Tensor]:
        with _Refusing():
            return function(*tensors)

    # Tensors memoized here are traced ones: nothing else can use them.
    with memoize_scalars():
        graph = make_fx(
            functionalize(watched),
            tracing_mode="symbolic",
            _error_on_data_dependent_ops=True,
        )(*[example_of(x) for x in long], *short)
    _check_written(graph)
    return _split(graph, len(long))


class _Refusing(TorchDispatchMode):
    """Refuses operations whose result would be a constant of the code."""

    def __init__(self) -> None:  # torch's has no types.
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, unless it reads a value or draws random numbers."""
        if func is torch.ops.aten._local_scalar_dense.default:
            raise NoCodeError("it reads the value of a tensor on the host")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NoCodeError(f"it draws random numbers ({func})")
        return func(*args, **(kwargs or {}))


def _check_written(graph: fx.GraphModule) -> None:
    """Refuse to write what another input was: compilers reorder such copies."""
    writes = [node.args for node in graph.graph.nodes if node.target is _COPY]
    homes = {home for home, *_ in writes}
    for home, written, *_ in writes:
        value = written
        while value.op == "call_function" and value.target in _SAME:
            # The functional copy(home, value) is the value.
            value = value.args[1 if value.target is _COPIED else 0]
        if value in homes and value is not home:
            raise NoCodeError("it keeps what another tensor was, unchanged")


_COPY = torch.ops.aten.copy_.default
_COPIED = torch.ops.aten.copy.default
_SAME = {
    _COPIED,
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten._to_copy.default,
}


def example_of(long: Tensor, seed: int = 0) -> Tensor:
    """Return a tensor of a fixed length, with the dtype and device of another."""
    numbers = torch.arange(_EXAMPLE, dtype=torch.float64) * (seed + 1) % 97 + 1.0
    return (numbers / 50.0).to(device=long.device, dtype=long.dtype)


def _is_small(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_small, value))
    if not isinstance(value, Tensor):
        return False
    return all(isinstance(size, int) for size in value.shape) and (
        value.numel() <= _MOST
    )


def _split(module: fx.GraphModule, count: int) -> SplitGraph:
    """Split a graph by its inputs: the first `count` are long."""
    nodes = list(module.graph.nodes)
    small = _small_nodes(nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    ((results,),) = (node.args for node in nodes if node.op == "output")
    crossing = [
        node
        for node in nodes
        if node in small
        and any(user not in small and user.op != "output" for user in node.users)
    ]
    short = [node for node in inputs[count:] if node in small]
    long = [node for node in inputs if node not in small]
    early = [result for result in results if result in small]
    late = [result for result in results if result not in small]
    others = [node for node in nodes if node not in small and node not in inputs]
    first = _graph(module, short, [n for n in nodes if n in small], [*crossing, *early])
    second = _graph(module, [*long, *crossing], others, late)
    return SplitGraph(
        first,
        second,
        [inputs.index(node) for node in long],
        [inputs.index(node) - count for node in short],
        len(crossing),
        [result not in small for result in results],
    )


def _graph(
    module: fx.GraphModule,
    inputs: list[fx.Node],
    nodes: list[fx.Node],
    results: list[fx.Node],
) -> Graph:
    graph = fx.Graph()
    known = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        if node not in known and node.op not in {"placeholder", "output"}:
            known[node] = graph.node_copy(node, known.__getitem__)
    graph.output(tuple(known[result] for result in results))
    graph.eliminate_dead_code()
    specs = [_spec(node.meta["val"]) for node in inputs]
    return Graph(fx.GraphModule(module, graph), specs)


def _small_nodes(nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes that are computed from single numbers alone."""
    small: set[fx.Node] = set()
    for node in nodes:
        is_input = node.op in {"placeholder", "get_attr"}
        if node.op == "output" or not (
            node.op == "get_attr" or _is_small(node.meta.get("val"))
        ):
            continue
        if is_input or all(source in small for source in node.all_input_nodes):
            small.add(node)
    return small


def _spec(value: Tensor) -> TensorSpec:
    shape = tuple(value.shape) if _is_small(value) else None
    return TensorSpec(value.dtype, value.device, shape)

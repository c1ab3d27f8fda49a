"""An update as a graph of tensor operations, in two parts.

What is computed from single numbers alone, a step count or a total, is a *prologue*: it
runs once a step. What is left, the *kernel*, runs on every unit, and finds the numbers
among its inputs. Compiled with the numbers inside, a kernel would compute them again
for each element of the parameters: ResNet-50's step takes 1.5 times as long then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from functional_optim._hoisting import hoisting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MOST = 64
"""Elements that a tensor of single numbers has at most."""

_EXAMPLE = 1003
"""Elements of the units that a trace is made with: a number nothing else has."""


class Traced(NamedTuple):
    """A function of tensors as a graph.

    Attributes:
        prologue: From all inputs, of which it reads single numbers, to what the kernel
            needs of them and those results that depend on nothing else.
        kernel: From the long inputs, and what the prologue tells it, to other results.
        long: The places of the kernel's inputs among all.
        examples: For each input of the kernel, dtype, device and number of elements;
            None where this is what changes from unit to unit.
        results: For each result whether it is the kernel's.
    """

    prologue: fx.GraphModule
    kernel: fx.GraphModule
    long: list[int]
    examples: list[tuple[torch.dtype, torch.device, tuple[int, ...] | None]]
    results: list[bool]


def traced(
    function: Callable[..., Sequence[Tensor]],
    long: Sequence[Tensor],
    short: Sequence[Tensor],
) -> Traced:
    """Trace a function that may write into its inputs.

    Args:
        function: A function of tensors that returns tensors. What it does must not
            depend on their values.
        long: Its first inputs, one-dimensional, for what has any length.
        short: Its other inputs.

    Raises:
        Exception: from the function, where it asks for a value.
    """
    # What is remembered here is no tensor that anybody else can use.
    with hoisting(), torch.no_grad():
        graph = make_fx(
            function, tracing_mode="symbolic", _error_on_data_dependent_ops=True
        )(*map(example_of, long), *short)
    return _split(graph)


def example_of(long: Tensor) -> Tensor:
    """Return a tensor to try on a function instead of one of any length."""
    return torch.zeros(_EXAMPLE, dtype=long.dtype, device=long.device)


def _is_small(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_small, value))
    if not isinstance(value, Tensor):
        return False
    return all(isinstance(size, int) for size in value.shape) and (
        value.numel() <= _MOST
    )


def _split(module: fx.GraphModule) -> Traced:
    nodes = list(module.graph.nodes)
    small = _small_nodes(nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    ((results,),) = (node.args for node in nodes if node.op == "output")
    crossing = [
        node
        for node in nodes
        if node in small
        and any(u not in small and u.op != "output" for u in node.users)
    ]
    first, second = fx.Graph(), fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "placeholder" or node in small:
            known[node] = first.node_copy(node, known.__getitem__)
    told = [known[result] for result in results if result in small]
    first.output((tuple(known[node] for node in crossing), tuple(told)))
    first.eliminate_dead_code()
    long = [index for index, node in enumerate(inputs) if node not in small]
    known = {}
    for node in [*(inputs[index] for index in long), *crossing]:
        known[node] = second.placeholder(node.name)
    for node in nodes:
        if node not in small and node.op not in {"placeholder", "output"}:
            known[node] = second.node_copy(node, known.__getitem__)
    second.output(tuple(known[result] for result in results if result not in small))
    second.eliminate_dead_code()
    return Traced(
        fx.GraphModule(module, first),
        fx.GraphModule(module, second),
        long,
        [
            _example(node.meta["val"])
            for node in [*(inputs[index] for index in long), *crossing]
        ],
        [result not in small for result in results],
    )


def _small_nodes(nodes: list[fx.Node]) -> set[fx.Node]:
    """Return what is computed from single numbers alone."""
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


def _example(
    value: Tensor,
) -> tuple[torch.dtype, torch.device, tuple[int, ...] | None]:
    shape = tuple(value.shape) if _is_small(value) else None
    return value.dtype, value.device, shape

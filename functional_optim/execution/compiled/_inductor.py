"""Compile graphs with TorchInductor, for units of any length."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Names of torch's own that are about to go.
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from functional_optim.execution.compiled._tracing import Graph, TensorSpec

_LONG = 2**22 + 3
"""Elements of the unit that is compiled for: enough for all threads. Nothing is ever
written there, so that it takes no memory."""

_known: dict[Hashable, Callable[..., Any]] = {}


def compile_graph(graph: Graph) -> Callable[..., Any]:
    """Return a graph as compiled code, made once in a process."""
    if any(node.op == "get_attr" for node in graph.module.graph.nodes):
        return _compiled(graph)  # Its constants are not in the text of the code.
    key = (
        graph.module.code,
        tuple(graph.inputs),
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )
    if key not in _known:
        _known[key] = _compiled(graph)
    return _known[key]


def _compiled(graph: Graph) -> Callable[..., Any]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs = [_fake(mode, spec) for spec in graph.inputs]
    inner: list[tuple[int, Any]] = []

    def inner_compile(module: Any, given: Any, **options: Any) -> Any:
        code = compile_fx_inner(module, given, **options)
        inner.append((len(given), getattr(code, "current_callable", None)))
        return code

    # Its cache would hand over code without `inner_compile`; the compiler has one, too.
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    quiet = warnings.catch_warnings()
    with tracing(TracingContext(mode)), uncached, quiet:
        warnings.simplefilter("ignore")  # What a user can do nothing about.
        outer: Any = compile_fx(graph.module, inputs, inner_compile=inner_compile)
    if len(inner) == 1:
        ((count, call),) = inner
        if call is not None and count == len(inputs):
            found: Callable[..., Any] = call  # What checks inputs costs more than it.
            return found
    return lambda tensors: outer(*tensors)


def _fake(mode: Any, spec: TensorSpec) -> Tensor:
    dtype, device, shape = spec
    if shape is None:
        long = torch.empty(_LONG, dtype=dtype, device=device)
        any_length: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK])
        fake: Tensor = mode.from_tensor(long, symbolic_context=any_length)
        return fake
    with mode:
        return torch.empty(shape, dtype=dtype, device=device)

"""Graphs compiled by TorchInductor, for units of any length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from functional_optim.execution._tracing import Traced

_LONG = 2**22 + 3
"""Elements of the unit that code is made for: it runs on all threads. Nothing is ever
written there, so that it takes no memory."""

_known: dict[Hashable, Callable[..., Any]] = {}


def compiled(graph: Traced) -> Callable[..., Any]:
    """Return a graph's kernel as compiled code, which is made once in a process.

    Args:
        graph: The graph.

    Raises:
        Exception: from the compiler, or because there is none.
    """
    key = (
        graph.kernel.code,
        tuple(graph.examples),
        torch.get_num_threads(),
    )
    if any(node.op == "get_attr" for node in graph.kernel.graph.nodes):
        return _compiled(graph)  # The text of the code does not tell its constants.
    if key not in _known:
        _known[key] = _compiled(graph)
    return _known[key]


def _compiled(graph: Traced) -> Callable[..., Any]:
    # Imported here: they take a second, and others run without them.
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs = [_fake(mode, *example) for example in graph.examples]
    inner: list[tuple[int, Any]] = []

    def inner_compile(module: Any, given: Any, **options: Any) -> Any:
        code = compile_fx_inner(module, given, **options)
        inner.append((len(given), getattr(code, "current_callable", None)))
        return code

    # Its cache would hand over code without `inner_compile`; the compiler has one, too.
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch.no_grad(), tracing(TracingContext(mode)), uncached:
        outer: Callable[..., Any] = compile_fx(
            graph.kernel, inputs, inner_compile=inner_compile
        )
    ((count, call),) = inner
    if call is None or count != len(inputs):
        return outer

    def run(*tensors: Tensor) -> Any:
        return call(list(tensors))

    return run


def _fake(
    mode: Any,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] | None,
) -> Tensor:
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        StatelessSymbolicContext,
    )

    if shape is None:
        long = torch.empty(_LONG, dtype=dtype, device=device)
        any_length = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK])
        fake: Tensor = mode.from_tensor(long, symbolic_context=any_length)
        return fake
    with mode:
        return torch.empty(shape, dtype=dtype, device=device)

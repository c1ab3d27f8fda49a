"""A step while something follows torch's operations: it sees the whole update."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import functional_optim as fo

WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "compile": {"compile": True},
}
CHAINS = {
    "adamw": fo.adamw(0.1),
    "clip": fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(0.1)),
    "guard": fo.SkipNonfinite(fo.sgd(0.1, momentum=0.9)),
    "window": fo.chain(fo.Accumulate(1), fo.sgd(0.1, momentum=0.9)),
}
LARGE = 300_000
"""Elements that no unit gathers."""


def _setup(chain: str, way: str) -> tuple[list[Parameter], fo.TransformOptimizer]:
    params = [Parameter(torch.ones(size)) for size in (4, 3, LARGE)]
    return params, fo.TransformOptimizer(params, CHAINS[chain], **WAYS[way])


def _gradients(step: int) -> list[Tensor]:
    return [torch.full((size,), 0.5 + step) for size in (4, 3, LARGE)]


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("first", [0, 1], ids=["at once", "after a step"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_graph_of_a_step_has_the_update(
    chain: str, way: str, first: int, *, pre_dispatch: bool
) -> None:
    """`make_fx` over a step gives a graph that moves parameters and state."""
    params, optimizer = _setup(chain, way)
    others, twin = _setup(chain, "auto")

    def step(grads: list[Tensor]) -> None:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()

    for number in range(first):
        step(_gradients(number))
    graph = make_fx(step, pre_dispatch=pre_dispatch)(_gradients(first))
    for number in range(first + 1, first + 4):
        graph(_gradients(number))
    for number in range(first + 4):
        for q, grad in zip(others, _gradients(number), strict=True):
            q.grad = grad
        twin.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())
        for key, entry in twin.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], entry)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operations_of_a_compiled_optimizer() -> None:
    """While a dispatch mode is on, an update runs without code, as torch.compile."""
    params, optimizer = _setup("adamw", "compile")

    def step() -> _Counting:
        for p, grad in zip(params, _gradients(0), strict=True):
            p.grad = grad
        with _Counting() as counting:
            optimizer.step()
        return counting

    first = step()
    for p, grad in zip(params, _gradients(0), strict=True):
        p.grad = grad
    optimizer.step()
    again = step()
    for counting in (first, again):
        assert counting.seen["sqrt"] + counting.seen["_foreach_sqrt"] >= 2


class _NormedElements(TorchDispatchMode):
    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "norm" in func.__name__:
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.count += sum(map(Tensor.numel, tensors))
        return func(*args, **(kwargs or {}))


def test_a_joint_norm_reads_each_gradient_once() -> None:
    """The pass that writes knows the total, and computes no norm again."""
    params, optimizer = _setup("clip", "auto")
    for _ in range(2):  # The first step records the calls of `reduce`, too.
        for p, grad in zip(params, _gradients(0), strict=True):
            p.grad = grad
        with _NormedElements() as normed:
            optimizer.step()
    # The norms of blocks and of tensors are few.
    assert LARGE + 7 <= normed.count <= LARGE + 100

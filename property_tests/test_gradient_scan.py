"""Compiled code sees of parameters, gradients and state what Python sees."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from functional_optim.execution._native import Gradients
from functional_optim.execution._tensor_memory import GatherBuffer
from functional_optim.torch_optimizer._gradients import GradientCollector

SHAPES = [(3, 4), (5,), (), (0, 2), (2, 3, 4, 5), (70,)]


def _parameters() -> list[Parameter]:
    found = [Parameter(torch.ones(shape, dtype=torch.float32)) for shape in SHAPES]
    found[4].data = found[4].data.to(memory_format=torch.channels_last)
    return found


def _turned(x: Tensor) -> Tensor:
    """Return the numbers otherwise in memory."""
    return x.t().contiguous().t() if x.ndim == 2 else x[..., None].repeat(2)[..., 0]


def _twice(x: Tensor) -> Tensor:
    return torch.stack([x.detach(), x.detach()], -1)[..., 0]


def _negated(x: Tensor) -> Tensor:
    return torch._neg_view(torch.full(x.shape, 2.0))


GRADIENTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda _: None,
    "dense": lambda p: torch.full(p.shape, 2.0),
    "like the parameter": torch.zeros_like,
    "gaps": _twice,
    "expanded": lambda p: torch.ones(()).expand(p.shape),
    "negated": _negated,
    "no memory": lambda p: torch._efficientzerotensor(p.shape),
    "sparse": lambda p: torch.ones(p.shape).to_sparse(),
    "with a graph": lambda p: p * 2.0,
}

MOVES: dict[str, Callable[[Parameter], Any]] = {
    "elsewhere": lambda p: setattr(p, "data", p.data.clone()),
    "shorter": lambda p: setattr(p, "data", p.data.reshape(-1)[:0]),
    "turned": lambda p: setattr(p, "data", p.data.mT if p.ndim >= 2 else p.data),
    "swapped": lambda p: torch.utils.swap_tensors(p, Parameter(p.detach().clone())),
    "written": lambda p: p.data.add_(1.0),
    "double": lambda p: setattr(p, "data", p.data.double()),
    "frozen": lambda p: p.requires_grad_(False),
}

CHANGES = st.one_of(
    st.tuples(st.sampled_from(list(GRADIENTS)), st.integers(0, len(SHAPES) - 1)),
    st.tuples(st.sampled_from(list(MOVES)), st.integers(0, len(SHAPES) - 1)),
)


def _change(param: Parameter, what: str) -> None:
    if what in MOVES:
        param.grad = None
        MOVES[what](param)
    else:
        grad = GRADIENTS[what](param.detach())
        param.grad = None if grad is None else grad.to(param.dtype)


def _told(collector: GradientCollector) -> Any:
    try:
        return {name: id(grad) for name, grad in collector.gradients().items()}
    except TypeError as error:
        return str(error)


@given(st.lists(st.lists(CHANGES, max_size=3), max_size=4))
@example([[("swapped", 0)], [], [("swapped", 0), ("elsewhere", 0)]])
@example([[("sparse", 1)], [("dense", 1)], [("sparse", 1)]])
@example([[("shorter", 0)], []])
def test_as_python(steps: list[list[tuple[str, int]]]) -> None:
    """What moved, and which gradients there are, after every change."""
    params = _parameters()
    names = {param: str(index) for index, param in enumerate(params)}
    compiled, plain = GradientCollector(names, compiles=True), GradientCollector(names)
    assert compiled.compiled
    assert not plain.compiled
    for changes in steps:
        for what, index in changes:
            _change(params[index], what)
        moved = plain.scan()
        assert compiled.scan() == moved
        assert _told(compiled) == _told(plain)
        if moved:
            assert compiled.scan()  # Until it is told that this is right.
            compiled.restart()
            plain.restart()
            assert not compiled.scan()


@given(st.lists(st.sampled_from(list(GRADIENTS)), min_size=5, max_size=5))
def test_gathered_by_address(kinds: list[str]) -> None:
    """What is gathered by address are the numbers; else it is not gathered."""
    params = [p for p in _parameters() if p.ndim != 4]
    for param, kind in zip(params, kinds, strict=True):
        _change(param, kind)
    collector = GradientCollector(
        {p: str(i) for i, p in enumerate(params)}, compiles=True
    )
    assert not collector.scan()
    if "sparse" in kinds:
        with pytest.raises(TypeError, match="sparse"):
            collector.gradients()
        return
    grads = collector.gradients()
    assert isinstance(grads, Gradients)
    members = [i for i, p in enumerate(params) if p.grad is not None]
    memory = torch.full((sum(params[i].numel() for i in members),), float("nan"))
    gathered = GatherBuffer(memory, [params[i].shape for i in members], compiles=True)
    done = gathered.gather_grads(grads, array("q", members))
    if done:
        wanted = [params[i].grad.detach().reshape(-1) for i in members]
        assert torch.equal(memory, torch.cat([*wanted, torch.empty(0)]))
    else:
        assert {"gaps", "expanded", "negated", "no memory"} & set(kinds)
        assert bool(memory.isnan().all())


@given(st.data())
def test_entries_of_the_state(data: st.DataObject) -> None:
    """A state is shown if its entries are these objects, in this order."""
    params = _parameters()
    collector = GradientCollector(
        {p: str(i) for i, p in enumerate(params)}, compiles=True
    )
    entry = st.sampled_from([torch.zeros(1) for _ in range(3)])
    state = {
        param: {f"k{i}": x for i, x in enumerate(data.draw(st.lists(entry)))}
        for param in params
    }
    entries = [x for own in state.values() for x in own.values()]
    assert collector.shows(state, entries)
    assert not collector.shows(state, [*entries, torch.zeros(1)])
    other = data.draw(st.lists(entry, max_size=len(entries) + 1))
    same = len(other) == len(entries) and all(
        a is b for a, b in zip(other, entries, strict=True)
    )
    assert collector.shows(state, other) == same

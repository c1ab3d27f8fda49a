"""Compiled code sees of parameters, gradients and state what Python sees."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from functional_optim.execution._native import (
    Operators,
    ParameterGradients,
    loaded_operators,
)
from functional_optim.execution._tensor_memory import GatherBuffer, ScratchMemory
from functional_optim.torch_optimizer._gradients import (
    GradientCollector,
    StateSnapshot,
)

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
    assert not compiled.failure
    for changes in steps:
        for what, index in changes:
            _change(params[index], what)
        moved = plain.scan()
        assert compiled.scan() == moved
        assert _told(compiled) == _told(plain)
        if moved:
            assert compiled.scan()  # Until another one is made.
            compiled = GradientCollector(names, compiles=True)
            plain = GradientCollector(names)
            assert not compiled.scan()


def _operators() -> Operators:
    found = loaded_operators()
    assert isinstance(found, Operators)
    return found


@given(st.lists(st.sampled_from(list(GRADIENTS)), min_size=5, max_size=5))
def test_gathered_at_once(kinds: list[str]) -> None:
    """What is gathered by an operator are the numbers; else torch gathers them."""
    params = [p for p in _parameters() if p.ndim != 4]
    for param, kind in zip(params, kinds, strict=True):
        _change(param, kind)
    names = {p: str(i) for i, p in enumerate(params)}
    collector = GradientCollector(names, compiles=True)
    assert not collector.scan()
    if "sparse" in kinds:
        with pytest.raises(TypeError, match="sparse"):
            collector.gradients()
        return
    grads = collector.gradients()
    assert isinstance(grads, ParameterGradients)
    members = {names[p]: p for p in params if p.grad is not None}
    if not members:
        return
    values = torch.cat([p.detach().reshape(-1) for p in members.values()])
    wanted = torch.cat([g.detach().reshape(-1) for g in grads.values()])
    memory, grad_memory = torch.zeros_like(values), torch.zeros_like(values)
    starts = _starts(list(members.values()))
    if _operators().gather(list(members.values()), starts, memory, grad_memory):
        assert torch.equal(memory, values)
        assert torch.equal(grad_memory, wanted)
    else:
        assert {"gaps", "expanded", "negated", "no memory"} & set(kinds)
    detached = {name: p.detach() for name, p in members.items()}
    gathered = GatherBuffer(detached, ScratchMemory(0), compiles=True)
    with torch.no_grad():
        gathered.gather(grads)
    assert torch.equal(gathered.params, values)
    assert torch.equal(gathered.grads, wanted)


def _starts(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(t.numel() for t in tensors)])


def _refused() -> dict[str, list[Tensor]]:
    return {
        "too long": [torch.zeros(3), torch.zeros(3)],
        "too short": [torch.zeros(3)],
        "another dtype": [torch.zeros(2, dtype=torch.complex64)],
        "every second": [torch.zeros(8)[::2]],
        "on another device": [torch.zeros(4, device="meta")],
    }


@pytest.mark.parametrize("kind", _refused())
def test_memory_of_another_kind_is_left_alone(kind: str) -> None:
    """Nothing is written unless all of the memory fits."""
    tensors = _refused()[kind]
    assert not _operators().scatter(tensors, _starts(tensors), torch.ones(4))
    assert not any(t.count_nonzero() for t in tensors if not t.is_meta)


@pytest.mark.parametrize("turned", [torch.conj, torch._neg_view])
def test_numbers_that_are_read_otherwise_are_not_copied(turned: Any) -> None:
    """A gradient may be conjugated, or its sign turned, when it is read."""
    param = Parameter(torch.ones(4, dtype=torch.complex64))
    param.grad = turned(torch.full((4,), 1.0 + 2.0j))
    memory, grads = torch.zeros_like(param), torch.zeros_like(param)
    starts = _starts([param])
    assert not _operators().gather([param], starts, memory.detach(), grads.detach())


@given(st.data())
def test_entries_of_the_state(data: st.DataObject) -> None:
    """A state is the same if its entries are these objects, in this order."""
    params = _parameters()
    entry = st.sampled_from([torch.zeros(1) for _ in range(3)])

    def drawn() -> dict[Tensor, dict[str, Tensor]]:
        lists = [data.draw(st.lists(entry, max_size=2)) for _ in params]
        return {
            param: {f"k{i}": x for i, x in enumerate(entries)}
            for param, entries in zip(params, lists, strict=True)
        }

    def entries_of(state: dict[Tensor, dict[str, Tensor]]) -> list[Tensor]:
        return [x for own in state.values() for x in own.values()]

    state, other = drawn(), drawn()
    snapshot = StateSnapshot(state, entries_of(state))
    assert snapshot.is_in({param: dict(own) for param, own in state.items()})
    assert not snapshot.is_in({**state, Parameter(torch.ones(1)): {"k": params[0]}})
    ids, other_ids = list(map(id, entries_of(state))), list(map(id, entries_of(other)))
    assert snapshot.is_in(other) == (ids == other_ids)

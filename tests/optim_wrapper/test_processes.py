"""Wrappers under DDP and FSDP: one reduction a window, the numbers of one process."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import functional_optim as fo

EVERY, NUM_BATCHES = 3, 7  # Windows of 3, 3 and 1.
CLIP = {"max_norm": 0.5}


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)
    return nn.Sequential(*layers).double()


def _batches() -> Tensor:
    return torch.randn(
        NUM_BATCHES, 4, 4, generator=torch.Generator().manual_seed(1)
    ).double()


def _train(
    model: nn.Module, wrapper: fo.OptimWrapper, rank: int, size: int
) -> list[int]:
    """Train on this process's rows, and count its reductions."""
    wrapper.initialize_count_status(model, 0, NUM_BATCHES)
    rows = 4 // size
    counts = []
    for batch in _batches():
        own = batch[rank * rows : (rank + 1) * rows]
        with wrapper.optim_context(model):
            loss = model(own).square().mean()
        before = _reductions()
        wrapper.update_params(loss)
        counts.append(_reductions() - before)
    return counts


_seen = [0]


def _reductions() -> int:
    return _seen[0]


def _counting_hook(state, bucket):  # DDP wants real annotations, or none.
    _seen[0] += 1
    future = dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True)
    return future.get_future().then(lambda done: done.value()[0])


def _ddp(rank: int) -> Any:
    model = DistributedDataParallel(_model(), gradient_as_bucket_view=True)
    model.register_comm_hook(None, _counting_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wrapper = fo.OptimWrapper(optimizer, EVERY, CLIP)
    counts = _train(model, wrapper, rank, 2)
    return counts, [p.detach().clone() for p in model.parameters()]


def _alone() -> list[Tensor]:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    _train(model, fo.OptimWrapper(optimizer, EVERY, CLIP), 0, 1)
    return [p.detach().clone() for p in model.parameters()]


def _close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    # Means over halves and over the whole differ by a few roundings of float64, which
    # seven steps of Adam at most multiply by lr / eps of a gradient that vanishes.
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_ddp_reduces_once_a_window() -> None:
    """Two processes with half the rows each are one with all; one all-reduce each."""
    results = processes.run(_ddp)
    for counts, params in results:
        assert counts == [0, 0, 1, 0, 0, 1, 1]
        _close(params, _alone())


def _fsdp(rank: int) -> Any:
    model = _model()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wrapper = fo.OptimWrapper(optimizer, EVERY, CLIP)
    wrapper.initialize_count_status(model, 0, NUM_BATCHES)
    flags = []
    for batch in _batches():
        own = batch[rank * 2 : (rank + 1) * 2]
        with wrapper.optim_context(model):
            loss = model(own).square().mean()
        flags.append(_reduces(model))
        wrapper.update_params(loss)
        flags.append(_reduces(model))
    full = [p.full_tensor().detach().clone() for p in model.parameters()]
    return flags, full


def _reduces(model: nn.Module) -> bool:
    assert isinstance(model, FSDPModule)
    return all(
        part._get_fsdp_state()._fsdp_param_group.reduce_grads
        for part in model.modules()
        if isinstance(part, FSDPModule) and part._get_fsdp_state()._fsdp_param_group
    )


def test_fsdp2_reduces_in_the_backward_that_ends_a_window() -> None:
    """The flag that FSDP2 asks in the backward stays off until then."""
    for flags, params in processes.run(_fsdp):
        assert flags == [False, True, False, True, True, True] * 2 + [True, True]
        _close(params, _alone())


class _Recorder(nn.Module):
    """A model that notes when synchronisation is switched, as FSDP2's modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.events: list[bool] = []

    def set_requires_gradient_sync(self, sync: bool, *, recurse: bool = True) -> None:
        self.events.append(sync)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _recorded() -> tuple[_Recorder, fo.OptimWrapper]:
    model = _Recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, fo.OptimWrapper(optimizer, accumulative_counts=2)


def test_suppression_lasts_until_the_backward_ends() -> None:
    """The context closes before the backward; the flag is asked in it."""
    model, wrapper = _recorded()
    with wrapper.optim_context(model):
        loss = model(torch.ones(1, 1)).sum()
    assert model.events == [False]
    wrapper.update_params(loss)
    assert model.events == [False, True]
    with wrapper.optim_context(model):
        loss = model(torch.ones(1, 1)).sum()
    wrapper.update_params(loss)
    assert model.events == [False, True]


@pytest.mark.parametrize("end", ["zero_grad", "optim_context", "error"])
def test_suppression_ends_without_a_backward(end: str) -> None:
    """It never leaks into what comes after."""
    model, wrapper = _recorded()
    if end == "error":
        with pytest.raises(RuntimeError, match="shape"), wrapper.optim_context(model):
            torch.ones(1, 2).reshape(3)
    else:
        with wrapper.optim_context(model):
            model(torch.ones(1, 1))
        if end == "zero_grad":
            wrapper.zero_grad()
        else:
            with wrapper.optim_context(nn.Linear(1, 1)):
                pass
    assert model.events == [False, True]


def _saves_in_windows(rank: int) -> Any:
    found = {}
    for way in ("wrapper", "by hand", "wrapper, zeros", "ddp"):
        model: Any = _model()
        if way == "ddp":
            model = DistributedDataParallel(model)
        else:
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        wrapper = fo.OptimWrapper(optimizer, EVERY)
        told = []
        for number, batch in enumerate(_batches()[: EVERY + 1]):
            if way == "by hand":
                model.set_requires_gradient_sync(number % EVERY == EVERY - 1)
                wrapper.update_params(model(batch).square().mean())
            else:
                with wrapper.optim_context(model):
                    loss = model(batch).square().mean()
                zeros = {"set_to_none": way != "wrapper, zeros"}
                wrapper.update_params(loss, zero_kwargs=zeros)
            try:
                told.append(len(wrapper.state_dict()["accumulation"]))
            except ValueError as error:
                told.append(str(error))
        found[way] = told
    return found


def test_a_window_that_is_open_inside_fsdp2_is_not_saved_without_its_gradients() -> (
    None
):
    """FSDP2 keeps them to itself; DDP leaves them where a state dict takes them."""
    for found in processes.run(_saves_in_windows):
        ddp = found.pop("ddp")
        assert all(isinstance(told, int) for told in ddp)
        for told in found.values():
            opened, again, closed, after = told
            assert isinstance(closed, int)
            for said in (opened, again, after):
                assert "gradients of an open window wait inside the model" in said
                assert "save where a window ends" in said

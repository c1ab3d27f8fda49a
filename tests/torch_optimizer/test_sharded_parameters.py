"""Parameters of which each process has a part: right, or refused with the reason."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import functional_optim as fo

STEPS = 3
BEHIND = fo.adamw(0.01)
TOTALS = {
    "clip": fo.chain(fo.ClipByGlobalNorm(0.1), BEHIND),
    "guard": fo.SkipNonfinite(BEHIND),
    "observe": fo.chain(fo.Observe("g"), BEHIND),
    "window": fo.chain(fo.Accumulate(1), fo.ClipByGlobalNorm(0.1), BEHIND),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def _batch(rank: int, size: int) -> Tensor:
    given = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).double()
    return given[rank * 8 // size : (rank + 1) * 8 // size]


def _train(
    model: nn.Module, step: Callable[[], Any], zero: Any, rank: int = 0, size: int = 1
) -> None:
    for _ in range(STEPS):
        model(_batch(rank, size)).square().mean().backward()
        step()
        zero()


def _alone(transform: fo.Transform) -> list[Tensor]:
    model = _model()
    optimizer = fo.TransformOptimizer(model.named_parameters(), transform)
    _train(model, optimizer.step, optimizer.zero_grad)
    return [p.detach() for p in model.parameters()]


def _said(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing"


# -- FSDP1 -----------------------------------------------------------------------------


def _fsdp1(*, orig: bool, strategy: Any = ShardingStrategy.FULL_SHARD) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of its own future.
        return FullyShardedDataParallel(
            _model(),
            device_id=torch.device("cpu"),
            use_orig_params=orig,
            sharding_strategy=strategy,
        )


def _whole(model: Any) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FullyShardedDataParallel.summon_full_params(model):
            return [p.detach().reshape(-1).clone() for p in model.parameters()]


def _on_fsdp1(rank: int) -> Any:
    warnings.simplefilter("ignore")
    size, found = dist.get_world_size(), {}
    for orig in (False, True):
        for name, transform in TOTALS.items():
            model = _fsdp1(orig=orig)
            optimizer = fo.TransformOptimizer(model.named_parameters(), transform)
            model(_batch(rank, size)).square().mean().backward()
            found[orig, name] = _said(optimizer.step), _whole(model)
            step = optimizer.state_dict()["state"][0]
            found[orig, name] = *found[orig, name], int(step["step"])
        for way in ("plain", "compiled"):
            model = _fsdp1(orig=orig)
            optimizer = fo.TransformOptimizer(
                model.parameters(), BEHIND, compile=way == "compiled"
            )
            _train(model, optimizer.step, optimizer.zero_grad, rank, size)
            found[orig, way] = _whole(model)
        per_tensor = fo.chain(fo.ClipByNorm(1.0), BEHIND)
        found[orig, "tensor"] = _said(
            lambda model=model, rule=per_tensor: fo.TransformOptimizer(
                model.named_parameters(), rule
            )
        )
        for kind, make in (("torch", torch.optim.SGD), ("ours", _ours)):
            for key, given in (
                ("clip", {"clip_grad": {"max_norm": 0.1}}),
                ("transform", {"transform": fo.ClipByGlobalNorm(0.1)}),
                ("tensor", {"transform": fo.Centralize()}),
                ("value", {"clip_grad": {"type": "value", "clip_value": 0.01}}),
            ):
                model = _fsdp1(orig=orig)
                wrapper = fo.OptimWrapper(make(model.parameters(), 0.1), **given)
                model(_batch(rank, size)).square().mean().backward()
                found[orig, kind, key] = _said(wrapper.step), _whole(model)
    model = _fsdp1(orig=True, strategy=ShardingStrategy.NO_SHARD)
    optimizer = fo.TransformOptimizer(model.parameters(), TOTALS["clip"])
    _train(model, optimizer.step, optimizer.zero_grad, rank, size)
    found["not cut"] = _whole(model)
    return found


def _ours(params: Any, lr: float) -> fo.TransformOptimizer:
    return fo.TransformOptimizer(params, fo.sgd(lr))


def _close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    flat = [torch.cat([x.reshape(-1) for x in some]) for some in (ours, theirs)]
    # Means over halves and over the whole differ by roundings of float64.
    torch.testing.assert_close(*flat, rtol=1e-9, atol=1e-9)


def test_fsdp1_with_a_total_is_refused_and_without_is_right() -> None:
    """Each process would clip by the norm of its own pieces, silently."""
    first = [p.detach() for p in _model().parameters()]
    for found in processes.run(_on_fsdp1):
        for orig in (False, True):
            name = r"0\.weight" if orig else "_flat_param"
            for chain in TOTALS:
                said, params, step = found[orig, chain]
                assert "FullyShardedDataParallel has cut" in said
                assert name.replace("\\", "") in said
                assert "model's own clip_grad_norm_" in said
                assert step == 0
                _close(params, first)
            for way in ("plain", "compiled"):
                _close(found[orig, way], _alone(BEHIND))
            assert "looks at whole tensors" in found[orig, "tensor"]
            for kind in ("torch", "ours"):
                for key in ("clip", "transform"):
                    said, params = found[orig, kind, key]
                    assert "FullyShardedDataParallel has cut" in said
                    _close(params, first)
                assert "looks at whole tensors" in found[orig, kind, "tensor"][0]
                said, params = found[orig, kind, "value"]
                assert said == "nothing"
                assert not torch.equal(params[0], first[0].reshape(-1))
        _close(found["not cut"], _alone(TOTALS["clip"]))


def _alone_in_fsdp1(rank: int) -> Any:
    warnings.simplefilter("ignore")
    found = []
    for orig in (False, True):
        model = _fsdp1(orig=orig)
        optimizer = fo.TransformOptimizer(model.parameters(), TOTALS["clip"])
        _train(model, optimizer.step, optimizer.zero_grad)
        found.append(_whole(model))
    return found


def test_fsdp1_in_one_process_is_right() -> None:
    """There is nobody else, and nothing is cut."""
    (found,) = processes.run(_alone_in_fsdp1, 1)
    for params in found:
        _close(params, _alone(TOTALS["clip"]))


# -- ZeroRedundancyOptimizer -----------------------------------------------------------


def _zero(model: Any, transform: fo.Transform, **options: Any) -> Any:
    # Its module warns of its own future.
    optim = importlib.import_module("torch.distributed.optim")
    return optim.ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=fo.TransformOptimizer,
        transform=transform,
        **options,
    )


def _in_zero(rank: int) -> Any:
    warnings.simplefilter("ignore")
    size, found = dist.get_world_size(), {}
    for name, transform in {**TOTALS, "right": BEHIND}.items():
        model = DistributedDataParallel(_model())
        zero = _zero(model, transform)
        said = _said(
            lambda model=model, zero=zero: _train(
                model, zero.step, zero.zero_grad, rank, size
            )
        )
        found[name] = said, [p.detach() for p in model.parameters()]
    model = DistributedDataParallel(_model())
    zero = _zero(model, fo.chain(fo.ClipByNorm(0.1), BEHIND))
    _train(model, zero.step, zero.zero_grad, rank, size)
    found["tensor"] = [p.detach() for p in model.parameters()]
    model = DistributedDataParallel(_model())
    wrapper = fo.OptimWrapper(_zero(model, BEHIND), clip_grad={"max_norm": 0.1})
    _train(model, wrapper.step, wrapper.zero_grad, rank, size)
    found["wrapper"] = [p.detach() for p in model.parameters()]
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_zero_with_a_total_is_refused_and_without_is_right(size: int) -> None:
    """Each process would clip by the norm of its part; one alone has all."""
    first = [p.detach() for p in _model().parameters()]
    for found in processes.run(_in_zero, size):
        for chain, transform in TOTALS.items():
            said, params = found[chain]
            if size == 1:
                assert said == "nothing"
                _close(params, _alone(transform))
            else:
                assert "ZeroRedundancyOptimizer gives a part of the parameters" in said
                assert "OptimWrapper(zero, clip_grad=...)" in said
                _close(params, first)
        assert found["right"][0] == "nothing"
        _close(found["right"][1], _alone(BEHIND))
        _close(found["tensor"], _alone(fo.chain(fo.ClipByNorm(0.1), BEHIND)))
        _close(found["wrapper"], _alone(TOTALS["clip"]))


# -- DTensors --------------------------------------------------------------------------


def _dtensors(rank: int) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    model = _model()
    for part in (model[0], model[2]):
        for name, p in list(part.named_parameters()):
            cut = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
            setattr(part, name, cut)
    said = _said(lambda: fo.TransformOptimizer(model.named_parameters(), BEHIND))
    single = _said(lambda: fo.TransformOptimizer([model[0].weight], BEHIND))
    grouped = fo.TransformOptimizer([nn.Parameter(torch.ones(2))], BEHIND)
    later = _said(
        lambda: grouped.add_param_group({"params": [model[0].weight], "lr": 0.1})
    )
    transform = TOTALS["clip"]
    params = fo.parameters(model)
    state = transform.init(params)
    for _ in range(STEPS):
        grads = {name: _gradient_of(p) for name, p in params.items()}
        updates, state = transform.update(grads, state, params)
        params = fo.apply_updates(params, updates)
    fo.load_parameters(model, params)
    whole = [p.full_tensor().detach() for p in model.parameters()]
    return (said, single, later), whole


def _gradient_of(p: Any) -> Any:
    """Return a gradient that depends on the place of each element."""
    numbers = torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape) / 7
    return distribute_tensor(numbers, p.device_mesh, p.placements)


def test_dtensors_are_refused_in_place_and_right_in_the_pure_way() -> None:
    """The true reason, the parameter, and what to use."""
    model = _model()
    params = list(model.parameters())
    optimizer = fo.TransformOptimizer(params, TOTALS["clip"])
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape) / 7
        optimizer.step()
    for messages, found in processes.run(_dtensors):
        for name, said in zip(("'0.weight'", "'0'", "'1'"), messages, strict=True):
            assert f"parameter {name} is a DTensor" in said
            assert "the pure way" in said
        for mine, p in zip(found, params, strict=True):
            torch.testing.assert_close(mine, p.detach(), rtol=1e-12, atol=1e-12)

"""layout: the same numbers in each, and what others see of parameters."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import functional_optim as fo

LAYOUTS = ("leaves", "auto", "flat")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
with_and_without_code = pytest.mark.parametrize("compiles", [False, True])

# 64-byte lines: 16 numbers of float32, 8 of float64.
SHAPES = [(16,), (4, 8), (3,), (0, 2), (), (5, 7), (32,), (2, 3, 4, 4), (40_000,)]


def _parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    strided = torch.randn(8, 4, generator=generator).to(dtype).t()
    return [*found, Parameter(strided)]


def _give_gradients(params: list[Parameter], step: int, skip: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for index, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if index in skip else grad


def _adamw(params: Any, layout: Any = "flat", **options: Any) -> fo.TransformOptimizer:
    clipped = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(1e-2, weight_decay=0.1))
    return fo.TransformOptimizer(params, clipped, layout=layout, **options)


def _plan(optimizer: fo.TransformOptimizer) -> str:
    return fo.explain(optimizer).split("plan")[1]


@with_and_without_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_numbers(dtype: torch.dtype, compiles: bool) -> None:
    """Gradients come and go, groups change: what lies where changes no number.

    Each layout adds up the norm in another order: float32 rounds it by at most 2^-23,
    and that of an update of size lr in each of ten steps.
    """
    params = {layout: _parameters(dtype) for layout in LAYOUTS}
    optimizers = {
        layout: _adamw(own, layout, compile=compiles) for layout, own in params.items()
    }
    skips = [(), (), (1,), (1, 6), (), (0, 1, 2, 3, 4), (), (6,), (), ()]
    for step, skip in enumerate(skips):
        for layout, own in params.items():
            _give_gradients(own, step, skip)
            if step == 6:
                optimizers[layout].param_groups[0]["lr"] = 1e-3
            optimizers[layout].step()
    bound = 1e-12 if dtype == torch.float64 else 10 * 2 * 2.0**-23
    for layout in ("leaves", "flat"):
        for a, b in zip(params[layout], params["auto"], strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound * 1e-2)


def test_the_same_bits_without_a_norm() -> None:
    params = {layout: _parameters() for layout in LAYOUTS}
    for layout, own in params.items():
        optimizer = fo.TransformOptimizer(own, fo.adamw(1e-2), layout=layout)
        for step, skip in enumerate([(), (1,), (), (6, 7)]):
            _give_gradients(own, step, skip)
            optimizer.step()
    for layout in ("leaves", "flat"):
        for a, b in zip(params[layout], params["auto"], strict=True):
            assert torch.equal(a, b)


def test_what_lies_where() -> None:
    """What fills whole lines lies side by side; the rest is gathered, or alone."""
    params = _parameters()
    before = [p.data_ptr() for p in params]
    auto = _plan(_adamw(params, "auto"))
    leaves = _plan(_adamw(params, "leaves"))
    assert [p.data_ptr() for p in params] == before
    assert "1 pool" in auto
    assert "pool" not in leaves.replace("1 pool", "", 1)  # The one that has strides.
    flat = _plan(_adamw(params, "flat"))
    moved = [p.data_ptr() != was for p, was in zip(params, before, strict=True)]
    assert moved == [True, True, False, False, False, False, True, True, True, False]
    assert "5 of 10 tensors side by side" in flat
    laid = [p for p, is_moved in zip(params, moved, strict=True) if is_moved]
    for one, following in itertools.pairwise(laid):
        assert following.data_ptr() == one.data_ptr() + 4 * one.numel()
        assert one.data_ptr() % 64 == 0


# -- what others see -------------------------------------------------------------------


def _saved(value: Any) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(40)))


@each_layout
def test_what_is_saved_is_not_more(layout: Any) -> None:
    """No whole buffer behind a bias of 64 bytes, nor once for each tensor."""
    plain, model = _model(), _model()
    optimizer = _adamw(model.parameters(), layout)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert _saved(model[0].bias) == _saved(plain[0].bias)
    assert _saved(model.state_dict()) == _saved(plain.state_dict())
    assert len(pickle.dumps(model)) <= 1.01 * len(pickle.dumps(plain))


@with_and_without_code
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_their_own_way(how: str, compiles: bool) -> None:
    """A model and its optimizer, copied together, train on as the originals do."""
    model = _model()
    both = model, _adamw(model.parameters(), compile=compiles)
    _train(*both)
    if how == "deepcopy":
        copies = copy.deepcopy(both)
    elif how == "pickle":
        copies = pickle.loads(pickle.dumps(both))
    else:
        file = io.BytesIO()
        torch.save(both, file)
        file.seek(0)
        copies = torch.load(file, weights_only=False)
    # What torch.load makes cannot be told from what others made, and stays.
    wanted = 0 if how == "torch.save" else 80
    assert f"({wanted} of 80 tensors side by side)" in _plan(copies[1])
    before = [p.detach().clone() for p in model.parameters()]
    _train(*copies)
    assert all(map(torch.equal, model.parameters(), before))
    _train(*both)
    assert all(map(torch.equal, model.parameters(), copies[0].parameters()))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        model(torch.ones(2, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def _taken(p: Parameter) -> Tensor:
    return p.data


def _a_storage(p: Parameter) -> Tensor:
    return torch.empty(0).set_(p.untyped_storage())


def _an_array(p: Parameter) -> Tensor:
    return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(p.detach()))


@pytest.mark.parametrize(
    "take", [_taken, Parameter.detach, _a_storage, _an_array, lambda p: p[3:]]
)
@pytest.mark.parametrize("early", [True, False])
def test_views_of_others_follow(take: Callable[..., Tensor], early: bool) -> None:
    """What somebody took from a parameter sees the step, whenever it was taken."""
    params = [Parameter(torch.ones(16)) for _ in range(4)]
    taken = take(params[1]) if early else None
    optimizer = _adamw(params)
    taken = take(params[1]) if taken is None else taken
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert taken.reshape(-1)[-1] == params[1][-1] != 1.0
    params[0].grad = None  # They part: a new plan.
    optimizer.step()
    assert taken.reshape(-1)[-1] == params[1][-1]


def test_memory_that_others_chose_stays() -> None:
    """Shared memory, and a part of larger memory, such as another's flat buffer."""
    whole = torch.ones(64)
    shared = Parameter(torch.ones(16).share_memory_())
    parts = [Parameter(whole[:16]), Parameter(whole[16:32])]
    params = [shared, *parts, Parameter(torch.ones(16))]
    before = [p.data_ptr() for p in params]
    optimizer = _adamw(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [p.data_ptr() != was for p, was in zip(params, before, strict=True)]
    assert moved == [False, False, False, True]
    assert torch.equal(whole[:16], parts[0])
    assert shared.is_shared()


@with_and_without_code
def test_parameters_that_move_are_followed(compiles: bool) -> None:
    """to(dtype), channels_last, share_memory, .data: the numbers go on."""
    results = []
    for layout in ("auto", "flat"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 16, 2), nn.Conv2d(16, 16, 1))
        optimizer = _adamw(model.parameters(), layout, compile=compiles)
        changes: list[Callable[[], Any]] = [
            lambda: None,
            model.double,
            lambda model=model: model.to(memory_format=torch.channels_last),
            model.float,
            model.share_memory,
            lambda model=model: setattr(
                model[0].bias, "data", model[0].bias.data.clone()
            ),
            lambda optimizer=optimizer: optimizer.add_param_group(
                {"params": [Parameter(torch.ones(16))]}
            ),
            lambda optimizer=optimizer: optimizer.load_state_dict(
                optimizer.state_dict()
            ),
        ]
        for change in changes:
            change()
            x = torch.ones(1, 2, 3, 3, dtype=model[0].weight.dtype)
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model[0].weight.is_shared()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        # Eight steps of size lr = 1e-2, and norms of float32 in two orders.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=8 * 1e-2 * 2.0**-22)


def test_a_parameter_alone_moves_and_the_others_lie_side_by_side_again() -> None:
    params = [Parameter(torch.ones(16)) for _ in range(6)]
    optimizer = _adamw(params)
    params[2].data = params[2].data.clone()
    assert "6 of 6 tensors side by side" in _plan(optimizer)


def test_two_optimizers_over_the_same_parameters() -> None:
    """Each finds what the other did; who comes second lays them out anew."""
    params = [Parameter(torch.ones(16)) for _ in range(3)]
    twins = [Parameter(torch.ones(16)) for _ in range(3)]
    ours = [_adamw(params), fo.TransformOptimizer(params, fo.sgd(0.1), layout="flat")]
    theirs = [_adamw(twins, "auto"), fo.TransformOptimizer(twins, fo.sgd(0.1))]
    for _ in range(3):
        for own, optimizers in ((params, ours), (twins, theirs)):
            for p in own:
                p.grad = torch.ones_like(p)
            for optimizer in optimizers:
                optimizer.step()
    assert all(map(torch.equal, params, twins))


def test_a_graph_from_before_is_seen_to_be_old() -> None:
    """As after a step of torch: what backward needs was written."""
    params = [Parameter(torch.ones(16)) for _ in range(2)]
    optimizer = _adamw(params)
    saved = [(p * p).sum() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for result in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


def test_memory_from_outside_torch_stays() -> None:
    """Who made it is no tensor, and cannot be counted."""
    made = bytearray(64)
    outside = Parameter(torch.frombuffer(made, dtype=torch.float32))
    params = [outside, *(Parameter(torch.ones(16)) for _ in range(3))]
    optimizer = _adamw(params)
    assert "3 of 4 tensors side by side" in _plan(optimizer)
    outside.grad = torch.ones(16)
    optimizer.step()
    assert torch.equal(torch.frombuffer(made, dtype=torch.float32), outside)
    del optimizer
    gc.collect()
    assert "2 of 3" in _plan(_adamw(params[:3]))  # Ours may move on.


def test_our_own_views_do_not_count() -> None:
    """A parameter alone is no pool; with a second one it becomes a part of one."""
    one, two = Parameter(torch.ones(16)), Parameter(torch.ones(16))
    optimizer = _adamw([one])
    optimizer.add_param_group({"params": [two]})
    assert "2 of 2 tensors side by side" in _plan(optimizer)


@each_layout
@with_and_without_code
def test_the_state_that_is_shown_is_the_state(layout: Any, compiles: bool) -> None:
    """Also after somebody moved it to shared memory, or keeps it for a backward."""
    params = [Parameter(torch.ones(16)) for _ in range(4)]
    optimizer = _adamw(params, layout, compile=compiles)

    def step(number: float) -> None:
        for p in params:
            p.grad = torch.full_like(p, number)
        optimizer.step()

    step(1.0)
    entry = optimizer.state[params[1]]["exp_avg"]
    entry.share_memory_()
    before = entry.clone()
    weight = torch.ones(16, requires_grad=True)
    result = (weight * entry).sum()
    step(-3.0)
    assert not torch.equal(optimizer.state[params[1]]["exp_avg"], before)
    saved = optimizer.state_dict()["state"][1]["exp_avg"]
    assert torch.equal(saved, optimizer.state[params[1]]["exp_avg"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


# -- bad input -------------------------------------------------------------------------


def test_layouts_that_there_are_not() -> None:
    params = [Parameter(torch.ones(16))]
    with pytest.raises(ValueError, match="'leaves', 'auto', 'flat', got 'Flat'"):
        _adamw(params, "Flat")
    with pytest.raises(ValueError, match="layout='flat' works in place, which auto"):
        _adamw(params, "flat", differentiable=True)
    with pytest.raises(ValueError, match="compile=True works in place, which auto"):
        _adamw(params, "auto", compile=True, differentiable=True)
    with pytest.raises(ValueError, match="compile must be True or False, got 'yes'"):
        _adamw(params, "auto", compile="yes")


def test_parameters_elsewhere_are_named() -> None:
    params = [("here", Parameter(torch.ones(16, device="meta")))]
    with pytest.raises(ValueError, match="'here' lies on meta; use layout='auto'"):
        _adamw(params)

"""The memory of parameters: views, copies and checkpoints see every step."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import functional_optim as fo

with_and_without_code = pytest.mark.parametrize("compiles", [False, True])


def _adamw(params: Any, **options: Any) -> fo.TransformOptimizer:
    clipped = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(1e-2, weight_decay=0.1))
    return fo.TransformOptimizer(params, clipped, **options)


def _saved(value: Any) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(40)))


def test_what_is_saved_is_not_more() -> None:
    """No whole buffer behind a bias of 64 bytes, nor once for each tensor."""
    plain, model = _model(), _model()
    optimizer = _adamw(model.parameters())
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
    """Shared memory, a part of larger memory, and what torch did not make."""
    whole, made = torch.ones(64), bytearray(64)
    shared = Parameter(torch.ones(16).share_memory_())
    outside = Parameter(torch.frombuffer(made, dtype=torch.float32))
    parts = [Parameter(whole[:16]), Parameter(whole[16:32])]
    params = [shared, outside, *parts, Parameter(torch.ones(16))]
    before = [p.data_ptr() for p in params]
    optimizer = _adamw(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [p.data_ptr() for p in params] == before
    assert torch.equal(whole[:16], parts[0])
    assert torch.equal(torch.frombuffer(made, dtype=torch.float32), outside)
    assert shared.is_shared()


@with_and_without_code
def test_parameters_that_move_are_followed(compiles: bool) -> None:
    """to(dtype), channels_last, share_memory, .data: the numbers go on."""
    results = []
    for moves in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 16, 2), nn.Conv2d(16, 16, 1)).double()
        optimizer = _adamw(model.parameters(), compile=compiles)
        changes: list[Callable[[], Any]] = [
            lambda: None,
            lambda model=model: model.to(memory_format=torch.channels_last),
            model.share_memory,
            lambda model=model: setattr(
                model[0].bias, "data", model[0].bias.data.clone()
            ),
        ]
        further: list[Callable[[], Any]] = [
            lambda optimizer=optimizer: optimizer.add_param_group(
                {"params": [Parameter(torch.ones(16, dtype=torch.float64))]}
            ),
            lambda optimizer=optimizer: optimizer.load_state_dict(
                optimizer.state_dict()
            ),
        ]
        for change in changes + further:
            if moves or change in further:
                change()
            model(torch.ones(1, 2, 3, 3).double()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model[0].weight.is_shared() == moves
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        # channels_last convolves and sums norms in another order: float64, six steps.
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_two_optimizers_over_the_same_parameters() -> None:
    """Each finds what the other did."""
    params = [Parameter(torch.ones(16)) for _ in range(3)]
    twins = [Parameter(torch.ones(16)) for _ in range(3)]
    ours = [_adamw(params), fo.TransformOptimizer(params, fo.sgd(0.1))]
    theirs = [_adamw(twins), fo.TransformOptimizer(twins, fo.sgd(0.1))]
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


@with_and_without_code
def test_the_state_that_is_shown_is_the_state(compiles: bool) -> None:
    """Also after somebody moved it to shared memory, or keeps it for a backward."""
    params = [Parameter(torch.ones(16)) for _ in range(4)]
    optimizer = _adamw(params, compile=compiles)

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


@pytest.mark.parametrize(
    ("argument", "given", "remedy"),
    [
        ("layout", "flat", "small tensors are always gathered.*leave it out"),
        ("layout", "auto", "leave it out"),
        ("differentiable", True, r"context=Context\(differentiable=True\)"),
        ("differentiable", False, "an optimizer steps in place"),
    ],
)
def test_arguments_of_earlier_versions_say_what_to_do(
    argument: str, given: Any, remedy: str
) -> None:
    with pytest.raises(TypeError, match=f"no argument '{argument}': .*{remedy}"):
        _adamw([Parameter(torch.ones(16))], **{argument: given})


def test_a_step_that_is_differentiated_in_the_pure_way() -> None:
    """What stands in the message for `differentiable` gives derivatives."""
    rate = torch.tensor(0.1, requires_grad=True)
    transform, params = fo.adamw(rate), {"w": torch.ones(2)}
    context = fo.Context(differentiable=True)
    state = transform.init(params)
    updates, _ = transform.update(params, state, params, context=context)
    moved = fo.apply_updates(params, updates, differentiable=True)["w"]
    (slope,) = torch.autograd.grad(moved.sum(), rate)
    assert slope < 0


def test_compile_is_a_bool() -> None:
    with pytest.raises(ValueError, match="compile must be True or False, got 'yes'"):
        _adamw([Parameter(torch.ones(16))], compile="yes")

"""The state of each parameter, and what a user may do to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import assert_same
from training import everything, parameters, set_gradients, train, values

import functional_optim as fo

PAIRS: dict[str, Any] = {
    "adamw": (fo.adamw(0.1), torch.optim.AdamW, {}),
    "amsgrad": (fo.adamw(0.1, amsgrad=True), torch.optim.AdamW, {"amsgrad": True}),
    "adam": (fo.adam(0.1), torch.optim.Adam, {}),
    "momentum": (fo.sgd(0.1, 0.9), torch.optim.SGD, {"momentum": 0.9}),
    "sgd": (fo.sgd(0.1), torch.optim.SGD, {}),
}
each_pair = pytest.mark.parametrize("pair", PAIRS)


def _make(transform: fo.Transform, dtype: torch.dtype = torch.float64) -> Any:
    params = parameters(dtype)
    return params, fo.TransformOptimizer(params.items(), transform)


@each_pair
def test_keys_are_those_of_torch(pair: str) -> None:
    """state[p] has what torch's optimizer has after a step, with the same numbers."""
    transform, kind, options = PAIRS[pair]
    params, optimizer = _make(transform)
    theirs = parameters()
    reference = kind(theirs.values(), lr=0.1, **options)
    train(optimizer, params, range(3))
    train(reference, theirs, range(3))
    for name, param in params.items():
        expected = {
            key: entry
            for key, entry in reference.state[theirs[name]].items()
            if entry is not None
        }
        own = optimizer.state[param]
        assert set(own) == set(expected)
        for key, entry in expected.items():
            # A few roundings in each of 3 steps.
            torch.testing.assert_close(
                own[key].double(), entry.double(), rtol=1e-13, atol=1e-15
            )


@each_pair
def test_state_is_there_from_the_start_and_stays(pair: str) -> None:
    """The tensors of state[p] are the same objects from construction to the end."""
    params, optimizer = _make(PAIRS[pair][0])
    first = {
        (name, key): entry
        for name, param in params.items()
        for key, entry in optimizer.state[param].items()
    }
    assert bool(first) == (pair != "sgd")
    memory = {place: entry.data_ptr() for place, entry in first.items()}
    train(optimizer, params, range(4))
    for (name, key), entry in first.items():
        assert optimizer.state[params[name]][key] is entry
        assert entry.data_ptr() == memory[name, key]
        assert entry.any(), "a step did not write here"


def test_wide_state_of_narrow_parameters_is_kept() -> None:
    """float32 sums of bfloat16 parameters come back from a checkpoint as they were.

    torch's load_state_dict would round them to the parameter's dtype.
    """
    transform = fo.chain(fo.Accumulate(4), fo.adamw(0.1))
    params, optimizer = _make(transform, torch.bfloat16)
    train(optimizer, params, range(6))
    saved = copy.deepcopy(optimizer.state_dict())
    other, again = _make(transform, torch.bfloat16)
    for name, param in other.items():
        param.data.copy_(params[name])
    again.load_state_dict(saved)
    sums = [state["Accumulate.sum"] for state in again.state.values()]
    assert {entry.dtype for entry in sums} == {torch.float32}
    assert any(not torch.equal(s, s.bfloat16().float()) for s in sums), "narrow anyway"
    assert_same(everything(optimizer, params), everything(again, other), "loaded")
    train(optimizer, params, range(6, 9))
    train(again, other, range(6, 9))
    assert_same(everything(optimizer, params), everything(again, other), "trained on")


@each_pair
@pytest.mark.parametrize("how", ["clear", "new dict", "one"])
def test_cleared_state_starts_again(pair: str, how: str) -> None:
    """Where state was removed a parameter goes on as if fresh, as with torch."""
    transform, kind, options = PAIRS[pair]
    params, optimizer = _make(transform)
    theirs = parameters()
    reference = kind(theirs.values(), lr=0.1, **options)
    train(optimizer, params, range(3))
    train(reference, theirs, range(3))
    for each, own in ((optimizer, params), (reference, theirs)):
        if how == "clear":
            each.state.clear()
        elif how == "new dict":
            each.state = type(each.state)(dict)
        else:
            each.state.pop(own["a.bias"], None)
    train(optimizer, params, range(3, 6))
    train(reference, theirs, range(3, 6))
    # A few roundings in each of 6 steps.
    assert_same(values(theirs), values(params), "weights", rtol=1e-13)
    if "step" in optimizer.state[params["scale"]]:
        left = optimizer.state[params["scale"]]["step"].item()
        assert left == (6 if how == "one" else 3)


def test_state_that_is_replaced_counts() -> None:
    """A tensor that a user puts into state[p] is where the next step starts."""
    params, optimizer = _make(fo.adamw(0.1))
    theirs = parameters()
    reference = torch.optim.AdamW(theirs.values(), 0.1)
    train(optimizer, params, range(2))
    train(reference, theirs, range(2))
    for each, own in ((optimizer, params), (reference, theirs)):
        state = each.state[own["a.weight"]]
        state["exp_avg"] = torch.full_like(state["exp_avg"], 0.5)
    train(optimizer, params, [2])
    train(reference, theirs, [2])
    # A few roundings in each of 3 steps.
    assert_same(values(theirs), values(params), "weights", rtol=1e-13)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("which", [["a.bias"], ["a.bias", "a.weight"], None])
def test_state_that_is_written_in_place_counts(
    key: str, which: list[str] | None
) -> None:
    """To zero a tensor of state[p] counts for that parameter, and for no other."""
    params, optimizer = _make(fo.adamw(0.1))
    theirs = parameters()
    reference = torch.optim.AdamW(theirs.values(), 0.1)
    train(optimizer, params, range(3))
    train(reference, theirs, range(3))
    for each, own in ((optimizer, params), (reference, theirs)):
        for name in which or own:
            each.state[own[name]][key].zero_()
    train(optimizer, params, range(3, 6))
    train(reference, theirs, range(3, 6))
    # A few roundings in each of 6 steps.
    assert_same(values(theirs), values(params), "weights", rtol=1e-13)
    for name in params if key == "step" else ():
        expected = reference.state[theirs[name]]["step"].item()
        assert optimizer.state[params[name]]["step"].item() == expected, name


def test_state_that_is_written_through_data_counts() -> None:
    """`.data` hides a write from version counters; it counts all the same."""
    params, optimizer = _make(fo.adamw(0.1))
    theirs = parameters()
    reference = torch.optim.AdamW(theirs.values(), 0.1)
    for each, own in ((optimizer, params), (reference, theirs)):
        train(each, own, range(3))
        each.state[own["a.bias"]]["exp_avg"].data.zero_()
        train(each, own, range(3, 6))
    # A few roundings in each of 6 steps.
    assert_same(values(theirs), values(params), "weights", rtol=1e-13)


@pytest.mark.parametrize("shape", [(7,), (1,), (4,)], ids=str)
def test_a_state_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """What does not fit is named, and nothing moves."""
    params, optimizer = _make(fo.adamw(0.1))
    train(optimizer, params, range(2))
    before = values(params)
    optimizer.state[params["a.weight"]]["exp_avg"] = torch.zeros(shape).double()
    set_gradients(params, 2)
    with pytest.raises(ValueError, match=r"'a\.weight': exp_avg must be a tensor of"):
        optimizer.step()
    assert_same(before, values(params), "weights")


def test_transform_state_is_the_state() -> None:
    """The state by name holds the very tensors of `optimizer.state`."""
    params, optimizer = _make(fo.adamw(0.1))
    train(optimizer, params, range(2))
    inner = optimizer.transform_state()[0]
    for name, param in params.items():
        assert inner.exp_avg[name] is optimizer.state[param]["exp_avg"]
    train(optimizer, params, range(2, 3))
    assert inner.step["scale"].item() == 3


@each_pair
def test_state_for_some_gradients(pair: str) -> None:
    """A parameter without a gradient keeps value and state, bit for bit."""
    params, optimizer = _make(PAIRS[pair][0])
    train(optimizer, params, range(2))
    before = everything(optimizer, params)
    set_gradients(params, 2)
    params["a.bias"].grad = None
    optimizer.step()
    after = everything(optimizer, params)
    assert torch.equal(before["params"]["a.bias"], after["params"]["a.bias"])
    own = before["state"].get("a.bias"), after["state"].get("a.bias")
    assert_same(*own, "without a gradient")
    assert not torch.equal(before["params"]["scale"], after["params"]["scale"])


def test_notes_of_a_user_in_the_state_stay() -> None:
    """Keys of a user's own in state[p] stay there, as with torch."""
    params, optimizer = _make(fo.adamw(0.1))
    optimizer.state[params["scale"]]["mine"] = torch.ones(1)
    train(optimizer, params, range(2))
    assert "mine" in optimizer.state[params["scale"]]

"""State belongs to the user: what is written, moved or removed counts at the next step.

Each recipe runs on torch's AdamW and on ours, and both must end alike.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_same
from torch.nn import Parameter
from training import parameters, set_gradients, train, values

import functional_optim as fo

WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "compile": {"compile": True},
}
each_way = pytest.mark.parametrize("way", WAYS)
MOMENTS = ("exp_avg", "exp_avg_sq")
CLIPPED = fo.chain(fo.ClipByGlobalNorm(1e3), fo.adamw(0.1))

Recipe = Callable[[Any, dict[str, Parameter]], None]


def both(way: str, recipe: Recipe, transform: fo.Transform = CLIPPED) -> Any:
    """Run a recipe between steps of torch's optimizer and of ours; they end alike."""
    ends: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for kind in ("theirs", "ours"):
        params = parameters()
        if kind == "theirs":
            optimizer: Any = torch.optim.AdamW(params.values(), 0.1)
        else:
            optimizer = fo.TransformOptimizer(params.values(), transform, **WAYS[way])
        train(optimizer, params, range(3))
        recipe(optimizer, params)
        train(optimizer, params, range(3, 6))
        found[kind] = optimizer
        ends[kind] = (
            values(params),
            {
                name: {
                    key: e.detach().double() for key, e in optimizer.state[p].items()
                }
                for name, p in params.items()
            },
        )
    # A few roundings in each of 6 steps, of numbers around 1.
    assert_same(ends["theirs"], ends["ours"], way, rtol=1e-13)
    return found["ours"]


def replaced(optimizer: Any, params: dict[str, Parameter], name: str, new: Any) -> None:
    """Put a parameter in the place of another, in the group and in the map."""
    group = optimizer.param_groups[0]["params"]
    index = next(i for i, p in enumerate(group) if p is params[name])
    group[index] = params[name] = new


def pruned(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Keep the first two rows of a parameter and of its state."""
    old = params["a.weight"]
    kept = optimizer.state[old]
    for key in MOMENTS:
        kept[key] = kept[key][:2]
    del optimizer.state[old]
    replaced(optimizer, params, "a.weight", Parameter(old.detach()[:2].clone()))
    optimizer.state[params["a.weight"]] = kept


def pruned_in_place(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Keep the first two rows in the same object of Python."""
    param = params["a.weight"]
    param.grad = None  # It has the old shape.
    param.data = param.data[:2].clone()
    for key in MOMENTS:
        optimizer.state[param][key] = optimizer.state[param][key][:2].clone()


def grown(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Add rows with a state of zeros."""
    old = params["a.weight"]
    kept = optimizer.state.pop(old)
    rows = torch.ones(2, 4, dtype=torch.float64)
    new = Parameter(torch.cat([old.detach(), rows]))
    for key in MOMENTS:
        kept[key] = torch.cat([kept[key], torch.zeros_like(rows)])
    replaced(optimizer, params, "a.weight", new)
    optimizer.state[new] = kept


def moved(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Give a parameter's state to one of the same shape."""
    old = params["a.weight"]
    replaced(optimizer, params, "a.weight", Parameter(old.detach().clone()))
    optimizer.state[params["a.weight"]] = optimizer.state.pop(old)


def all_moved(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Replace every parameter, as a new wrapper of the model does."""
    for name, old in list(params.items()):
        replaced(optimizer, params, name, Parameter(old.detach().clone()))
        optimizer.state[params[name]] = optimizer.state.pop(old)


def taken_from_another(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Give a parameter a state made of another's."""
    a, b = params["a.weight"], params["b.weight"]
    kept = {p: dict(optimizer.state[p]) for p in (a, b)}
    shape = kept[a]["exp_avg"].shape
    optimizer.state[a] = {
        k: e.repeat(2, 2)[: shape[0], : shape[1]].clone() if e.ndim else e.clone()
        for k, e in kept[b].items()
    }


def offloaded(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Send all of the state elsewhere and back: other memory, the same numbers."""
    for own in optimizer.state.values():
        for entry in own.values():
            entry.data = entry.data.clone()


def offloaded_by_assignment(optimizer: Any, params: dict[str, Parameter]) -> None:
    """The same, by assigning to the keys."""
    for own in optimizer.state.values():
        for key in own:
            own[key] = own[key].clone()


def halved(key: str, names: list[str]) -> Recipe:
    """Write half of an entry by `.data = ...`."""

    def recipe(optimizer: Any, params: dict[str, Parameter]) -> None:
        for name in names:
            entry = optimizer.state[params[name]][key]
            entry.data = entry.data / 2

    return recipe


def halved_and_kept(optimizer: Any, params: dict[str, Parameter]) -> None:
    """The same, while the memory of before is kept; a state dict sees it."""
    entry = optimizer.state[params["b.weight"]]["exp_avg"]
    optimizer.kept, entry.data = entry.data, entry.data / 2
    optimizer.state_dict()


def cleared_with_the_parameters(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Begin afresh, with parameters that lie elsewhere at the same time."""
    for param in params.values():
        param.data = param.data.clone() + 1
    optimizer.state.clear()


def written_with_the_parameter(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Replace a moment while the parameter moves."""
    param = params["a.bias"]
    param.data = param.data.clone()
    entry = optimizer.state[param]["exp_avg"]
    optimizer.state[param]["exp_avg"] = torch.full_like(entry, 0.5)


def cleared_before_a_new_group(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Begin afresh, and add a group before the next step."""
    optimizer.state.clear()
    params["new"] = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [params["new"]]})


def given_before_its_group(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Write the state of a parameter before it stands in a group."""
    params["new"] = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.state[params["new"]] = {
        "step": torch.tensor(4.0),
        "exp_avg": torch.full((3,), 0.5, dtype=torch.float64),
        "exp_avg_sq": torch.full((3,), 0.25, dtype=torch.float64),
    }
    optimizer.add_param_group({"params": [params["new"]]})


def turned(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Let a moment be another view of its memory; a state dict sees it."""
    param = params["square"] = Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer.add_param_group({"params": [param]})
    param.grad = torch.tensor([[1.0, 2.0], [-3.0, 4.0]]).double()
    train(optimizer, {k: p for k, p in params.items() if k != "square"}, [7])
    optimizer.state[param]["exp_avg"].t_()
    optimizer.state_dict()


def one_out_another_in(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Take a parameter out, and put a new one in; neither has a name."""
    group = optimizer.param_groups[0]["params"]
    group.pop(0)
    del params["a.weight"]
    params["new"] = Parameter(torch.ones(2, dtype=torch.float64))
    group.append(params["new"])


def one_out_and_a_group(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Take a parameter out, and add a group."""
    optimizer.param_groups[0]["params"].pop(0)
    del params["a.weight"]
    params["new"] = Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [params["new"]]})


def out_and_in_again(optimizer: Any, params: dict[str, Parameter]) -> None:
    """Take a parameter out of its group for two steps; its state waits."""
    group = optimizer.param_groups[0]["params"]
    param = group.pop()
    train(optimizer, params, range(10, 12))
    group.append(param)


RECIPES: dict[str, Recipe] = {
    "pruned": pruned,
    "pruned in place": pruned_in_place,
    "grown": grown,
    "moved": moved,
    "all moved": all_moved,
    "taken from another": taken_from_another,
    "offloaded": offloaded,
    "offloaded by assignment": offloaded_by_assignment,
    "count by data": lambda o, p: halved("step", ["a.bias"])(o, p),
    "every count by data": lambda o, p: halved("step", list(p))(o, p),
    "moment by data": lambda o, p: halved("exp_avg", ["a.bias"])(o, p),
    "last moment by data": lambda o, p: halved("exp_avg_sq", ["scale"])(o, p),
    "moment by data, saved": halved_and_kept,
    "moments by data": lambda o, p: halved("exp_avg", list(p))(o, p),
    "cleared with the parameters": cleared_with_the_parameters,
    "written with the parameter": written_with_the_parameter,
    "cleared before a new group": cleared_before_a_new_group,
    "given before its group": given_before_its_group,
    "out and in again": out_and_in_again,
    "turned": turned,
    "one out, another in": one_out_another_in,
    "one out, and a group": one_out_and_a_group,
}


@each_way
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_done_to_the_state_counts(way: str, recipe: str) -> None:
    """The next step starts from what stands in `optimizer.state`, as with torch."""
    both(way, RECIPES[recipe])


def test_state_is_moved_between_two_optimizers() -> None:
    """What one optimizer has, another goes on from."""
    ends = []
    for make in (
        lambda ps: torch.optim.AdamW(ps, 0.1),
        lambda ps: fo.TransformOptimizer(ps, fo.adamw(0.1)),
    ):
        params = parameters()
        first: Any = make(params.values())
        train(first, params, range(3))
        second: Any = make(params.values())
        for param, own in first.state.items():
            second.state[param] = own
        train(second, params, range(3, 6))
        ends.append(values(params))
    # A few roundings in each of 6 steps.
    assert_same(ends[0], ends[1], "weights", rtol=1e-13)


def test_an_open_window_goes_with_the_state() -> None:
    """A parameter that is replaced in an Accumulate window keeps its sum."""
    param = Parameter(torch.zeros(1))
    optimizer = fo.TransformOptimizer([param], fo.chain(fo.Accumulate(3), fo.sgd(1.0)))
    for number in (3.0, 6.0):
        param.grad = torch.tensor([number])
        optimizer.step()
    new = Parameter(torch.zeros(1))
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = optimizer.state.pop(param)
    new.grad = torch.tensor([9.0])
    optimizer.step()
    assert new.item() == -6.0


def test_a_parameter_that_begins_afresh_leaves_the_open_window() -> None:
    """Without state it has no sum either, and is not updated when the window ends."""
    a, b = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    transform = fo.chain(fo.Accumulate(2), fo.adamw(0.1))
    optimizer = fo.TransformOptimizer([a, b], transform)
    a.grad = b.grad = torch.ones(1)
    optimizer.step()
    del optimizer.state[a]
    a.grad = None
    optimizer.step()
    assert (a.item(), optimizer.state[a]["step"].item()) == (0.0, 0.0)
    assert b.item() == pytest.approx(-0.1)


@each_way
def test_two_parameters_exchange_their_entries(way: str) -> None:
    """Each has what the other had, though both are written."""
    a, b = (Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    optimizer: Any = fo.TransformOptimizer([a, b], fo.adamw(0.1), **WAYS[way])
    a.grad, b.grad = torch.full_like(a, 1.0), torch.full_like(b, 2.0)
    optimizer.step()
    had = [optimizer.state[p]["exp_avg"].clone() for p in (a, b)]
    one, two = (optimizer.state[p]["exp_avg"] for p in (a, b))
    optimizer.state[a]["exp_avg"], optimizer.state[b]["exp_avg"] = two, one
    optimizer.state_dict()
    now = [optimizer.state[p]["exp_avg"] for p in (a, b)]
    assert_same(had[::-1], now, "exchanged")


def test_known_parameters_keep_their_names() -> None:
    """Whoever reorders a group by hand, or puts one in, changes no name of another."""
    weight, bias, new = (Parameter(torch.ones(2)) for _ in range(3))
    transform = fo.adamw(0.0, weight_decay=1.0, mask=fo.exclude("bias"))
    optimizer = fo.TransformOptimizer([("weight", weight), ("bias", bias)], transform)
    optimizer.param_groups[0]["params"].reverse()
    optimizer.param_groups[0]["lr"] = 0.5
    weight.grad, bias.grad = torch.zeros(2), torch.zeros(2)
    optimizer.step()
    assert (weight[0].item(), bias[0].item()) == (0.5, 1.0)
    optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[0]["params"].append(new)
    with pytest.raises(ValueError, match="new parameter at position 1, and no name"):
        optimizer.step()


def test_a_group_without_parameters_does_nothing() -> None:
    """Groups that are emptied by hand step, save and load, as with torch."""
    param = Parameter(torch.zeros(2))
    optimizer = fo.TransformOptimizer([param], CLIPPED)
    optimizer.param_groups[0]["params"] = []
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a grad"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_state_dict_has_the_true_state_of_the_whole() -> None:
    """What is assigned to the copy in a group is not what a resumed run begins with."""
    param = Parameter(torch.zeros(1))
    optimizer = fo.TransformOptimizer([param], fo.SkipNonfinite(fo.sgd(1.0)))
    shown = optimizer.param_groups[0]["transform_state"]
    shown["SkipNonfinite.skipped"] = torch.tensor(7.0, dtype=torch.float64)
    param.grad = torch.full((1,), float("nan"))
    optimizer.step()
    saved = optimizer.state_dict()["param_groups"][0]["transform_state"]
    assert saved["SkipNonfinite.skipped"] == optimizer.readings()["skipped"] == 1


# -- what a user keeps there -----------------------------------------------------------


def _with_notes() -> Any:
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), fo.adamw(0.1))
    train(optimizer, params, range(2))
    optimizer.state[params["scale"]]["slow"] = torch.ones(())
    optimizer.state["count"] = 5
    train(optimizer, params, range(2, 4))
    return params, optimizer


@pytest.mark.parametrize("how", ["step", "deepcopy", "pickle"])
def test_notes_in_the_state_stay(how: str) -> None:
    """Keys of a user's own in state[p], and values that are no dicts, are kept."""
    _, optimizer = _with_notes()
    if how == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
    elif how == "pickle":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    last = optimizer.param_groups[0]["params"][-1]
    assert optimizer.state["count"] == 5
    assert sorted(optimizer.state[last]) == ["exp_avg", "exp_avg_sq", "slow", "step"]
    saved = optimizer.state_dict()["state"]
    assert saved["count"] == 5
    assert saved[3]["slow"] == 1.0
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["count"] == 5
    assert "slow" in optimizer.state[last]


def test_notes_are_copied_as_python_does() -> None:
    """A leaf stays one, what is shared is shared again, and a list is of its moment."""
    param, buffer = Parameter(torch.ones(2)), torch.ones(2)
    optimizer: Any = fo.TransformOptimizer([param], fo.adamw(0.1))
    own = optimizer.state[param]
    own["slow"] = torch.ones(2, requires_grad=True)
    own["buffer"], own["history"] = buffer, [torch.zeros(1)]
    twin, its_param, its_buffer = copy.deepcopy((optimizer, param, buffer))
    assert twin.state[its_param]["buffer"] is its_buffer
    assert twin.state[its_param]["slow"].requires_grad
    saved = optimizer.state_dict()["state"][0]
    own["history"].append(5)
    own["slow"].data.zero_()
    assert saved["history"] == [0.0]
    assert saved["slow"].tolist() == [1.0, 1.0]


def test_notes_beside_parameters_are_loaded() -> None:
    """A key of a user's own beside the parameters comes back from a state dict."""
    _, optimizer = _with_notes()
    saved = optimizer.state_dict()
    del saved["state"][3]["slow"]
    again = fo.TransformOptimizer(parameters().items(), fo.adamw(0.1))
    again.load_state_dict(saved)
    assert again.state["count"] == 5


# -- a state dict ----------------------------------------------------------------------


@each_way
def test_a_state_dict_is_of_one_moment(way: str) -> None:
    """Later steps do not change what was returned: the window goes on from there."""
    param = Parameter(torch.zeros(1))
    transform = fo.chain(fo.Accumulate(3), fo.sgd(1.0))
    optimizer = fo.TransformOptimizer([param], transform, **WAYS[way])

    def push(*numbers: float) -> None:
        for number in numbers:
            param.grad = torch.tensor([number])
            optimizer.step()

    push(3.0)
    saved = optimizer.state_dict()
    push(60.0, 60.0, 60.0)
    param.data.zero_()
    optimizer.load_state_dict(saved)
    push(3.0, 3.0)
    assert param.item() == -3.0


@each_way
def test_entries_are_copied_one_by_one(way: str) -> None:
    """A copy, a pickle and the memory of an entry are as large as the entry."""
    params = [Parameter(torch.zeros(64)) for _ in range(50)]
    optimizer = fo.TransformOptimizer(params, fo.adamw(0.1), **WAYS[way])
    for param in params:
        param.grad = torch.ones(64)
    optimizer.step()
    for own in optimizer.state_dict()["state"].values():
        for entry in own.values():
            assert entry.untyped_storage().nbytes() == entry.nbytes
            assert type(entry) is torch.Tensor
    for own in optimizer.state.values():
        kept = copy.deepcopy(own)
        for key, entry in own.items():
            assert kept[key].untyped_storage().nbytes() == entry.nbytes
            assert torch.equal(kept[key], entry)
            assert repr(entry).startswith("tensor(")
            assert len(pickle.dumps(entry)) < 1000
            buffer = io.BytesIO()
            torch.save(entry, buffer)
            assert len(buffer.getvalue()) < 2500
            buffer.seek(0)
            assert torch.equal(torch.load(buffer, weights_only=True), entry)
            twice = copy.deepcopy([entry, entry])
            assert twice[0] is twice[1]


def test_names_are_taken_from_a_state_dict() -> None:
    """An optimizer without names has those of what it loaded, for the next one."""
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), fo.adamw(0.1))
    again = fo.TransformOptimizer(parameters().values(), fo.adamw(0.1))
    again.load_state_dict(optimizer.state_dict())
    assert again.state_dict()["param_groups"][0]["param_names"] == list(params)
    third = fo.TransformOptimizer(parameters().items(), fo.adamw(0.1))
    third.load_state_dict(again.state_dict())
    with pytest.raises(ValueError, match=r"'a\.weight' .* where '0' stands"):
        fo.TransformOptimizer(
            [(str(i), p) for i, p in enumerate(parameters().values())], fo.adamw(0.1)
        ).load_state_dict(again.state_dict())


def test_torch_swaps_parameters_and_state_for_a_while() -> None:
    """Inside the context the given state counts, after it that of before."""
    stateless = pytest.importorskip("torch.optim._stateless")
    ends = []
    for make in (
        lambda ps: torch.optim.SGD(ps, 1.0, momentum=0.9),
        lambda ps: fo.TransformOptimizer(ps, fo.sgd(1.0, 0.9)),
    ):
        param, other = Parameter(torch.zeros(2)), torch.zeros(2, requires_grad=True)
        optimizer: Any = make([param])

        def push(*params: Any, optimizer: Any = optimizer) -> None:
            for p in params:
                p.grad = torch.ones(2)
            optimizer.step()

        push(param)
        push(param)
        given = copy.deepcopy(optimizer.state_dict())
        given["state"][0]["momentum_buffer"] = torch.full((2,), 10.0)
        swap = stateless.swap_in_optimizer_params_and_state
        with swap(optimizer, {"w": other}, given):
            push(other)
        push(param)
        ends.append([param.detach(), other.detach(), optimizer.state[param]])
    for theirs, ours in zip(*ends, strict=True):
        assert_same(theirs, ours, "after the swap")


# -- bad input -------------------------------------------------------------------------


def _refused(optimizer: Any, params: Any, message: str) -> None:
    before = values(params)
    set_gradients(params, 3)
    for _ in range(2):  # It is seen again, until it is mended.
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert_same(before, values(params), "weights")


@each_way
@pytest.mark.parametrize("fresh", [False, True], ids=["same", "new parameter"])
def test_state_that_was_half_moved_is_named(way: str, fresh: bool) -> None:
    """Some entries without the others name the parameter and the remedy."""
    params = parameters()
    optimizer: Any = fo.TransformOptimizer(params.items(), CLIPPED, **WAYS[way])
    train(optimizer, params, range(3))
    old = params["a.bias"]
    if fresh:
        replaced(optimizer, params, "a.bias", Parameter(old.detach().clone()))
    kept = optimizer.state.pop(old)
    last = kept.pop("exp_avg_sq")
    optimizer.state[params["a.bias"]] = kept
    _refused(optimizer, params, r"'a\.bias' has .*step.* lacks \['exp_avg_sq'\]; move")
    optimizer.state[params["a.bias"]]["exp_avg_sq"] = last
    optimizer.step()
    assert optimizer.state[params["a.bias"]]["step"].item() == 4


@each_way
@pytest.mark.parametrize(
    "write",
    [
        lambda own: own.update(exp_avg=torch.zeros(7)),
        lambda own: own.update(exp_avg="x"),
        lambda own: setattr(own["exp_avg"], "data", torch.zeros(7).double()),
    ],
    ids=["shape", "text", "data"],
)
def test_state_of_another_shape_is_named(way: str, write: Any) -> None:
    """An entry that does not fit its parameter names both, and nothing moves."""
    params = parameters()
    optimizer: Any = fo.TransformOptimizer(params.items(), CLIPPED, **WAYS[way])
    train(optimizer, params, range(3))
    write(optimizer.state[params["a.bias"]])
    _refused(optimizer, params, r"'a\.bias': exp_avg must be a tensor of shape \(3,\)")
    del optimizer.state[params["a.bias"]]
    optimizer.step()
    assert optimizer.state[params["a.bias"]]["step"].item() == 1


def test_state_that_is_no_dict_is_named() -> None:
    """What stands in the place of a parameter's dict is refused."""
    params = parameters()
    optimizer: Any = fo.TransformOptimizer(params.items(), fo.adamw(0.1))
    optimizer.state[params["a.bias"]] = 3
    _refused(optimizer, params, r"state of 'a\.bias' must be a dict, got 3")

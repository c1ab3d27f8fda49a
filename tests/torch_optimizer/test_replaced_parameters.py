"""Parameters whose memory somebody replaced after the optimizer was made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import assert_same
from training import everything, parameters, set_gradients, train, values

import functional_optim as fo

CLIPPED = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(0.1))
TRANSFORMS = {
    "adamw": fo.adamw(0.1),
    "clipped": CLIPPED,
    "momentum": fo.sgd(0.1, 0.9),
    "sgd": fo.sgd(0.1),
    "window": fo.chain(fo.Accumulate(3), fo.adamw(0.1)),
}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)


def _expected(name: str) -> Any:
    """Return what five steps without any change end with."""
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), TRANSFORMS[name])
    train(optimizer, params, range(5))
    return everything(optimizer, params)


def _clone(param: torch.nn.Parameter) -> None:
    param.data = param.data.clone()


def _empty_then_full(param: torch.nn.Parameter) -> None:
    saved = param.data
    param.data = torch.empty(0, dtype=param.dtype)
    param.data = saved.clone()


def _set(param: torch.nn.Parameter) -> None:
    with torch.no_grad():
        param.set_(param.detach().clone())


def _transposed(param: torch.nn.Parameter) -> None:
    if param.ndim == 2:
        param.data = param.data.t().contiguous().t()


def _transposed_in_place(param: torch.nn.Parameter) -> None:
    """Lay the same memory out otherwise: its address stays."""
    if param.ndim == 2:
        saved = param.data.clone()
        memory = param.data.view(-1)
        rows, columns = saved.shape
        other = memory.as_strided((rows, columns), (1, rows))
        other.copy_(saved)
        param.data = other


@each_transform
@pytest.mark.parametrize(
    "replace", [_clone, _empty_then_full, _set, _transposed], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("which", ["one", "all"])
def test_new_memory_goes_on_with_the_old_state(
    name: str, replace: Any, which: str
) -> None:
    """`p.data = ...` and its like count: the new memory is moved, state stays."""
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), TRANSFORMS[name])
    train(optimizer, params, range(2))
    for own, param in params.items():
        if which == "all" or own == "a.weight":
            replace(param)
    train(optimizer, params, range(2, 5))
    # Another layout is summed in another order: a rounding of the norm.
    close = 1e-14 if replace is _transposed else None
    assert_same(_expected(name), everything(optimizer, params), "after", rtol=close)


@each_transform
def test_another_layout_of_the_same_memory(name: str) -> None:
    """The same address with other strides is noticed, too."""
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), TRANSFORMS[name])
    train(optimizer, params, range(2))
    for param in params.values():
        _transposed_in_place(param)
    train(optimizer, params, range(2, 5))
    # Another layout is summed in another order: a rounding of the norm.
    after = everything(optimizer, params)
    assert_same(_expected(name), after, "after", rtol=1e-14)


@pytest.fixture(params=[False, True], ids=["set data", "swap tensors"])
def swapping(request: Any) -> Any:
    """Convert modules in both of torch's ways."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_to_dtype(name: str, dtype: torch.dtype) -> None:
    """After model.to(dtype) narrow weights go on, and the state stays as wide."""
    ends = []
    for kind in (torch.float64, dtype):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3, dtype=torch.float64)
        params: Any = dict(model.named_parameters())
        optimizer = fo.TransformOptimizer(params.items(), TRANSFORMS[name])
        train(optimizer, params, range(2))
        optimizer.zero_grad()
        model.to(kind)
        assert {param.dtype for param in model.parameters()} == {kind}
        train(optimizer, dict(model.named_parameters()), [2])
        ends.append(values(dict(model.named_parameters())))
        moments = [e for s in optimizer.state.values() for e in s.values()]
        assert {entry.dtype for entry in moments} <= {torch.float64}
    # Weights are rounded twice, gradients once; Adam's u of a gradient near 0 less so.
    close = 8 * torch.finfo(dtype).eps
    assert_same(ends[0], {n: p.double() for n, p in ends[1].items()}, "weights", close)


def test_a_swap_of_dtype_before_the_first_step_is_as_if_built_so() -> None:
    """model.float() between construction and the first step trains like a float one."""
    ends = []
    for late in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3, dtype=torch.float64)
        if not late:
            model.float()
        optimizer = fo.TransformOptimizer(model.named_parameters(), fo.adamw(0.1))
        if late:
            model.float()
        params: Any = dict(model.named_parameters())
        train(optimizer, params, range(4))
        ends.append(values(params))
    # float64 moments there: one rounding of 6e-8 in each of 4 steps.
    assert_same(ends[0], ends[1], "weights", rtol=1e-6)


def test_replaced_parameters_are_told() -> None:
    """load_state_dict(assign=True) makes new parameters: the first step says so."""
    model = torch.nn.Linear(4, 3, dtype=torch.float64)
    optimizer = fo.TransformOptimizer(model.named_parameters(), fo.adamw(0.1))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    params: Any = dict(model.named_parameters())
    before = values(params)
    set_gradients(params, 0)
    with pytest.warns(UserWarning, match=r"load_state_dict\(assign=True\)"):
        optimizer.step()
    assert_same(before, values(params), "weights")


def test_a_parameter_that_became_smaller_is_named() -> None:
    """Another shape than that of the state is an error with the name; nothing moves."""
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), fo.adamw(0.1))
    train(optimizer, params, range(2))
    params["a.bias"].data = torch.ones(2, dtype=torch.float64)
    set_gradients(params, 2)
    before = values(params)
    with pytest.raises(ValueError, match=r"'a\.bias'"):
        optimizer.step()
    assert_same(before, values(params), "after the error")


def test_two_parameters_that_became_one_are_named() -> None:
    """Memory that is shared later is refused as at construction."""
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), fo.adamw(0.1))
    train(optimizer, params, range(2))
    params["a.bias"].data = params["a.weight"].data.view(-1)[:3]
    set_gradients(params, 2)
    before = values(params)
    with pytest.raises(ValueError, match="'a.*' and 'a.*' lie in the same memory"):
        optimizer.step()
    assert_same(before, values(params), "after the error")


def test_memory_is_found_again_after_a_visit_elsewhere() -> None:
    """swap to `.data` of an average and back (as EMA does) changes nothing."""
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), CLIPPED)
    train(optimizer, params, range(2))
    own = {name: param.data for name, param in params.items()}
    for param in params.values():
        param.data = torch.zeros_like(param)
    optimizer.state_dict()
    for name, param in params.items():
        param.data = own[name]
    train(optimizer, params, range(2, 5))
    assert_same(_expected("clipped"), everything(optimizer, params), "after")


@pytest.mark.parametrize("how", ["replace", "append", "take out", "assign groups"])
def test_parameters_written_into_groups_count(how: str) -> None:
    """What stands in the groups is updated, as with torch: new ones begin afresh."""
    ends = []
    for kind in ("theirs", "ours"):
        params = parameters()
        if kind == "ours":
            optimizer: Any = fo.TransformOptimizer(params.values(), fo.adamw(0.1))
        else:
            optimizer = torch.optim.AdamW(params.values(), 0.1)
        train(optimizer, params, range(2))
        new = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
        group = optimizer.param_groups[0]
        if how == "replace":
            group["params"][0] = params["a.weight"] = new
        elif how == "append":
            group["params"].append(new)
            params["new"] = new
        elif how == "take out":
            del group["params"][0], params["a.weight"]
        else:
            own = {k: v for k, v in group.items() if k != "params"}
            optimizer.param_groups = [group, {**own, "params": [new], "lr": 0.3}]
            params["new"] = new
        train(optimizer, params, range(2, 5))
        if kind == "ours":  # torch keeps the state of what is gone, and fails here.
            assert len(optimizer.state_dict()["state"]) == len(params)
        ends.append(values(params))
    # Five steps of roundings of 1e-16, of numbers around 1.
    assert_same(ends[0], ends[1], "weights", rtol=1e-14)


def test_groups_of_parameters_that_do_not_fit_are_refused() -> None:
    """Two labels in one group, or one parameter twice: an error, nothing changes."""
    labels = {"*.bias": "slow", "*": "fast"}
    both = fo.Partition({"slow": fo.sgd(0.1), "fast": fo.adamw(0.1)}, labels)
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), both)
    kept = [list(group["params"]) for group in optimizer.param_groups]
    everyone = [p for some in kept for p in some]
    for wrong, message in [
        (everyone, "add_param_group"),
        (kept[0] * 2, "comes twice"),
    ]:
        first = optimizer.param_groups[0]
        first["params"], names = wrong, first.pop("param_names")
        set_gradients(params, 0)
        before = values(params)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert_same(before, values(params), "after the error")
        first["params"], first["param_names"] = kept[0], names
    train(optimizer, params, range(2))

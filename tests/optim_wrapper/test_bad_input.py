"""Mistakes with wrappers: refused with key, value and remedy; nothing changes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import functional_optim as fo


def _optimizer(size: int = 2, groups: int = 1) -> torch.optim.Optimizer:
    layers = [nn.Linear(size, 1) for _ in range(groups)]
    given = [{"params": list(layer.parameters())} for layer in layers]
    return torch.optim.Adam(given, lr=0.1)


def _pushed(wrapper: fo.OptimWrapper) -> fo.OptimWrapper:
    """Take a step."""
    loss = sum(p.square().sum() for p in wrapper._parameters())
    wrapper.update_params(loss)
    return wrapper


@pytest.mark.parametrize(
    ("clip_grad", "told"),
    [
        ({}, "an empty one"),
        ([], r"\[\]"),
        (1.0, "1.0"),
        ({"type": "norm"}, "max_norm"),
        ({"type": "value"}, "clip_value"),
        ({"type": "inf", "max_norm": 1.0}, "'inf'"),
        ({"max_norm": 1.0, "norm": 2}, "'norm'"),
        ({"clip_value": 1.0}, "type='value'"),
        ({"type": "value", "max_norm": 1.0}, "type='norm'"),
        ({"max_norm": "1"}, "max_norm"),
        ({"max_norm": 0}, "max_norm"),
        ({"max_norm": -1.0}, "max_norm"),
        ({"max_norm": math.nan}, "max_norm"),
        ({"max_norm": True}, "max_norm"),
        ({"max_norm": 1.0, "norm_type": "two"}, "'two'"),
        ({"max_norm": 1.0, "norm_type": 0}, "norm_type"),
        ({"max_norm": 1.0, "error_if_nonfinite": 1}, "error_if_nonfinite"),
        ({"type": "value", "clip_value": -1.0}, "clip_value"),
        ({"type": "value", "clip_value": {}}, "clip_value"),
        ({"max_norm": abs}, "max_norm"),
        ({"type": ["norm"], "max_norm": 1.0}, "type"),
    ],
    ids=str,
)
def test_clip_grad_is_checked(clip_grad: Any, told: str) -> None:
    kept = copy.deepcopy(clip_grad)
    with pytest.raises(AssertionError, match="If `clip_grad` is not None") as caught:
        fo.OptimWrapper(_optimizer(), clip_grad=clip_grad)
    assert isinstance(caught.value, (ValueError, TypeError))
    assert told.replace("\\", "") in str(caught.value)
    assert repr(clip_grad) == repr(kept)


@pytest.mark.parametrize("counts", [0, -1, 1.5, 2.0, True, "2", None])
def test_counts_are_whole_and_positive(counts: Any) -> None:
    with pytest.raises(AssertionError, match="accumulative_counts") as caught:
        fo.OptimWrapper(_optimizer(), accumulative_counts=counts)
    assert isinstance(caught.value, (ValueError, TypeError))


@pytest.mark.parametrize(("first", "last"), [(-1, 5), (0, -2), (0.0, 5), (0, 5.5)])
def test_counts_of_training_are_checked(first: Any, last: Any) -> None:
    wrapper = fo.OptimWrapper(_optimizer())
    with pytest.raises(AssertionError, match="_counts must"):
        wrapper.initialize_count_status(nn.Linear(1, 1), first, last)
    assert wrapper.inner_count == 0


@pytest.mark.parametrize("optimizer", [None, nn.Linear(1, 1), {"type": "SGD"}])
def test_optimizer_must_be_one(optimizer: Any) -> None:
    with pytest.raises(TypeError, match="optimizer must be"):
        fo.OptimWrapper(optimizer)


def test_a_transform_is_no_optimizer_yet() -> None:
    remedy = r"write TransformOptimizer\(model.named_parameters\(\), chain\(Scale"
    for kind in (fo.OptimWrapper, fo.AmpOptimWrapper):
        with pytest.raises(TypeError, match=f"optimizer must be .* {remedy}"):
            kind(optimizer=fo.sgd(0.1))


@pytest.mark.parametrize("kind", [fo.OptimWrapper, fo.AmpOptimWrapper])
def test_loss_is_one_number(kind: Any) -> None:
    wrapper = kind(optimizer=_optimizer())
    (weight, _) = wrapper._parameters()
    with pytest.raises(ValueError, match=r"got shape \(1, 2\).*loss.mean"):
        wrapper.update_params(weight * 2)
    with pytest.raises(TypeError, match="must be a tensor, got a dict"):
        wrapper.update_params({"loss": weight.sum()})
    assert wrapper.inner_count == 0
    wrapper.backward(weight * 2, gradient=torch.ones(1, 2))
    assert torch.equal(weight.grad / wrapper_scale(wrapper), torch.full((1, 2), 2.0))


def wrapper_scale(wrapper: Any) -> float:
    """Return what losses are multiplied by."""
    scaler = getattr(wrapper, "loss_scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


@pytest.mark.parametrize(
    ("loss_scale", "told"),
    [
        ("static", "'static'"),
        (None, "None"),
        (True, "True"),
        ([1.0], r"[1.0]"),
        (0.0, "> 0"),
        (-2, "> 0"),
        (math.inf, "finite"),
        ({"scale": 2.0}, "'scale'"),
        ({"init_scale": 0}, "init_scale"),
        ({"growth_factor": 1.0}, "growth_factor"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval"),
        ({"growth_interval": 1.5}, "growth_interval"),
        ({"init_scale": "2"}, "init_scale"),
        ({"enabled": 1}, "enabled"),
    ],
    ids=str,
)
def test_loss_scale_is_checked(loss_scale: Any, told: str) -> None:
    with pytest.raises(AssertionError, match="loss_scale") as caught:
        fo.AmpOptimWrapper(loss_scale, optimizer=_optimizer())
    assert isinstance(caught.value, (ValueError, TypeError))
    assert told in str(caught.value)


@pytest.mark.parametrize("dtype", ["half", "int8", 16, torch.Tensor])
def test_dtype_is_checked(dtype: Any) -> None:
    with pytest.raises(AssertionError, match="dtype must be"):
        fo.AmpOptimWrapper(dtype=dtype, optimizer=_optimizer())


def test_transform_and_clip_stand_in_one_place() -> None:
    with pytest.raises(ValueError, match=r"same place.*chain\("):
        fo.OptimWrapper(
            _optimizer(), clip_grad={"max_norm": 1.0}, transform=fo.Scale(1.0)
        )


@pytest.mark.parametrize(
    ("transform", "told"),
    [
        (fo.Accumulate(2), "accumulative_counts"),
        (fo.chain(fo.Centralize(), fo.Accumulate(2)), "accumulative_counts"),
        (fo.Named("x", fo.chain(fo.Unscale(2.0))), "AmpOptimWrapper"),
    ],
    ids=str,
)
def test_the_wrapper_owns_windows_and_scale(transform: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fo.OptimWrapper(_optimizer(), transform=transform)


def test_transform_must_be_one() -> None:
    with pytest.raises(TypeError, match="write Scale"):
        fo.OptimWrapper(_optimizer(), transform=fo.Scale)


class _Holds:
    """Returns nothing, as a window would."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params: fo.TensorMap) -> tuple[()]:
        return ()

    def update(
        self,
        updates: fo.TensorMap,
        state: tuple[()],
        params: fo.TensorMap,
        *,
        context: fo.Context,
    ) -> tuple[fo.TensorMap, tuple[()]]:
        return {}, ()


def test_transform_must_return_all_gradients() -> None:
    wrapper = fo.OptimWrapper(_optimizer(), transform=_Holds())
    before = [p.detach().clone() for p in wrapper._parameters()]
    with pytest.raises(ValueError, match=r"returned no update for \['0', '1'\]"):
        _pushed(wrapper)
    for param, kept in zip(wrapper._parameters(), before, strict=True):
        assert torch.equal(param, kept)


def test_sparse_gradients_are_named() -> None:
    embedding = nn.Embedding(3, 2, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    wrapper = fo.OptimWrapper(optimizer, clip_grad={"max_norm": 1.0})
    with pytest.raises(TypeError, match=r"'0' is sparse.*sparse=False"):
        wrapper.update_params(embedding(torch.tensor([1])).sum())


def test_nonfinite_norm_raises_if_asked_and_leaves_gradients() -> None:
    clip = {"max_norm": 1.0, "error_if_nonfinite": True}
    wrapper = fo.OptimWrapper(_optimizer(), clip_grad=clip)
    (weight, _) = wrapper._parameters()
    with pytest.raises(RuntimeError, match="is nan"):
        wrapper.update_params(weight.sum() * math.nan)
    assert weight.grad.isnan().all()


# -- state dicts -----------------------------------------------------------------------


def _snapshot(wrapper: fo.OptimWrapper) -> str:
    params = [p.tolist() for p in wrapper._parameters()]
    grads = [None if p.grad is None else p.grad.tolist() for p in wrapper._parameters()]
    return repr((wrapper.state_dict(), params, grads))


def _spoilt(state: dict[str, Any], place: list[Any], value: Any) -> dict[str, Any]:
    spoilt = copy.deepcopy(state)
    inner = spoilt
    for key in place[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return spoilt


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (["param_groups"], KeyError, "a dict and a list, got {'state': 'dict'}"),
        (["state"], KeyError, "a dict and a list, got {'param_groups': 'list'}"),
        (["param_groups"], 3, "got {'state': 'dict', 'param_groups': 'int'}"),
        (["param_groups"], [], "has 0 groups, the optimizer 2; build it with the"),
        (["param_groups", 0, "params"], [0], "1 parameters"),
        (["state", 0, "exp_avg"], torch.zeros(5), "'exp_avg' of parameter 0"),
        (["base_param_settings"], 3, "base_param_settings"),
        (["accumulation"], 3, "accumulation"),
        (["accumulation"], {"inner_count": 1}, "max_counts"),
        (["accumulation", "inner_count"], 1.5, "inner_count"),
        (["accumulation", "gradients"], {9: torch.zeros(1)}, "parameter 9"),
        (["accumulation", "gradients"], {0: torch.zeros(7)}, "another model"),
        (["accumulation", "gradients"], {0: 1.0}, "gradients"),
        (["accumulation", "gradients"], [1.0], "gradients"),
        (["accumulation", "zeros"], 1.0, "zeros"),
        (["transform", "state"], 3, "state"),
        (["loss_scaler"], {"scale": 2.0}, "lacks"),
        (["loss_scaler"], 3, "loss_scaler"),
        (["loss_scaler", "scale"], "2", "scale"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_changes_nothing(
    place: list[Any], value: Any, told: str
) -> None:
    def new() -> fo.AmpOptimWrapper:
        torch.manual_seed(0)
        return fo.AmpOptimWrapper(
            {"init_scale": 4.0},
            optimizer=_optimizer(groups=2),
            accumulative_counts=2,
            transform=fo.chain(fo.ClipByGlobalNorm(1.0)),
        )

    source = new()
    for _ in range(3):
        _pushed(source)
    state = source.state_dict()
    wrapper = _pushed(new())
    spoilt = _spoilt(state, place, value)
    kept, before = repr(spoilt), _snapshot(wrapper)
    with pytest.raises((ValueError, TypeError)) as caught:
        wrapper.load_state_dict(spoilt)
    assert told in str(caught.value)
    assert repr(spoilt) == kept
    assert _snapshot(wrapper) == before
    wrapper.load_state_dict(state)
    assert repr(wrapper.state_dict()) == repr(state)


def test_a_state_with_a_transform_needs_one() -> None:
    with_one = fo.OptimWrapper(_optimizer(), transform=fo.Scale(1.0))
    state = _pushed(with_one).state_dict()
    with pytest.raises(ValueError, match=r"build it with the same transform="):
        fo.OptimWrapper(_optimizer()).load_state_dict(state)


@pytest.mark.parametrize("state", [None, [], 3])
def test_a_state_is_a_dict(state: Any) -> None:
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        fo.OptimWrapper(_optimizer()).load_state_dict(state)


# -- dicts of wrappers -----------------------------------------------------------------


def test_a_dict_takes_wrappers_only() -> None:
    """The message begins with the words that MMEngine's users match."""
    words = "^`OptimWrapperDict` only accept OptimWrapper instance, but got gen: "
    with pytest.raises(TypeError, match=words + r"torch\.optim\.adam\.Adam; wrap an"):
        fo.OptimWrapperDict(gen=_optimizer())


def test_a_dict_knows_its_names() -> None:
    wrappers = fo.OptimWrapperDict(gen=fo.OptimWrapper(_optimizer()))
    for error in (KeyError, AssertionError):
        with pytest.raises(error, match="Cannot find 'disc'.*gen"):
            wrappers["disc"]
    with pytest.raises(ValueError, match="'disc', the wrappers are gen"):
        wrappers.load_state_dict({"disc": {}})


CALLS: dict[str, Any] = {
    "update_params": lambda w: w.update_params(torch.ones(())),
    "backward": lambda w: w.backward(torch.ones(())),
    "step": lambda w: w.step(),
    "optim_context": lambda w: w.optim_context(nn.Linear(1, 1)).__enter__(),
    "scale_loss": lambda w: w.scale_loss(torch.ones(())),
    "should_update": lambda w: w.should_update(),
    "inner_count": lambda w: w.inner_count,
}


@pytest.mark.parametrize("method", CALLS)
def test_a_dict_tells_to_use_each_wrapper(method: str) -> None:
    wrappers = fo.OptimWrapperDict(gen=fo.OptimWrapper(_optimizer()))
    with pytest.raises(NotImplementedError, match=rf"wrappers\['gen'\].{method}"):
        CALLS[method](wrappers)


def test_a_dict_loads_all_or_nothing() -> None:
    def new() -> fo.OptimWrapperDict:
        torch.manual_seed(0)
        return fo.OptimWrapperDict(
            a=fo.OptimWrapper(_optimizer()),
            b=fo.OptimWrapper(
                fo.TransformOptimizer(
                    _optimizer().param_groups[0]["params"], fo.adam(0.1)
                )
            ),
        )

    source = new()
    for wrapper in source.values():
        _pushed(_pushed(wrapper))
    state = source.state_dict()
    target = new()
    for wrapper in target.values():
        _pushed(wrapper)
    before = {name: _snapshot(wrapper) for name, wrapper in target.items()}
    for name in ("a", "b"):
        spoilt = _spoilt(state, [name, "param_groups"], [])
        with pytest.raises(ValueError, match="group"):
            target.load_state_dict(spoilt)
        assert {n: _snapshot(w) for n, w in target.items()} == before

"""What reviews found in wrappers, each as its smallest case."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_optim as fo


def _param(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def _sgd(*params: nn.Parameter, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=lr)


class _Rule:
    """A transform from two functions."""

    scope = fo.Scope.ELEMENTWISE

    def __init__(self, update: Any, init: Any = lambda params: ()) -> None:
        self._update, self.init = update, init

    def update(
        self,
        updates: fo.TensorMap,
        state: Any,
        params: fo.TensorMap,
        *,
        context: fo.Context,
    ) -> Any:
        return self._update(updates, state, params)


# -- what stands between backward and step ---------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_that_change_places(size: int) -> None:
    params = [_param(0.0) for _ in range(size)]
    turned = _Rule(
        lambda u, s, p: ({str(i): u[str((i + 1) % size)] for i in range(size)}, s)
    )
    for index, param in enumerate(params):
        param.grad = torch.tensor([float(index)])
    fo.OptimWrapper(_sgd(*params), transform=turned).step()
    assert [p.grad.item() for p in params] == [
        float((i + 1) % size) for i in range(size)
    ]


def test_a_gradient_that_is_turned() -> None:
    param = nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    turned = _Rule(lambda u, s, p: ({n: x.t() for n, x in u.items()}, s))
    fo.OptimWrapper(_sgd(param), transform=turned).step()
    assert param.grad.tolist() == [[1.0, 3.0], [2.0, 4.0]]


@pytest.mark.parametrize("change", [torch.sum, torch.Tensor.cfloat, torch.Tensor.long])
def test_results_unlike_gradients_are_refused(change: Any) -> None:
    param = _param(1.0, 2.0, 3.0)
    param.grad = torch.ones(3)
    rule = _Rule(lambda u, s, p: ({n: change(x) for n, x in u.items()}, s))
    with pytest.raises(ValueError, match="must keep the shapes"):
        fo.OptimWrapper(_sgd(param), transform=rule).step()
    assert param.grad.tolist() == [1.0, 1.0, 1.0]


def test_a_state_of_parameters_does_not_move_with_them() -> None:
    param = _param(1.0)
    anchored = _Rule(
        lambda u, s, p: ({n: x + p[n] - s[0][n] for n, x in u.items()}, s),
        lambda params: (dict(params),),
    )
    wrapper = fo.OptimWrapper(_sgd(param), transform=anchored)
    for _ in range(2):
        wrapper.update_params(param.sum())
    assert param.item() == 1.0 - 1.0 - (1.0 + 0.0 - 1.0)
    last = _Rule(
        lambda u, s, p: ({n: x + p[n] - s[0][n] for n, x in u.items()}, (dict(p),)),
        lambda params: (dict(params),),
    )
    param = _param(0.0)
    wrapper = fo.OptimWrapper(_sgd(param), transform=last)
    for _ in range(3):
        wrapper.update_params(param.sum())
    assert param.item() == -1.0 - 0.0 - 0.0 + 0.0 - 0.0 or param.item() == -2.0


@pytest.mark.parametrize(
    "transform",
    [
        fo.adamw(1e-3),
        fo.sgd(0.1),
        fo.chain(fo.ClipByNorm(1.0), fo.ScaleByLearningRate(0.1)),
        fo.SkipNonfinite(fo.ClipByGlobalNorm(1.0)),
    ],
    ids=str,
)
def test_what_steps_or_skips_is_refused(transform: fo.Transform) -> None:
    with pytest.raises(ValueError, match="cannot stand between backward and step"):
        fo.OptimWrapper(_sgd(_param(1.0)), transform=transform)


def test_windows_in_two_places_are_refused() -> None:
    inner = fo.TransformOptimizer(
        [_param(1.0)], fo.chain(fo.Accumulate(2), fo.sgd(1.0))
    )
    with pytest.raises(ValueError, match="pass accumulative_counts"):
        fo.OptimWrapper(inner)


def test_numbers_as_names_do_not_meet_names() -> None:
    frozen, a, b, c = (_param(0.0) for _ in range(4))
    optimizer = _sgd(a, b)
    wrapper = fo.OptimWrapper(optimizer, clip_grad={"max_norm": 1.0})
    wrapper.parameter_names = {id(frozen): "0", id(a): "1", id(b): "2"}
    optimizer.add_param_group({"params": [c]})
    for param, grad in ((a, 3.0), (b, 4.0), (c, 12.0)):
        param.grad = torch.tensor([grad])
    wrapper.step()
    expected = torch.tensor([3.0, 4.0, 12.0]) / 13
    assert torch.allclose(torch.cat([a.grad, b.grad, c.grad]), expected)


def test_names_come_with_parameters() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1.0)
    wrapper = fo.OptimWrapper(optimizer, transform=fo.MultiplyParamwise({"bias": 0.0}))
    before = model.bias.clone()
    wrapper.update_params(model(torch.ones(1, 2)).sum())
    assert torch.equal(model.bias, before)
    told: list[str] = []
    wrapper.summary(told.append)
    assert "weight" in told[0]


def test_the_norm_of_a_chain_is_told() -> None:
    param = _param(0.0, 0.0)
    chain = fo.chain(fo.Scale(2.0), fo.ClipByGlobalNorm(1.0))
    wrapper = fo.OptimWrapper(_sgd(param), transform=chain)
    param.grad = torch.tensor([3.0, 4.0])
    wrapper.step()
    assert wrapper.message_hub.get_scalar("train/grad_norm").current() == 10.0
    assert wrapper.transform is chain


def test_an_infinite_limit_only_tells_the_norm() -> None:
    param = _param(0.0, 0.0)
    wrapper = fo.OptimWrapper(_sgd(param), clip_grad={"max_norm": math.inf})
    param.grad = torch.tensor([3.0, 4.0])
    wrapper.step()
    assert param.grad.tolist() == [3.0, 4.0]
    assert wrapper.message_hub.get_scalar("train/grad_norm").current() == 5.0


def test_clip_grad_kwargs_may_be_written() -> None:
    """As hooks do that warm a limit up, or take it away."""
    param = _param(0.0)
    wrapper = fo.OptimWrapper(_sgd(param), clip_grad={"max_norm": 1.0})
    for limit, seen in ((1.0, 1.0), (0.5, 0.5)):
        wrapper.clip_grad_kwargs["max_norm"] = limit
        param.grad = torch.tensor([3.0])
        wrapper.step()
        assert param.grad.item() == pytest.approx(seen, rel=1e-5)
    wrapper.clip_grad_kwargs = None
    param.grad = torch.tensor([3.0])
    wrapper.step()
    assert param.grad.item() == 3.0


def test_mixed_dtypes_are_clipped_as_torch_does() -> None:
    dtypes = [torch.float32, torch.float64, torch.float32, torch.bfloat16]
    params = [nn.Parameter(torch.zeros(3, dtype=d)) for d in dtypes]
    twins = [nn.Parameter(torch.zeros(3, dtype=d)) for d in dtypes]
    for index, (a, b) in enumerate(zip(params, twins, strict=True)):
        a.grad = (torch.arange(3.0) + 0.1 * index).to(a.dtype)
        b.grad = a.grad.clone()
    wrapper = fo.OptimWrapper(_sgd(*params), clip_grad={"max_norm": 0.7})
    wrapper.step()
    norm = nn.utils.clip_grad_norm_(twins, 0.7)
    assert wrapper.message_hub.get_scalar("train/grad_norm").current() == norm.item()
    for a, b in zip(params, twins, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("loss", [{"a": 1}, [1.0], "loss"])
def test_a_loss_that_is_none_is_named_in_windows(loss: Any) -> None:
    wrapper = fo.OptimWrapper(_sgd(_param(1.0)), accumulative_counts=2)
    with pytest.raises(TypeError, match="loss must be a tensor, got a"):
        wrapper.update_params(loss)


@pytest.mark.parametrize("wrong", [{"merge_groups": "no"}, {"merge_groups": 1}])
def test_merge_groups_is_a_switch(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="merge_groups"):
        fo.OptimWrapper(_sgd(_param(1.0)), **wrong)


def test_a_wrapper_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match="got a OptimWrapper"):
        fo.OptimWrapper(fo.OptimWrapper(_sgd(_param(1.0))))
    with pytest.raises(TypeError, match="loss_scale comes first"):
        fo.AmpOptimWrapper(_sgd(_param(1.0)))


# -- mixed precision -------------------------------------------------------------------


def _half(
    param: nn.Parameter, scale: float = 64.0, **options: Any
) -> fo.AmpOptimWrapper:
    return fo.AmpOptimWrapper({"init_scale": scale}, optimizer=_sgd(param), **options)


def test_after_an_error_in_a_step_gradients_are_unscaled_again() -> None:
    calls: list[int] = []

    def update(updates: fo.TensorMap, state: Any, params: fo.TensorMap) -> Any:
        calls.append(1)
        if len(calls) == 1:
            msg = "full"
            raise OSError(msg)
        return {name: u * 1.0 for name, u in updates.items()}, state

    param = _param(1.0)
    wrapper = _half(param, transform=_Rule(update))
    with pytest.raises(OSError, match="full"):
        wrapper.update_params((param * 0.5).sum())
    wrapper.zero_grad()
    wrapper.update_params((param * 0.5).sum())
    assert param.item() == 0.5


def test_merged_groups_do_not_change_what_a_transform_sees() -> None:
    results = []
    for merge in (True, False):
        params = [_param(1.0, 1.0) for _ in range(3)]
        groups = [
            {"params": [p], "lr": lr}
            for p, lr in zip(params, (0.1, 0.2, 0.1), strict=True)
        ]
        wrapper = fo.AmpOptimWrapper(
            16.0,
            optimizer=torch.optim.SGD(groups, lr=1.0),
            transform=fo.Trace(0.9),
            merge_groups=merge,
        )
        for _ in range(2):
            wrapper.update_params(sum(p.sum() * 10**k for k, p in enumerate(params)))
            groups[1]["lr"] = 0.1
            wrapper.optimizer.param_groups[1]["lr"] = 0.1
        results.append([p.tolist() for p in params])
        other = fo.AmpOptimWrapper(
            16.0, optimizer=torch.optim.SGD(groups, lr=1.0), transform=fo.Trace(0.9)
        )
        other.load_state_dict(wrapper.state_dict())
    assert results[0] == results[1]


@pytest.mark.parametrize("source", [1.0, 64.0, 1024.0])
@pytest.mark.parametrize("target", [1.0, 64.0, 512.0])
def test_gradients_go_between_scales(source: float, target: float) -> None:
    def new(scale: float) -> tuple[nn.Parameter, fo.OptimWrapper]:
        param = _param(1.0)
        if scale == 1.0:
            return param, fo.OptimWrapper(_sgd(param), 2)
        return param, _half(param, scale, accumulative_counts=2)

    param, wrapper = new(source)
    wrapper.update_params((param * 0.5).sum())
    state = wrapper.state_dict()
    state.pop("loss_scaler", None)
    other, loaded = new(target)
    loaded.load_state_dict(state)
    loaded.update_params((other * 0.5).sum())
    assert other.item() == 0.5


def test_a_resume_inside_a_window_holds_a_shared_scale() -> None:
    def new() -> tuple[Any, ...]:
        a, b = _param(1.0), _param(1.0)
        first, second = _half(a, accumulative_counts=2), _half(b)
        second.loss_scaler = first.loss_scaler
        return a, first, b, second

    a, first, _, _ = new()
    first.update_params((a * 0.5).sum())
    state = first.state_dict()
    a, first, b, second = new()
    first.load_state_dict(state)
    second.update_params(b.sum() * math.inf)
    assert first.loss_scaler.get_scale() == 64.0
    first.update_params((a * 0.5).sum())
    assert a.item() == 0.5
    assert first.loss_scaler.get_scale() == 32.0


def test_zero_grad_lets_go_of_a_shared_scale() -> None:
    a, b = _param(1.0), _param(1.0)
    first, second = _half(a), _half(b)
    second.loss_scaler = first.loss_scaler
    first.backward(a.sum())
    first.zero_grad()
    second.update_params(b.sum() * math.inf)
    assert first.loss_scaler.get_scale() == 32.0


# -- saving and loading ----------------------------------------------------------------


def test_a_state_from_before_the_first_step_is_gone_back_to() -> None:
    def run(wrapper: fo.OptimWrapper, param: Tensor) -> None:
        for factor in (1.0, 2.0, 3.0):
            wrapper.update_params((param * factor).sum())

    param = _param(1.0)
    wrapper = fo.OptimWrapper(_sgd(param, lr=0.1), accumulative_counts=2)
    before, state = param.detach().clone(), wrapper.state_dict()
    run(wrapper, param)
    first = param.item()
    with torch.no_grad():
        param.copy_(before)
    wrapper.load_state_dict(state)
    assert wrapper.inner_count == 0
    assert param.grad is None
    run(wrapper, param)
    assert param.item() == first


def test_counts_that_were_told_stay_when_a_state_has_none() -> None:
    """As a loop of one's own does that resumes from MMEngine's checkpoint."""
    param = _param(1.0)
    wrapper = fo.OptimWrapper(_sgd(param), accumulative_counts=2)
    wrapper.initialize_count_status(nn.Linear(1, 1), 4, 7)
    wrapper.load_state_dict(wrapper.optimizer.state_dict())
    assert (wrapper.inner_count, wrapper._max_counts) == (4, 7)


def test_a_dict_loads_all_or_nothing_from_the_start() -> None:
    a, b = _param(1.0), _param(1.0)
    wrappers = fo.OptimWrapperDict(
        a=fo.OptimWrapper(_sgd(a), 2), b=fo.OptimWrapper(_sgd(b), 2)
    )
    trained = fo.OptimWrapperDict(
        a=fo.OptimWrapper(_sgd(_param(1.0)), 2), b=fo.OptimWrapper(_sgd(_param(1.0)), 2)
    )
    for wrapper in trained.values():
        wrapper.update_params(wrapper._parameters()[0].sum())
    state = trained.state_dict()
    state["b"]["param_groups"] = []
    with pytest.raises(ValueError, match="has 0 groups, the optimizer 1"):
        wrappers.load_state_dict(state)
    assert wrappers["a"].inner_count == 0
    assert a.grad is None


def test_sparse_gradients_are_saved_and_loaded() -> None:
    def new() -> tuple[nn.Embedding, fo.OptimWrapper]:
        torch.manual_seed(0)
        layer = nn.Embedding(4, 2, sparse=True)
        optimizer = torch.optim.SparseAdam(layer.parameters(), lr=0.1)
        return layer, fo.OptimWrapper(optimizer, accumulative_counts=2)

    layer, wrapper = new()
    wrapper.update_params(layer(torch.tensor([1])).sum())
    other, loaded = new()
    loaded.load_state_dict(wrapper.state_dict())
    for each, own in ((layer, wrapper), (other, loaded)):
        own.update_params(each(torch.tensor([2])).sum())
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_state_of_another_optimizer_is_refused(kind: Any) -> None:
    other = {torch.optim.AdamW: torch.optim.SGD, torch.optim.SGD: torch.optim.AdamW}
    param = _param(1.0)
    state = other[kind]([param], lr=7.0).state_dict()
    wrapper = fo.OptimWrapper(kind([param], lr=0.1))
    with pytest.raises(ValueError, match="lacks .*; it is not of"):
        wrapper.load_state_dict(state)
    assert wrapper.get_lr() == {"lr": [0.1]}


def test_a_load_that_torch_gives_up_changes_nothing() -> None:
    param = _param(1.0)
    wrapper = fo.OptimWrapper(torch.optim.Adam([param], lr=0.1))
    wrapper.update_params(param.sum())
    state = copy.deepcopy(wrapper.state_dict())
    before = repr(state)
    state["param_groups"][0]["lr"] = 7.0
    del state["state"][0]["step"]
    with pytest.raises(KeyError):
        wrapper.load_state_dict(state)
    assert repr(wrapper.state_dict()) == before


class _LowRank(torch.optim.Optimizer):
    """Keeps moments in a shape of its own, under torch's name."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["exp_avg"] = torch.zeros(1)


def test_an_optimizer_of_ones_own_loads_what_it_saved() -> None:
    param = _param(1.0, 2.0)
    wrapper = fo.OptimWrapper(_LowRank([param]))
    wrapper.update_params(param.sum())
    fo.OptimWrapper(_LowRank([param])).load_state_dict(wrapper.state_dict())


@pytest.mark.parametrize("key", ["scale", "growth_factor", "backoff_factor"])
@pytest.mark.parametrize("value", [0.0, math.nan, -5.0])
def test_a_scale_that_cannot_train_is_refused(key: str, value: float) -> None:
    wrapper = _half(_param(1.0))
    state = wrapper.state_dict()
    state["loss_scaler"][key] = value
    with pytest.raises(ValueError, match=key):
        wrapper.load_state_dict(state)


def test_a_state_loaded_in_inference_mode_trains() -> None:
    param, other = _param(1.0), _param(1.0)
    wrapper = fo.OptimWrapper(_sgd(param), accumulative_counts=2)
    wrapper.update_params((param * 0.5).sum())
    loaded = fo.OptimWrapper(_sgd(other), accumulative_counts=2)
    with torch.inference_mode():
        loaded.load_state_dict(wrapper.state_dict())
    loaded.update_params((other * 0.5).sum())
    assert other.item() == 0.5


# -- copies, and several wrappers of one model -----------------------------------------


class _Parallel(nn.Module):
    """Notes whether it synchronises, as DDP does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
        self.sync = True
        self.seen: list[bool] = []

    def no_sync(self) -> Any:
        import contextlib

        @contextlib.contextmanager
        def off() -> Any:
            before, self.sync = self.sync, False
            try:
                yield
            finally:
                self.sync = before

        return off()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.sync)
        return self.layers[1](self.layers[0](x))


@pytest.mark.parametrize("crossed", [False, True])
def test_two_wrappers_of_one_model_synchronise_in_their_steps(crossed: bool) -> None:
    model = _Parallel()
    first, second = (
        fo.OptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1), 2)
        for layer in model.layers
    )
    x = torch.ones(1, 1)
    for _ in range(4):
        with first.optim_context(model):
            one = model(x).sum()
        with second.optim_context(model):
            two = model(x).sum()
        pairs = [(first, one), (second, two)]
        for wrapper, loss in reversed(pairs) if crossed else pairs:
            wrapper.backward(wrapper.scale_loss(loss))
        assert model.sync
        for wrapper, _ in pairs:
            if wrapper.should_update():
                wrapper.step()
                wrapper.zero_grad()
    assert model.seen == [False, False, True, True] * 2


def test_a_model_stays_silent_for_the_last_of_its_wrappers() -> None:
    """FSDP asks in the backward: that of the second must find it silent, too."""
    model = _Parallel()
    first, second = (
        fo.OptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1), 2)
        for layer in model.layers
    )
    with first.optim_context(model):
        one = model(torch.ones(1, 1)).sum()
    with second.optim_context(model):
        two = model(torch.ones(1, 1)).sum()
    first.update_params(one)
    assert not model.sync
    second.update_params(two)
    assert model.sync


def test_a_wrapper_that_steps_always_synchronises_beside_one_that_waits() -> None:
    model = _Parallel()
    slow = fo.OptimWrapper(torch.optim.SGD(model.layers[0].parameters(), lr=0.1), 2)
    fast = fo.OptimWrapper(torch.optim.SGD(model.layers[1].parameters(), lr=0.1))
    for _ in range(4):
        with slow.optim_context(model):
            one = model(torch.ones(1, 1)).sum()
        model.seen.clear()
        with fast.optim_context(model):
            two = model(torch.ones(1, 1)).sum()
        assert model.seen == [True]
        slow.update_params(one)
        fast.update_params(two)
        assert model.sync


def test_wrappers_are_copied_between_context_and_backward() -> None:
    model = _Parallel()
    wrapper = fo.OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    with wrapper.optim_context(model):
        model(torch.ones(1, 1))
    copied = copy.deepcopy(wrapper)
    pickled = pickle.loads(pickle.dumps(wrapper))
    assert copied.get_lr() == pickled.get_lr() == wrapper.get_lr()


def test_a_dict_may_have_any_names() -> None:
    wrappers = fo.OptimWrapperDict(self=fo.OptimWrapper(_sgd(_param(1.0))))
    assert list(wrappers) == ["self"]
    with pytest.raises(TypeError, match="got inner"):
        fo.OptimWrapperDict(inner=wrappers)
    with pytest.raises(AttributeError, match=r"wrappers\[name\]\.optimizer"):
        _ = wrappers.optimizer


def test_a_subclass_may_count_before_it_is_made() -> None:
    """MMEngine's wrappers are plain objects: a subclass writes what it likes first."""

    class Early(fo.OptimWrapper):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self._inner_count = 7
            super().__init__(optimizer)

    wrapper = Early(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
    assert wrapper._inner_count == 0

"""MMEngine's own tests of its wrappers, written anew from memory, on its and on ours.

Each runs on both, so that it is seen to be true of MMEngine, too.
"""

from __future__ import annotations

import contextlib
import unittest
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import mmengine
import mmengine_runs
import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from torch import nn
from torch.optim import SGD, Adam, Optimizer

import functional_optim as fo

if TYPE_CHECKING:
    from collections.abc import Iterator

SIDES = {"theirs": mmengine.optim, "ours": fo}
MixedPrecision = fo.AmpOptimWrapper
"""MMEngine's asks for a GPU."""
assert mmengine_runs.OURS == "functional_optim."


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest) -> Any:
    """Return the module with the classes to be tested."""
    return SIDES[request.param]


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Any:
    """Return a message hub that is the current one."""
    return MessageHub.get_instance(request.node.name)


class ToyModel(nn.Module):
    """A model of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, 1)
        self.linear2 = nn.Linear(1, 1)

    def forward(self, x: Any) -> Any:
        """Return what the second layer makes of the first one's."""
        return self.linear2(self.linear1(x))


class ToySilent(ToyModel):
    """A model that can be kept from synchronising."""

    silent = 0

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Count how often it was."""
        self.silent += 1
        yield


def several(model: ToyModel, **options: Any) -> Optimizer:
    """Return an optimizer with a group for each layer."""
    groups = [
        {"params": layer.parameters(), "lr": lr, "momentum": momentum}
        for layer, lr, momentum in (
            (model.linear1, 0.1, 0.8),
            (model.linear2, 0.2, 0.9),
        )
    ]
    return SGD(groups, lr=0.1, momentum=0.0, **options)


def test_init(side: Any, hub: Any) -> None:
    """Defaults, and each way to clip."""
    optimizer = SGD(ToyModel().parameters(), lr=0.1)
    wrapper = side.OptimWrapper(optimizer)
    assert wrapper.optimizer is optimizer
    assert wrapper.clip_grad_kwargs is None
    assert wrapper.message_hub is hub
    assert wrapper.message_hub is MessageHub.get_current_instance()
    assert wrapper._accumulative_counts == 1
    assert (wrapper._inner_count, wrapper._max_counts) == (0, -1)
    assert wrapper._remainder_counts == -1
    assert wrapper.base_param_settings is None
    with pytest.raises(AssertionError, match="at least"):
        side.OptimWrapper(optimizer, accumulative_counts=0)
    with pytest.raises(AssertionError):
        side.OptimWrapper(optimizer, clip_grad=[])
    wrapper = side.OptimWrapper(optimizer, clip_grad={"max_norm": 1})
    assert wrapper.clip_grad_kwargs == {"max_norm": 1}
    assert wrapper.clip_func is torch.nn.utils.clip_grad_norm_
    assert wrapper.grad_name == "grad_norm"
    wrapper = side.OptimWrapper(
        optimizer, clip_grad={"type": "norm", "max_norm": 1.0, "norm_type": "inf"}
    )
    assert wrapper.clip_func is torch.nn.utils.clip_grad_norm_
    wrapper = side.OptimWrapper(
        optimizer, clip_grad={"type": "value", "clip_value": 0.5}
    )
    assert wrapper.clip_func is torch.nn.utils.clip_grad_value_
    assert wrapper.grad_name == "grad_value"
    with pytest.raises(ValueError, match="norm.*value.*but got|norm' or 'value', got"):
        side.OptimWrapper(optimizer, clip_grad={"type": "fake", "max_norm": 1.0})
    with pytest.raises(AssertionError):
        side.OptimWrapper(optimizer, clip_grad={})


def test_update_params(side: Any) -> None:
    """The overridable methods are called, and stepping waits for the window."""
    model = ToyModel()
    wrapper = side.OptimWrapper(SGD(model.parameters(), lr=0.1))
    calls = MagicMock()
    wrapper.backward, wrapper.step, wrapper.zero_grad = (
        calls.backward,
        calls.step,
        calls.zero_grad,
    )
    wrapper.update_params(torch.tensor(1.0))
    calls.backward.assert_called_with(torch.tensor(1.0))
    calls.step.assert_called_with()
    calls.zero_grad.assert_called_with()
    wrapper.update_params(
        torch.tensor(1.0), step_kwargs={"arg1": 1}, zero_kwargs={"arg2": 2}
    )
    calls.step.assert_called_with(arg1=1)
    calls.zero_grad.assert_called_with(arg2=2)

    wrapper = side.OptimWrapper(SGD(model.parameters(), lr=0.1), accumulative_counts=3)
    loss = torch.tensor(1.0, requires_grad=True)
    wrapper.step, wrapper.zero_grad = MagicMock(), MagicMock()
    for count in range(1, 4):
        wrapper.update_params(loss)
        assert wrapper.step.call_count == wrapper.zero_grad.call_count == count // 3
    torch.testing.assert_close(loss.grad, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("end", "lengths"),
    [(6, [3] * 6), (7, [3] * 6 + [1]), (8, [3] * 6 + [2, 2])],
)
def test_update_params_until_the_end(side: Any, end: int, lengths: list[int]) -> None:
    """A last short window steps, and its mean is over its own length."""
    wrapper = side.OptimWrapper(SGD(ToyModel().parameters(), lr=0.1), 3)
    wrapper.initialize_count_status(nn.Module(), 0, end)
    wrapper.step = MagicMock()
    for count, length in enumerate(lengths, start=1):
        loss = torch.tensor(1.0, requires_grad=True)
        torch.testing.assert_close(wrapper.scale_loss(loss), loss / length)
        wrapper.update_params(loss)
        assert wrapper.should_update() == (count % 3 == 0 or count == end)
    assert wrapper.step.call_count == -(-end // 3)
    assert wrapper.inner_count == end


def test_initialize_count_status(side: Any) -> None:
    """A warning each for a resume inside a window and for BatchNorm; one line each."""
    case = unittest.TestCase()
    logger = MMLogger.get_instance(f"counts of {side.__name__}")
    model = nn.Linear(1, 1)
    wrapper = side.OptimWrapper(SGD(model.parameters(), lr=0.1), accumulative_counts=3)
    wrapper.initialize_count_status(model, 0, 100)
    assert wrapper._remainder_counts == 1
    with case.assertLogs(logger) as caught:
        wrapper.initialize_count_status(model, 2, 100)
    assert len(caught.output) == 1
    assert "Resumed iteration number" in caught.records[0].msg
    with case.assertLogs(logger) as caught:
        wrapper.initialize_count_status(nn.BatchNorm2d(1), 0, 99)
    assert len(caught.output) == 1
    assert "Gradient accumulative" in caught.records[0].msg
    assert wrapper._remainder_counts == 0


def test_get_lr(side: Any) -> None:
    """One list for one group, with several the base rate as well."""
    model = ToyModel()
    wrapper = side.OptimWrapper(SGD(model.parameters(), lr=0.1))
    assert wrapper.get_lr() == {"lr": [0.1]}
    wrapper = side.OptimWrapper(several(model))
    assert wrapper.get_lr() == {"base_lr": [0.1], "lr": [0.1, 0.2]}


def test_get_momentum(side: Any) -> None:
    """Momentum of SGD, the first beta of Adam, else 0."""
    model = ToyModel()
    wrapper = side.OptimWrapper(several(model))
    assert wrapper.get_momentum() == {"momentum": [0.8, 0.9]}
    wrapper = side.OptimWrapper(SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert wrapper.get_momentum() == {"momentum": [0.9]}
    wrapper = side.OptimWrapper(Adam(model.parameters(), betas=(0.9, 0.98)))
    assert wrapper.get_momentum() == {"momentum": [0.9]}
    wrapper = side.OptimWrapper(torch.optim.Adagrad(model.parameters()))
    assert wrapper.get_momentum() == {"momentum": [0]}


def test_backward(side: Any) -> None:
    """The loss' own backward is called, with the arguments; one is counted."""
    loss = MagicMock(spec=torch.Tensor)
    wrapper = side.OptimWrapper(SGD(ToyModel().parameters(), lr=0.1))
    wrapper.backward(loss)
    loss.backward.assert_called_with()
    wrapper.backward(loss, retain_graph=True)
    loss.backward.assert_called_with(retain_graph=True)
    assert wrapper.inner_count == 2


def mocked() -> Any:
    """Return an optimizer that is a mock."""
    optimizer = MagicMock(spec=Optimizer)
    optimizer.defaults, optimizer.param_groups = {}, [{}]
    return optimizer


def test_zero_grad(side: Any) -> None:
    """The optimizer's is called, with the arguments."""
    optimizer = mocked()
    wrapper = side.OptimWrapper(optimizer)
    wrapper.zero_grad()
    optimizer.zero_grad.assert_called_with()
    wrapper.zero_grad(set_to_none=True)
    optimizer.zero_grad.assert_called_with(set_to_none=True)


def test_step(side: Any) -> None:
    """The optimizer's is called, with the arguments."""
    optimizer = mocked()
    wrapper = side.OptimWrapper(optimizer)
    wrapper.step()
    optimizer.step.assert_called_with()
    wrapper.step(test=0)
    optimizer.step.assert_called_with(test=0)


@pytest.mark.parametrize("norm_type", [2.0, "inf"])
def test_clip_grad_norm(side: Any, hub: Any, norm_type: Any) -> None:
    """The norm is torch's, and stands in the hub."""
    model = ToyModel()
    wrapper = side.OptimWrapper(
        SGD(model.parameters(), lr=0.1),
        clip_grad={"max_norm": 1, "norm_type": norm_type},
    )
    (model(torch.Tensor([1])) * 9).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    order = float(norm_type)
    norm = torch.stack([g.norm(order) for g in grads]).norm(order)
    wrapper._clip_grad()
    history, _ = hub.get_scalar("train/grad_norm").data
    assert history.tolist() == pytest.approx([norm.item()])
    factor = min(1 / (norm.item() + 1e-6), 1.0)
    for param, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(param.grad, grad * factor)


def test_clip_grad_value(side: Any, hub: Any) -> None:
    """Numbers are clipped, and nothing is logged."""
    model = ToyModel()
    wrapper = side.OptimWrapper(
        SGD(model.parameters(), lr=0.1), clip_grad={"type": "value", "clip_value": 0.1}
    )
    (model(torch.Tensor([1])) * 9).sum().backward()
    wrapper._clip_grad()
    assert all(p.grad.abs().max() <= 0.1 for p in model.parameters())
    assert "train/grad_norm" not in hub.log_scalars
    assert "train/grad_value" not in hub.log_scalars


def test_optim_context(side: Any) -> None:
    """A model is kept from synchronising where its window goes on."""
    model = ToySilent()
    wrapper = side.OptimWrapper(SGD(model.parameters(), lr=0.1))
    with wrapper.optim_context(model):
        pass
    assert model.silent == 0
    wrapper = side.OptimWrapper(SGD(model.parameters(), lr=0.1), accumulative_counts=3)
    seen = []
    for _ in range(6):
        before = model.silent
        with wrapper.optim_context(model):
            loss = model(torch.ones(1)).sum()
        seen.append(model.silent > before)
        wrapper.update_params(loss)
    assert seen == [True, True, False, True, True, False]


def test_should_update_and_sync(side: Any) -> None:
    """Asked after a backward, and before the next."""
    wrapper = side.OptimWrapper(SGD(ToyModel().parameters(), lr=0.1), 2)
    wrapper.initialize_count_status(nn.Module(), 0, 5)
    told = []
    for count in range(1, 6):
        sync = wrapper.should_sync()
        wrapper._inner_count = count
        told.append((sync, wrapper.should_update()))
    assert told == [(c in {2, 4, 5},) * 2 for c in range(1, 6)]


def test_param_groups_and_defaults(side: Any) -> None:
    """Those of the optimizer; behind several come the base settings."""
    model = ToyModel()
    wrapper = side.OptimWrapper(SGD(model.parameters(), lr=0.1))
    assert wrapper.param_groups == wrapper.optimizer.param_groups
    assert wrapper.defaults == wrapper.optimizer.defaults
    wrapper = side.OptimWrapper(several(model))
    *groups, base = wrapper.param_groups
    assert list(map(id, groups)) == list(map(id, wrapper.optimizer.param_groups))
    assert base is wrapper.base_param_settings
    assert {k: v for k, v in base.items() if k != "params"} == wrapper.defaults


def test_state_dict(side: Any) -> None:
    """The optimizer's, with the base settings where there are several groups."""
    model = ToyModel()
    optimizer = SGD(model.parameters(), lr=0.1)
    assert side.OptimWrapper(optimizer).state_dict() == optimizer.state_dict()
    optimizer = several(model)
    saved = side.OptimWrapper(optimizer).state_dict()
    base = saved.pop("base_param_settings")
    assert base["lr"] == 0.1
    assert saved == optimizer.state_dict()


def test_load_state_dict(side: Any) -> None:
    """Settings and state of another wrapper, the base settings too."""
    model = ToyModel()
    source = side.OptimWrapper(several(model))
    source.update_params(model(torch.ones(1)).sum())
    source.base_param_settings["lr"] = 0.7
    saved = source.state_dict()
    target = side.OptimWrapper(several(ToyModel(), weight_decay=0.5))
    target.load_state_dict(dict(saved))
    assert target.get_lr() == {"base_lr": [0.7], "lr": [0.1, 0.2]}
    assert len(target.optimizer.state) == 4
    assert target.optimizer.param_groups[0]["weight_decay"] == 0


def test_repr(side: Any) -> None:
    """As the guide shows it."""
    optimizer = SGD(ToyModel().parameters(), lr=0.1)
    wrapper = side.OptimWrapper(optimizer)
    expected = (
        f"Type: OptimWrapper\n_accumulative_counts: 1\noptimizer: \n{optimizer}\n"
    )
    assert repr(wrapper) == expected


# -- several ---------------------------------------------------------------------------


@pytest.fixture
def pair(side: Any) -> Any:
    """Return two wrappers of one name each."""
    model = ToyModel()
    return side.OptimWrapperDict(
        optim1=side.OptimWrapper(SGD(model.linear1.parameters(), lr=0.1, momentum=0.8)),
        optim2=side.OptimWrapper(SGD(model.linear2.parameters(), lr=0.2, momentum=0.9)),
    )


def test_dict_takes_wrappers(side: Any) -> None:
    """Anything else is refused."""
    with pytest.raises(AssertionError, match="`OptimWrapperDict` only accept"):
        side.OptimWrapperDict(optim1=SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def test_dict_leaves_steps_to_each(pair: Any) -> None:
    """What only the loop can order is refused."""
    for call in (
        lambda: pair.update_params(torch.tensor(1.0)),
        lambda: pair.backward(torch.tensor(1.0)),
        pair.step,
        lambda: pair.optim_context(ToyModel()).__enter__(),
    ):
        with pytest.raises(NotImplementedError, match="should be called by each opti"):
            call()
    assert pair.initialize_count_status(ToyModel(), 0, 1) is None


def test_dict_zero_grad(pair: Any) -> None:
    """All gradients are gone."""
    for wrapper in pair.values():
        for param in wrapper.optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
    pair.zero_grad()
    for wrapper in pair.values():
        params = wrapper.optimizer.param_groups[0]["params"]
        assert not any(p.grad is not None and p.grad.any() for p in params)


def test_dict_settings(pair: Any, side: Any) -> None:
    """Rates, momenta and groups by name."""
    assert pair.get_lr() == {"optim1.lr": [0.1], "optim2.lr": [0.2]}
    assert pair.get_momentum() == {"optim1.momentum": [0.8], "optim2.momentum": [0.9]}
    assert pair.param_groups["optim1"] == pair["optim1"].param_groups
    other = side.OptimWrapperDict(a=side.OptimWrapper(several(ToyModel())))
    assert other.get_lr() == {"a.base_lr": [0.1], "a.lr": [0.1, 0.2]}


def test_dict_state(pair: Any, side: Any) -> None:
    """States by name, there and back; an unknown name is refused."""
    saved = pair.state_dict()
    assert saved == {name: w.state_dict() for name, w in pair.items()}
    pair["optim1"].optimizer.param_groups[0]["lr"] = 9.0
    pair.load_state_dict(saved)
    assert pair.get_lr()["optim1.lr"] == [0.1]
    with pytest.raises(AssertionError, match="Mismatched `state_dict`"):
        pair.load_state_dict({**saved, "optim3": saved["optim1"]})


def test_dict_is_a_mapping(pair: Any) -> None:
    """Items, keys, values, length, membership, access, repr."""
    names = ["optim1", "optim2"]
    assert list(pair.keys()) == names
    assert list(pair.values()) == [pair[name] for name in names]
    assert list(pair.items()) == [(name, pair[name]) for name in names]
    assert len(pair) == 2
    assert "optim1" in pair
    assert "optim3" not in pair
    with pytest.raises(AssertionError, match="Cannot find"):
        pair["optim3"]
    assert repr(pair) == "".join(f"name: {n}\n{pair[n]!r}" for n in names)


# -- mixed precision: MMEngine's needs a GPU, what it tests there holds for ours ------


def test_amp_init() -> None:
    """Each way to scale."""
    optimizer = SGD(ToyModel().parameters(), lr=0.1)
    wrapper = MixedPrecision(optimizer=optimizer)
    assert isinstance(wrapper.loss_scaler, torch.amp.GradScaler)
    assert wrapper._scale_update_param is None
    wrapper = MixedPrecision(optimizer=optimizer, loss_scale=0.5)
    assert wrapper._scale_update_param == wrapper.loss_scaler.get_scale() == 0.5
    wrapper = MixedPrecision(
        optimizer=optimizer, loss_scale={"init_scale": 1, "growth_factor": 2}
    )
    assert wrapper._scale_update_param is None
    assert wrapper.loss_scaler.get_growth_factor() == 2
    with pytest.raises(TypeError, match="loss_scale must be"):
        MixedPrecision(optimizer=optimizer, loss_scale="Unknown")
    with pytest.raises(AssertionError, match="dtype"):
        MixedPrecision(optimizer=optimizer, dtype="fp16")


def test_amp_step_and_backward() -> None:
    """The scaler's own methods are called, unscaling where there is a clip."""
    model = ToyModel()
    wrapper = MixedPrecision(optimizer=SGD(model.parameters(), lr=0.1))
    wrapper.loss_scaler = MagicMock(wraps=wrapper.loss_scaler)
    loss = model(torch.ones(1)).sum()
    wrapper.backward(loss)
    wrapper.loss_scaler.scale.assert_called_with(loss)
    wrapper.step()
    wrapper.loss_scaler.unscale_.assert_not_called()
    wrapper.loss_scaler.step.assert_called_with(wrapper.optimizer)
    wrapper.loss_scaler.update.assert_called_with(wrapper._scale_update_param)
    wrapper.clip_grad_kwargs = {"max_norm": 1}
    wrapper.zero_grad()
    wrapper.backward(model(torch.ones(1)).sum())
    wrapper.step()
    wrapper.loss_scaler.unscale_.assert_called_with(wrapper.optimizer)


def test_amp_state_dict() -> None:
    """The scaler's state goes there and back; a state without it loads, too."""
    model = ToyModel()
    wrapper = MixedPrecision(optimizer=SGD(model.parameters(), lr=0.1))
    wrapper.update_params(model(torch.ones(1)).sum())
    saved = wrapper.state_dict()
    assert saved["loss_scaler"] == wrapper.loss_scaler.state_dict()
    saved["loss_scaler"] = {**saved["loss_scaler"], "scale": 4.0}
    other = MixedPrecision(optimizer=SGD(ToyModel().parameters(), lr=0.5))
    other.load_state_dict(saved)
    assert other.loss_scaler.get_scale() == 4.0
    saved.pop("loss_scaler")
    other.load_state_dict(saved)
    assert other.get_lr() == {"lr": [0.1]}


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.bfloat16])
def test_amp_optim_context(dtype: Any) -> None:
    """The forward runs in autocast."""
    model = ToyModel()
    wrapper = MixedPrecision(optimizer=SGD(model.parameters(), lr=0.1), dtype=dtype)
    with wrapper.optim_context(model):
        assert model(torch.ones(1)).dtype is torch.bfloat16

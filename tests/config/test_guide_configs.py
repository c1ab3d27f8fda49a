"""MMEngine's guide to optimizer wrappers, the second half: wrappers from configs.

The blocks as they stand there, with the imports changed. The lines that it logs must be
logged, character by character and in its order.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from functional_optim import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    AmpOptimWrapper,
    DefaultOptimWrapperConstructor,
    OptimWrapper,
    OptimWrapperDict,
    build_optim_wrapper,
)

_logger = logging.getLogger("functional_optim")


class ToyModel(nn.Module):
    """The model of the guide."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"layer0": nn.Linear(1, 1), "layer1": nn.Linear(1, 1)}
        )
        self.head = nn.Sequential(
            OrderedDict(linear=nn.Linear(1, 1), bn=nn.BatchNorm1d(1))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layers one after another."""
        return self.head(self.backbone.layer1(self.backbone.layer0(x)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged since the last call, as lines of the guide."""
    lines = [
        f"{record.levelname} - {record.getMessage()}"
        for record in caplog.records
        if record.name == "functional_optim"
    ]
    caplog.clear()
    return lines


def options(text: str) -> list[str]:
    return [f"INFO - paramwise_options -- {line}" for line in text.split()]


def assert_trains_alike(wrapper: Any, model: nn.Module, groups: Any) -> None:
    """Compare training with a plain loop over groups of a copy of the model."""
    plain = copy.deepcopy(model)
    optimizer = SGD(groups(plain), lr=0.01, weight_decay=0.0001)
    for x in torch.randn(5, 8, 1):
        plain(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapper.update_params(model(x).square().mean())
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------- simple


@pytest.mark.parametrize("named", [True, False])
def test_simple_config(named: bool) -> None:
    """`type` may be left out, and is "OptimWrapper" then."""
    optimizer = {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0001}
    optim_wrapper: dict[str, Any] = {"optimizer": optimizer}
    if named:
        optim_wrapper["type"] = "OptimWrapper"
    built = build_optim_wrapper(ToyModel(), optim_wrapper)
    assert type(built) is OptimWrapper
    assert type(built.optimizer) is SGD
    (group,) = built.optimizer.param_groups
    found = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
    assert found == {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0001}
    assert len(group["params"]) == 8


def test_config_of_mixed_precision_and_accumulation() -> None:
    """`type="AmpOptimWrapper"` and `accumulative_counts=2` switch both on."""
    optimizer = {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0001}
    optim_wrapper = {
        "type": "AmpOptimWrapper",
        "optimizer": optimizer,
        "accumulative_counts": 2,
    }
    model = ToyModel()
    built = build_optim_wrapper(model, optim_wrapper)
    assert type(built) is AmpOptimWrapper
    before = copy.deepcopy(model)
    moved = []
    for _ in range(4):
        with built.optim_context(model):
            output = model(torch.randn(8, 1))
        built.update_params(output.square().mean())
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        moved.append(any(not torch.equal(one, other) for one, other in pairs))
        before = copy.deepcopy(model)
    assert moved == [False, True, False, True]


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "LBFGS", "Adafactor"])
def test_all_optimizers_of_torch_are_known(name: str) -> None:
    """The optimizers of torch are selected by the names of their classes."""
    built = build_optim_wrapper(ToyModel(), {"optimizer": {"type": name, "lr": 0.01}})
    assert type(built.optimizer) is getattr(torch.optim, name)


# ---------------------------------------------------------------------- paramwise rules


def test_groups_as_in_plain_pytorch() -> None:
    """`custom_keys` does what a list of groups does in plain PyTorch."""
    model = nn.ModuleDict({"backbone": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    plain = SGD(
        [
            {"params": model.backbone.parameters()},
            {"params": model.head.parameters(), "lr": 1e-3},
        ],
        lr=0.01,
        momentum=0.9,
    )
    built = build_optim_wrapper(
        model,
        {
            "optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9},
            "paramwise_cfg": {"custom_keys": {"head": {"lr_mult": 0.1}}},
        },
    )

    def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
        return {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}

    assert rates(built.optimizer) == rates(plain)


def test_settings_by_kind(caplog: pytest.LogCaptureFixture) -> None:
    """`norm_decay_mult=0` logs and does what the guide says."""
    optim_wrapper = {
        "optimizer": {"type": "SGD", "lr": 0.01, "weight_decay": 0.0001},
        "paramwise_cfg": {"norm_decay_mult": 0},
    }
    model = ToyModel()
    with caplog.at_level(logging.INFO, "functional_optim"):
        optimizer = build_optim_wrapper(model, optim_wrapper)
    assert logged(caplog) == options("""
        backbone.layer0.bias:lr=0.01
        backbone.layer0.bias:weight_decay=0.0001
        backbone.layer1.bias:lr=0.01
        backbone.layer1.bias:weight_decay=0.0001
        head.linear.bias:lr=0.01
        head.linear.bias:weight_decay=0.0001
        head.bn.weight:weight_decay=0.0
        head.bn.bias:weight_decay=0.0
        """)
    assert_trains_alike(
        optimizer,
        model,
        lambda plain: [
            {"params": plain.backbone.parameters()},
            {"params": plain.head.linear.parameters()},
            {"params": plain.head.bn.parameters(), "weight_decay": 0.0},
        ],
    )


def test_settings_by_part(caplog: pytest.LogCaptureFixture) -> None:
    """`custom_keys` logs and does what the guide says."""
    optim_wrapper = {
        "optimizer": {"type": "SGD", "lr": 0.01, "weight_decay": 0.0001},
        "paramwise_cfg": {
            "custom_keys": {
                "backbone.layer0": {"lr_mult": 0, "decay_mult": 0},
                "backbone": {"lr_mult": 1},
                "head": {"lr_mult": 0.1},
            }
        },
    }
    model = ToyModel()
    with caplog.at_level(logging.INFO, "functional_optim"):
        optimizer = build_optim_wrapper(model, optim_wrapper)
    assert logged(caplog) == options("""
        backbone.layer0.weight:lr=0.0
        backbone.layer0.weight:weight_decay=0.0
        backbone.layer0.weight:lr_mult=0
        backbone.layer0.weight:decay_mult=0
        backbone.layer0.bias:lr=0.0
        backbone.layer0.bias:weight_decay=0.0
        backbone.layer0.bias:lr_mult=0
        backbone.layer0.bias:decay_mult=0
        backbone.layer1.weight:lr=0.01
        backbone.layer1.weight:weight_decay=0.0001
        backbone.layer1.weight:lr_mult=1
        backbone.layer1.bias:lr=0.01
        backbone.layer1.bias:weight_decay=0.0001
        backbone.layer1.bias:lr_mult=1
        head.linear.weight:lr=0.001
        head.linear.weight:weight_decay=0.0001
        head.linear.weight:lr_mult=0.1
        head.linear.bias:lr=0.001
        head.linear.bias:weight_decay=0.0001
        head.linear.bias:lr_mult=0.1
        head.bn.weight:lr=0.001
        head.bn.weight:weight_decay=0.0001
        head.bn.weight:lr_mult=0.1
        head.bn.bias:lr=0.001
        head.bn.bias:weight_decay=0.0001
        head.bn.bias:lr_mult=0.1
        """)
    names = [name for name, _ in ToyModel().named_parameters()]
    assert [*optimizer.parameter_names.values()] == names
    assert_trains_alike(
        optimizer,
        model,
        lambda plain: [
            {"params": plain.backbone.layer0.parameters(), "lr": 0, "weight_decay": 0},
            {"params": plain.backbone.layer1.parameters()},
            {"params": plain.head.parameters(), "lr": 0.001},
        ],
    )


# ----------------------------------------------------------------- constructors by name


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class LayerDecayOptimizerConstructor(DefaultOptimWrapperConstructor):
    """The guide's own; `print_log` has become a call of a logger."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg=None)
        self.decay_factor = paramwise_cfg.get("decay_factor", 0.5)

        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def add_params(self, params, module, prefix="", lr=None) -> None:
        """Add groups whose rate falls with the depth of their module."""
        if lr is None:
            lr = self.base_lr

        for name, param in module.named_parameters(recurse=False):
            param_group = {}
            param_group["params"] = [param]
            param_group["lr"] = lr
            params.append(param_group)
            full_name = f"{prefix}.{name}" if prefix else name
            _logger.info(f"{full_name} : lr={lr}")

        for name, child in module.named_children():
            chiled_prefix = f"{prefix}.{name}" if prefix else name
            self.add_params(params, child, chiled_prefix, lr=lr * self.decay_factor)


class LayeredModel(nn.Module):
    """The second model of the guide."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({"linear": nn.Linear(1, 1)})
        self.linear = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layers one after another."""
        return self.linear(self.layer.linear(x))


def test_layer_decay_by_a_constructor(caplog: pytest.LogCaptureFixture) -> None:
    """The guide's constructor of layer decay works, found by its name."""
    model = LayeredModel()
    optim_wrapper = {
        "optimizer": {"type": "SGD", "lr": 0.01, "weight_decay": 0.0001},
        "paramwise_cfg": {"decay_factor": 0.5},
        "constructor": "LayerDecayOptimizerConstructor",
    }
    with caplog.at_level(logging.INFO, "functional_optim"):
        optimizer = build_optim_wrapper(model, optim_wrapper)
    assert logged(caplog) == [
        "INFO - layer.linear.weight : lr=0.0025",
        "INFO - layer.linear.bias : lr=0.0025",
        "INFO - linear.weight : lr=0.005",
        "INFO - linear.bias : lr=0.005",
    ]
    assert optimizer.get_lr()["lr"] == [0.0025, 0.0025, 0.005, 0.005]
    assert_trains_alike(
        optimizer,
        model,
        lambda plain: [
            {"params": plain.layer.parameters(), "lr": 0.0025},
            {"params": plain.linear.parameters(), "lr": 0.005},
        ],
    )


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MultipleOptimiWrapperConstructor:
    """A constructor of several wrappers, which the guide leaves to the reader."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None) -> None:
        self.configs = optim_wrapper_cfg

    def __call__(self, model: nn.Module) -> OptimWrapperDict:
        """Build a wrapper for each part of a model, from the config of its name."""
        return OptimWrapperDict(
            **{
                name: build_optim_wrapper(model.get_submodule(name), cfg)
                for name, cfg in self.configs.items()
            }
        )


def test_constructor_of_several_optimizers() -> None:
    """A registered constructor may return an `OptimWrapperDict`."""
    model = ToyModel()
    cfg = {
        "backbone": {
            "optimizer": {"type": "SGD", "lr": 0.1},
            "paramwise_cfg": {"custom_keys": {"layer0": {"lr_mult": 0.5}}},
        },
        "head": {"type": "AmpOptimWrapper", "optimizer": {"type": "Adam", "lr": 0.02}},
        "constructor": "MultipleOptimiWrapperConstructor",
    }
    given = copy.deepcopy(cfg)
    wrappers = build_optim_wrapper(model, cfg)
    assert isinstance(wrappers, OptimWrapperDict)
    assert cfg == given
    assert wrappers.get_lr() == {
        "backbone.base_lr": [0.1],
        "backbone.lr": [0.05, 0.05, 0.1, 0.1],
        "head.lr": [0.02],
    }
    assert wrappers.get_momentum() == {
        "backbone.momentum": [0, 0, 0, 0],
        "head.momentum": [0.9],
    }
    assert "loss_scaler" in wrappers.state_dict()["head"]

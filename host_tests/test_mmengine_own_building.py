"""MMEngine's own tests of its constructor and builder, written anew from memory."""

from __future__ import annotations

import copy
from typing import Any

import mmengine
import mmengine_runs
import pytest
import torch
from mmengine.registry import Registry, build_from_cfg
from torch import nn

import functional_optim as fo

assert mmengine_runs.OURS == "functional_optim."
SIDES = {"theirs": mmengine.optim, "ours": fo}
BASE = {"type": "SGD", "lr": 0.01, "momentum": 0.0001, "weight_decay": 0.9}
LR, DECAY = 0.01, 0.9


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest) -> Any:
    """Return the module with the functions to be tested."""
    return SIDES[request.param]


class SubModel(nn.Module):
    """A depthwise convolution, a norm, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, kernel_size=1, groups=2)
        self.gn = nn.GroupNorm(2, 2)
        self.param1 = nn.Parameter(torch.ones(1))


class ExampleModel(nn.Module):
    """The model that MMEngine tests its rules on."""

    def __init__(self) -> None:
        super().__init__()
        self.param1 = nn.Parameter(torch.ones(1))
        self.conv1 = nn.Conv2d(3, 4, kernel_size=1, bias=False)
        self.conv2 = nn.Conv2d(4, 2, kernel_size=1)
        self.bn = nn.BatchNorm2d(2)
        self.sub = SubModel()


class DuplicateModel(ExampleModel):
    """One with a layer that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Sequential(nn.Conv2d(3, 4, kernel_size=1, bias=False))
        self.conv4 = nn.Sequential(nn.Conv2d(3, 4, kernel_size=1, bias=False))
        self.conv4[0] = self.conv3[0]


class PseudoDataParallel(nn.DataParallel):
    """What stands around a model."""


NAMES = [
    "param1",
    "conv1.weight",
    "conv2.weight",
    "conv2.bias",
    "bn.weight",
    "bn.bias",
    "sub.param1",
    "sub.conv1.weight",
    "sub.conv1.bias",
    "sub.gn.weight",
    "sub.gn.bias",
]


def groups_of(side: Any, rules: Any, model: Any, **base: Any) -> Any:
    """Return the groups that a constructor makes, by the name of their parameter."""
    config = {"type": "OptimWrapper", "optimizer": {**BASE, **base}}
    constructor = side.DefaultOptimWrapperConstructor(config, rules)
    optimizer = constructor(model).optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(group["params"][0])]: group for group in optimizer.param_groups}


def check(groups: Any, lr: dict[str, float], decay: dict[str, float]) -> None:
    """Check multipliers of all groups, 1 where none is given."""
    for name, group in groups.items():
        assert len(group["params"]) == 1
        assert group["momentum"] == 0.0001
        assert group["lr"] == LR * lr.get(name, 1.0), name
        assert group["weight_decay"] == DECAY * decay.get(name, 1.0), name


def test_torch_optimizers_are_registered(side: Any) -> None:
    """All classes of torch.optim by their names."""
    for name in ("ASGD", "Adadelta", "Adam", "AdamW", "LBFGS", "RMSprop", "SGD"):
        assert side.OPTIMIZERS.get(name) is getattr(torch.optim, name)


def test_build_optim_wrapper(side: Any) -> None:
    """Without rules there is one group; the config does not change."""
    model = ExampleModel()
    config = {"type": "OptimWrapper", "optimizer": dict(BASE)}
    before = copy.deepcopy(config)
    wrapper = side.build_optim_wrapper(model, config)
    assert config == before
    assert type(wrapper) is side.OptimWrapper
    (group,) = wrapper.optimizer.param_groups
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (LR, 1e-4, DECAY)
    wrapper = side.build_optim_wrapper(model, {"optimizer": dict(BASE)})
    assert type(wrapper) is side.OptimWrapper


def test_build_with_a_constructor_of_ones_own(side: Any) -> None:
    """A registered class, named in the config."""

    class MyConstructor(side.DefaultOptimWrapperConstructor):  # type: ignore[misc]
        def __call__(self, model: Any) -> Any:
            conv1_lr_mult = self.paramwise_cfg.get("conv1_lr_mult", 1.0)
            params = []
            for name, param in model.named_parameters():
                group = {"params": [param]}
                if name.startswith("conv1") and param.requires_grad:
                    group["lr"] = self.base_lr * conv1_lr_mult
                params.append(group)
            config = {**self.optimizer_cfg, "params": params}
            optimizer = build_from_cfg(config, side.OPTIMIZERS)
            return side.OptimWrapper(optimizer)

    registry = side.OPTIM_WRAPPER_CONSTRUCTORS
    registry.register_module(name="MyOwn", module=MyConstructor)
    try:
        wrapper = side.build_optim_wrapper(
            ExampleModel(),
            {
                "type": "OptimWrapper",
                "constructor": "MyOwn",
                "optimizer": dict(BASE),
                "paramwise_cfg": {"conv1_lr_mult": 5},
            },
        )
    finally:
        del registry.module_dict["MyOwn"]
    rates = wrapper.get_lr()["lr"]
    assert rates == [LR * 5 if name == "conv1.weight" else LR for name in NAMES]


def test_an_optimizer_of_ones_own_is_registered(side: Any) -> None:
    """By a decorator, with an alias, and in a registry below."""

    class MyOptimizer(torch.optim.SGD):
        pass

    registry = Registry("test optimizer", parent=side.OPTIMIZERS, scope="test_scope")
    try:
        registry.register_module(module=MyOptimizer)
        params = list(nn.Linear(1, 1).parameters())
        # A Runner before may have set another scope.
        config = {"type": "MyOptimizer", "_scope_": "test_scope", "lr": 0.1}
        built = build_from_cfg(config, registry, {"params": params})
        assert type(built) is MyOptimizer
        assert registry.get("SGD") is torch.optim.SGD
        assert side.OPTIMIZERS.get("test_scope.MyOptimizer") is MyOptimizer
    finally:
        del side.OPTIMIZERS.children["test_scope"]


@pytest.mark.parametrize(
    ("config", "rules", "error"),
    [
        ([], None, TypeError),
        ({"type": "OptimWrapper"}, None, AssertionError),
        ({"optimizer": {"type": "SGD", "lr": 0.01}}, ["error"], TypeError),
        ({"optimizer": {"type": "SGD", "lr": 0.01}}, {"custom_keys": []}, TypeError),
        (
            {"optimizer": {"type": "SGD", "lr": 0.01}},
            {"custom_keys": {"a": {"decay_mult": 2}}},
            ValueError,
        ),
        *(
            ({"optimizer": {"type": "SGD", "lr": 0.01}}, {rule: 0.1}, ValueError)
            for rule in ("bias_decay_mult", "norm_decay_mult", "dwconv_decay_mult")
        ),
    ],
)
def test_wrong_configs(side: Any, config: Any, rules: Any, error: Any) -> None:
    """Each is refused when the constructor is made."""
    with pytest.raises(error):
        side.DefaultOptimWrapperConstructor(config, rules)


def test_wrapped_models_are_looked_through(side: Any) -> None:
    """Rules see the names of the model inside."""
    model = ExampleModel()
    groups = groups_of(side, {"bias_lr_mult": 2}, model)
    config = {"type": "OptimWrapper", "optimizer": dict(BASE)}
    constructor = side.DefaultOptimWrapperConstructor(config, {"bias_lr_mult": 2})
    wrapped = constructor(PseudoDataParallel(model)).optimizer.param_groups
    assert [g["lr"] for g in wrapped] == [g["lr"] for g in groups.values()]


RULES = {
    "bias_lr_mult": 2,
    "bias_decay_mult": 0.5,
    "norm_decay_mult": 0,
    "dwconv_decay_mult": 0.1,
    "flat_decay_mult": 0.3,
}


def test_rules_by_kind(side: Any) -> None:
    """Biases, norms, depthwise convolutions, flat parameters."""
    groups = groups_of(side, RULES, ExampleModel())
    assert list(groups) == NAMES
    check(
        groups,
        {"conv2.bias": 2, "sub.conv1.bias": 2},
        {
            "param1": 0.3,
            "conv2.bias": 0.5,
            "bn.weight": 0,
            "bn.bias": 0,
            "sub.param1": 0.3,
            "sub.conv1.weight": 0.1,
            "sub.conv1.bias": 0.5,
            "sub.gn.weight": 0,
            "sub.gn.bias": 0,
        },
    )


def test_frozen_parameters_are_skipped(side: Any) -> None:
    """They get no group."""
    model = ExampleModel()
    for param in model.sub.parameters():
        param.requires_grad = False
    assert list(groups_of(side, RULES, model)) == NAMES[:6]


def test_duplicates(side: Any) -> None:
    """Refused in torch's words, or skipped."""
    message = "some parameters appear in more than one parameter group"
    with pytest.raises(ValueError, match=message):
        groups_of(side, RULES, DuplicateModel())
    groups = groups_of(side, {**RULES, "bypass_duplicate": True}, DuplicateModel())
    assert list(groups) == [*NAMES, "conv3.0.weight"]


def test_custom_keys(side: Any) -> None:
    """The longest key of a name decides; other keys go into the group."""
    rules = {
        "custom_keys": {
            "param1": {"lr_mult": 10, "momentum": 0.0001},
            "sub": {"lr_mult": 0.1, "decay_mult": 0},
            "sub.gn": {"lr_mult": 0.01},
            "non_exist_key": {"lr_mult": 0.0},
        },
        "norm_decay_mult": 0.5,
    }
    groups = groups_of(side, rules, ExampleModel())
    check(
        groups,
        {
            "param1": 10,
            "sub.param1": 10,
            "sub.conv1.weight": 0.1,
            "sub.conv1.bias": 0.1,
            "sub.gn.weight": 0.01,
            "sub.gn.bias": 0.01,
        },
        {
            "bn.weight": 0.5,
            "bn.bias": 0.5,
            "sub.conv1.weight": 0,
            "sub.conv1.bias": 0,
        },
    )
    assert groups["param1"]["lr_mult"] == 10


def test_custom_keys_without_decay(side: Any) -> None:
    """Rates alone need no weight decay in the optimizer's config."""
    config = {"optimizer": {"type": "SGD", "lr": LR, "momentum": 0.1}}
    rules = {"custom_keys": {"param1": {"lr_mult": 10}}}
    constructor = side.DefaultOptimWrapperConstructor(config, rules)
    groups = constructor(ExampleModel()).optimizer.param_groups
    assert [group["lr"] for group in groups] == [
        LR * 10 if "param1" in name else LR for name in NAMES
    ]
    assert {group["weight_decay"] for group in groups} == {0}

"""Optimizer wrappers from configs: the guide's examples, and what is refused."""

from __future__ import annotations

import copy
import functools
import logging
from collections import OrderedDict

import pytest
import torch
from torch import nn

import functional_optim as fo
from functional_optim.config._configs import unwrap_model
from functional_optim.config._registries import OPTIM_WRAPPERS

SGD = {"type": "SGD", "lr": 0.01, "weight_decay": 0.0001}


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


@OPTIM_WRAPPERS.register_module()
class PlainWrapper:
    """The least that a wrapper is."""

    def __init__(self, optimizer, accumulative_counts=1):
        self.optimizer, self.accumulative_counts = optimizer, accumulative_counts


def build(model, *, paramwise_cfg=None, **cfg):
    """Build a plain wrapper."""
    cfg = {"type": "PlainWrapper", "optimizer": SGD, **cfg}
    return fo.build_optim_wrapper(model, {**cfg, "paramwise_cfg": paramwise_cfg})


def messages(caplog, level=logging.INFO):
    return [r.getMessage() for r in caplog.records if r.levelno == level]


KEYS = {
    "custom_keys": {
        "backbone.layer0": {"lr_mult": 0, "decay_mult": 0},
        "backbone": {"lr_mult": 1},
        "head": {"lr_mult": 0.1},
    }
}


def test_groups_are_those_of_mmengine() -> None:
    """As recorded from MMEngine 0.10.7 for the guide's example."""
    model = ToyModel()
    groups = build(model, paramwise_cfg=KEYS).optimizer.param_groups
    shown = [
        {k: g[k] for k in ("lr", "weight_decay", "lr_mult", "decay_mult") if k in g}
        for g in groups
    ]
    first = {"lr": 0.0, "weight_decay": 0.0, "lr_mult": 0, "decay_mult": 0}
    second = {"lr": 0.01, "weight_decay": 0.0001, "lr_mult": 1}
    third = {"lr": 0.001, "weight_decay": 0.0001, "lr_mult": 0.1}
    assert shown == [first] * 2 + [second] * 2 + [third] * 4
    assert [g["params"][0] for g in groups] == list(model.parameters())
    assert all(len(g["params"]) == 1 for g in groups)


def test_without_rules_there_is_one_group() -> None:
    """No `paramwise_cfg`, or an empty one: all parameters in one group."""
    for rules in (None, {}):
        model = ToyModel()
        wrapper = build(model, paramwise_cfg=rules, accumulative_counts=3)
        (group,) = wrapper.optimizer.param_groups
        assert group["params"] == list(model.parameters())
        assert wrapper.accumulative_counts == 3


def test_default_wrapper_knows_names_and_rules() -> None:
    """By default an OptimWrapper is built, and told names and rules."""
    model = ToyModel()
    cfg = {"optimizer": SGD, "paramwise_cfg": {"norm_decay_mult": 0, "lr_mult": 2}}
    wrapper = fo.build_optim_wrapper(model, cfg)
    assert type(wrapper).__name__ == "OptimWrapper"
    names = {id(param): name for name, param in model.named_parameters()}
    assert wrapper.parameter_names == names
    assert wrapper.paramwise_sources["head.bn.bias"] == "lr_mult, norm_decay_mult"
    assert wrapper.paramwise_sources["head.linear.bias"] == "lr_mult"
    del cfg["paramwise_cfg"]
    wrapper = fo.build_optim_wrapper(model, cfg)
    assert wrapper.paramwise_sources == dict.fromkeys(names.values(), "")


class LayerDecayOptimizerConstructor(fo.DefaultOptimWrapperConstructor):
    """The guide's constructor, as it is but for the logger."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg=None)
        self.decay_factor = paramwise_cfg.get("decay_factor", 0.5)

        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def add_params(self, params, module, prefix="", lr=None):
        """Add a group for each parameter."""
        if lr is None:
            lr = self.base_lr

        for name, param in module.named_parameters(recurse=False):
            param_group = {}
            param_group["params"] = [param]
            param_group["lr"] = lr
            params.append(param_group)
            full_name = f"{prefix}.{name}" if prefix else name
            logging.getLogger("functional_optim").info(f"{full_name} : lr={lr}")

        for name, child in module.named_children():
            child_prefix = f"{prefix}.{name}" if prefix else name
            self.add_params(params, child, child_prefix, lr=lr * self.decay_factor)


def test_guides_constructor_works_unchanged(caplog) -> None:
    """Layer-wise decay as the guide writes it, selected by name or as a class."""
    kind = LayerDecayOptimizerConstructor
    fo.OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)(kind)
    model = nn.ModuleDict(
        {"layer": nn.ModuleDict({"linear": nn.Linear(1, 1)}), "linear": nn.Linear(1, 1)}
    )
    for constructor in ("LayerDecayOptimizerConstructor", kind):
        caplog.clear()
        with caplog.at_level(logging.INFO, "functional_optim"):
            wrapper = fo.build_optim_wrapper(
                model,
                {
                    "optimizer": SGD,
                    "paramwise_cfg": {"decay_factor": 0.5},
                    "constructor": constructor,
                },
            )
        assert messages(caplog) == [
            "layer.linear.weight : lr=0.0025",
            "layer.linear.bias : lr=0.0025",
            "linear.weight : lr=0.005",
            "linear.bias : lr=0.005",
        ]
        assert not messages(caplog, logging.WARNING)
        lrs = [group["lr"] for group in wrapper.optimizer.param_groups]
        assert lrs == [0.0025, 0.0025, 0.005, 0.005]
        assert set(wrapper.paramwise_sources.values()) == {""}


def test_derived_constructor_may_add_to_the_rules() -> None:
    """A derived class has keys of its own, and calls the rules that it inherits."""

    class Halved(fo.DefaultOptimWrapperConstructor):
        def add_params(self, params, module, prefix="", is_dcn_module=None):
            start = len(params)
            super().add_params(params, module, prefix, is_dcn_module)
            if not prefix:
                for group in params[start:]:
                    group["lr"] = self.paramwise_cfg["own"]

    rules = {"own": 7.0, "norm_decay_mult": 0.0}
    groups = build(ToyModel(), paramwise_cfg=rules, constructor=Halved).optimizer
    assert {group["lr"] for group in groups.param_groups} == {7.0}
    assert groups.param_groups[-1]["weight_decay"] == 0.0


def test_constructor_may_return_several_wrappers() -> None:
    """The guide's way to several optimizers: whatever the constructor returns."""

    class Multiple:
        def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
            self.cfg = optim_wrapper_cfg

        def __call__(self, model):
            return {
                name: build(child, optimizer=self.cfg[name])
                for name, child in model.named_children()
            }

    cfg = {"backbone": SGD, "head": {**SGD, "lr": 3.0}, "constructor": Multiple}
    found = fo.build_optim_wrapper(ToyModel(), cfg)
    assert found["head"].optimizer.param_groups[0]["lr"] == 3.0


def test_attributes_are_those_of_mmengine() -> None:
    """Derived classes read these names."""
    cfg = {"type": "PlainWrapper", "optimizer": SGD, "accumulative_counts": 2}
    constructor = fo.DefaultOptimWrapperConstructor(cfg, {"norm_decay_mult": 0.0})
    assert (constructor.base_lr, constructor.base_wd) == (0.01, 0.0001)
    assert constructor.optimizer_cfg == SGD
    assert constructor.paramwise_cfg == {"norm_decay_mult": 0.0}
    assert constructor.optim_wrapper_cfg == {
        "type": "PlainWrapper",
        "accumulative_counts": 2,
    }
    assert fo.DefaultOptimWrapperConstructor(cfg).paramwise_cfg == {}
    params = []
    constructor.add_params(params, nn.LayerNorm(1), prefix="a")
    assert [group["weight_decay"] for group in params] == [0.0, 0.0]
    assert constructor._is_in(params[0], params)
    assert not constructor._is_in(params[0], params[1:])
    single = {"params": params[0]["params"][0]}
    assert constructor._is_in(single, params)
    assert single["params"] is params[0]["params"][0]  # It only looks.


def test_configs_never_change() -> None:
    """Neither dict nor list in a config changes, nor a tensor in it."""
    lr = torch.tensor(0.5)
    cfg = {
        "type": PlainWrapper,
        "optimizer": {"type": "Adam", "lr": lr, "betas": [0.9, 0.99]},
        "paramwise_cfg": copy.deepcopy(KEYS) | {"lr_mult": 0.5},
    }
    for options in cfg["paramwise_cfg"]["custom_keys"].values():
        options.pop("decay_mult", None)
        options["note"] = [3]
    before = copy.deepcopy(cfg)
    for _ in range(2):
        wrapper = fo.build_optim_wrapper(ToyModel(), cfg)
        for group in wrapper.optimizer.param_groups:
            group["lr"].fill_(9.0)
            group["note"].append(1)
    assert cfg == before
    assert cfg["optimizer"]["lr"] is lr
    assert lr == 0.5


def test_objects_in_configs_stay_the_same() -> None:
    """What is no config, such as a scaler that wrappers share, is not copied."""
    shared = object()
    OPTIM_WRAPPERS.register_module("seen", force=True, module=lambda **kw: kw)
    found = build(ToyModel(), type="seen", scaler=shared, transform=(shared,))
    assert found["scaler"] is shared
    assert found["transform"][0] is shared


class ConfigDict(dict):
    """A dict of a class of its own, as MMEngine's."""

    __getattr__ = dict.__getitem__


class Config:
    """A config that is no dict, as MMEngine's."""

    def __init__(self, data):
        self.data = data

    def keys(self):
        """Return the keys."""
        return self.data.keys()

    def __iter__(self):
        return iter(self.data)

    def __getitem__(self, key):
        return self.data[key]


def test_configs_of_other_classes_work() -> None:
    """MMEngine's Config and ConfigDict, which keeps its class for derived ones."""
    seen = []

    class Reader(fo.DefaultOptimWrapperConstructor):
        def add_params(self, params, module, prefix="", is_dcn_module=None):
            seen.append(self.paramwise_cfg.own)
            super().add_params(params, module, prefix, is_dcn_module)

    cfg = Config(
        {
            "type": "PlainWrapper",
            "optimizer": ConfigDict(SGD),
            "paramwise_cfg": ConfigDict(own=3, norm_decay_mult=0.0),
            "constructor": Reader,
        }
    )
    wrapper = fo.build_optim_wrapper(ToyModel(), cfg)
    assert set(seen) == {3}
    assert wrapper.optimizer.param_groups[-1]["weight_decay"] == 0.0


# -- parameters ------------------------------------------------------------------------


def test_frozen_parameters_are_skipped(caplog) -> None:
    """With rules frozen parameters get no group, and a warning each."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model.requires_grad_(requires_grad=False)[1].requires_grad_()
    model.register_parameter("top", nn.Parameter(torch.ones(1), requires_grad=False))
    with caplog.at_level(logging.WARNING, "functional_optim"):
        wrapper = build(model, paramwise_cfg={"bias_lr_mult": 2.0})
    assert messages(caplog, logging.WARNING) == [
        f"{name} is skipped since its requires_grad=False"
        for name in ("top", "0.weight", "0.bias")
    ]
    assert len(wrapper.optimizer.param_groups) == 2


def _tied() -> nn.Module:
    shared = nn.Linear(1, 1)
    return nn.ModuleDict({"a": nn.ModuleDict({"x": shared}), "b": shared})


def test_duplicates_are_skipped_if_asked(caplog) -> None:
    """`bypass_duplicate` keeps the first, and warns with MMEngine's words."""
    rules = {"bypass_duplicate": True, "custom_keys": {"a": {"lr_mult": 2.0}}}
    with caplog.at_level(logging.WARNING, "functional_optim"):
        wrapper = build(_tied(), paramwise_cfg=rules)
    assert messages(caplog, logging.WARNING) == [
        "b is duplicate. It is skipped since bypass_duplicate=True "
        f"(parameter b.{name})"
        for name in ("weight", "bias")
    ]
    assert [group["lr"] for group in wrapper.optimizer.param_groups] == [0.02, 0.02]


@pytest.mark.parametrize("constructor", ["default", "guide"])
def test_duplicates_are_named_otherwise(constructor) -> None:
    """torch refuses a parameter in two groups; here the error names it."""
    rules, kind = {"bias_lr_mult": 2.0}, fo.DefaultOptimWrapperConstructor
    if constructor == "guide":
        rules, kind = {"decay_factor": 0.5}, LayerDecayOptimizerConstructor
    with pytest.raises(
        ValueError, match=r"'a\.x\.weight' comes twice, also as 'b\.weight'"
    ):
        build(_tied(), paramwise_cfg=rules, constructor=kind)
    # Without rules there is one group, and each parameter in it once.
    (group,) = build(_tied()).optimizer.param_groups
    assert len(group["params"]) == 2


class DistributedDataParallel(nn.Module):
    """One of the wrappers, known by its name."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class PseudoDataParallel(DistributedDataParallel):
    """One that tests in MMEngine use."""


def test_parallel_wrappers_are_looked_through() -> None:
    """DataParallel, DDP, FSDP by class or name, torch.compile, and nested ones."""
    model = ToyModel()
    assert unwrap_model(model) is model
    for around in (nn.DataParallel, DistributedDataParallel, PseudoDataParallel):
        assert unwrap_model(around(model)) is model
    assert (
        unwrap_model(torch.compile(PseudoDataParallel(model), backend="eager")) is model
    )
    wrapper = fo.build_optim_wrapper(
        PseudoDataParallel(model), {"optimizer": SGD, "paramwise_cfg": KEYS}
    )
    assert (
        set(wrapper.parameter_names.values()) == dict(model.named_parameters()).keys()
    )


def test_child_called_module_is_no_wrapper() -> None:
    """A model with a part called `module` keeps its other parts, and its names."""
    model = nn.ModuleDict({"module": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    wrapper = build(model, paramwise_cfg={"custom_keys": {"module": {"lr_mult": 2.0}}})
    lrs = [group["lr"] for group in wrapper.optimizer.param_groups]
    assert lrs == [0.02, 0.02, 0.01, 0.01]
    # Not even if the name says otherwise.
    model = PseudoDataParallel(nn.Linear(1, 1))
    model.head = nn.Linear(1, 1)
    assert unwrap_model(model) is model
    model.module = None
    assert unwrap_model(model) is model


# -- optimizers ------------------------------------------------------------------------


def test_first_argument_may_have_any_name() -> None:
    """The parameters go to the optimizer's first argument, whatever it is called."""

    class HybridAdam(torch.optim.Adam):
        def __init__(self, model_params, lr=1.0):
            super().__init__(model_params, lr=lr)

    for kind in (HybridAdam, functools.partial(HybridAdam, lr=2.0)):
        wrapper = build(ToyModel(), optimizer={"type": kind})
        assert isinstance(wrapper.optimizer, HybridAdam)
        with pytest.raises(ValueError, match="leave model_params out"):
            build(ToyModel(), optimizer={"type": kind, "model_params": []})

    def with_anything(**options):
        return torch.optim.SGD(**options)

    assert build(ToyModel(), optimizer={**SGD, "type": with_anything}).optimizer


@pytest.mark.parametrize("rules", [None, {"norm_decay_mult": 0.0}])
def test_presets_know_the_names(rules) -> None:
    """A preset sees the names of the parameters, so that masks by name work."""
    optimizer = {
        "type": "fo.adamw",
        "lr": 0.1,
        "weight_decay": 0.5,
        "mask": fo.exclude("*.bias"),
    }
    model = ToyModel()
    wrapper = build(model, optimizer=optimizer, paramwise_cfg=rules)
    assert isinstance(wrapper.optimizer, fo.TransformOptimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    wrapper.optimizer.step()
    for name, param in model.named_parameters():
        decays = "bias" not in name and not (rules and "bn" in name)
        wanted = before[name] * 0.95 if decays else before[name]
        torch.testing.assert_close(param.detach(), wanted)


def test_transform_optimizer_can_be_named() -> None:
    """`TransformOptimizer` with a transform of one's own."""
    optimizer = {"type": "TransformOptimizer", "transform": fo.sgd(0.1)}
    assert build(ToyModel(), optimizer=optimizer).optimizer.param_groups[0]["lr"] == 0.1


def test_int_settings_and_options_pass_through() -> None:
    """What custom keys have beside multipliers stands in the group as it is."""
    keys = {"custom_keys": {"bias": {"momentum": 0.5, "lr": 7.0, "note": "x"}}}
    wrapper = build(ToyModel(), optimizer={**SGD, "lr": 1}, paramwise_cfg=keys)
    weight, bias = wrapper.optimizer.param_groups[:2]
    assert (weight["lr"], weight["momentum"]) == (1, 0)
    assert (bias["lr"], bias["momentum"], bias["note"]) == (7.0, 0.5, "x")


def test_options_need_no_base_values() -> None:
    """A custom key without multipliers needs neither lr nor weight_decay."""
    keys = {"custom_keys": {"bias": {"note": 1}}}
    wrapper = build(ToyModel(), optimizer={"type": "SGD"}, paramwise_cfg=keys)
    assert wrapper.optimizer.param_groups[1]["note"] == 1
    assert wrapper.optimizer.param_groups[1]["lr"] == 1e-3


# -- mistakes --------------------------------------------------------------------------

NO_LR = {"type": "SGD", "weight_decay": 0.1}
NO_DECAY = {"type": "SGD", "lr": 0.1}


@pytest.mark.parametrize(
    "rule", ["lr_mult", "bias_lr_mult", "dcn_offset_lr_mult", "custom_keys"]
)
def test_rules_for_lr_need_a_base_lr(rule) -> None:
    """MMEngine fails with a product of None; here the error says what is missing."""
    value = {"a": {"lr_mult": 1.0}} if rule == "custom_keys" else 1.0
    with pytest.raises(
        ValueError, match=f"^base_lr should not be None: {rule}.*lr=..."
    ):
        build(ToyModel(), optimizer=NO_LR, paramwise_cfg={rule: value})


@pytest.mark.parametrize(
    "rule",
    [
        "decay_mult",
        "norm_decay_mult",
        "bias_decay_mult",
        "dwconv_decay_mult",
        "flat_decay_mult",
        "custom_keys",
    ],
)
def test_rules_for_decay_need_a_base_decay(rule) -> None:
    """As in MMEngine, and for all of these rules."""
    value = {"a": {"decay_mult": 1.0}} if rule == "custom_keys" else 1.0
    match = f"^base_wd should not be None: {rule}.*weight_decay=..."
    with pytest.raises(ValueError, match=match):
        build(ToyModel(), optimizer=NO_DECAY, paramwise_cfg={rule: value})


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        ({"type": "OptimWraper"}, KeyError, "did you mean 'OptimWrapper'"),
        (
            {"constructor": "DefaultConstructor"},
            KeyError,
            "did you mean 'DefaultOptimWrapper",
        ),
        ({"optimizer": {"type": "SDG"}}, KeyError, "did you mean 'SGD'"),
        ({"optimizer": {"type": "fo.AdamW"}}, KeyError, "did you mean 'fo.adamw'"),
        ({"optimizer": {"lr": 1.0}}, KeyError, 'must have a "type"'),
        ({"optimizer": "SGD"}, TypeError, "must be a config .* got 'SGD'"),
        ({"optimizer": {**SGD, "momentun": 1}}, TypeError, "did you mean 'momentum'"),
        ({"optimizer": {**SGD, "lr": "0.1"}}, TypeError, "lr in optimizer .* '0.1'"),
        ({"optimizer": {**SGD, "lr": -1}}, ValueError, "finite and >= 0, got -1"),
        ({"optimizer": {**SGD, "lr": float("nan")}}, ValueError, "finite"),
        ({"optimizer": {**SGD, "weight_decay": True}}, TypeError, "weight_decay in"),
        ({"optimizer": {**SGD, "params": []}}, ValueError, "leave params out"),
        (
            {"optimizer": {**SGD, "accumulative_counts": 2}},
            TypeError,
            "accumulative_counts=2, which belongs beside it",
        ),
        (
            {"optimizer": {**SGD, "paramwise_cfg": {}}},
            TypeError,
            "paramwise_cfg={}, which belongs beside it",
        ),
        ({"momentum": 0.9}, TypeError, "momentum=0.9 belongs into the optimizer"),
        ({"paramwise": {}}, TypeError, "paramwise={}; did you mean 'paramwise_cfg'"),
        ({"accumulative_count": 2}, TypeError, "did you mean 'accumulative_counts'"),
    ],
)
def test_wrong_config_is_refused(cfg, error, message) -> None:
    """Errors name the key, its value and the remedy."""
    cfg = {"type": "PlainWrapper", "optimizer": SGD, **cfg}
    with pytest.raises(error, match=message):
        fo.build_optim_wrapper(ToyModel(), cfg)


def test_wrong_arguments_are_refused() -> None:
    """No config, no optimizer in it, no model."""
    for cfg in (None, [SGD], "SGD"):
        with pytest.raises(TypeError, match="cfg must be a dict such as"):
            fo.build_optim_wrapper(ToyModel(), cfg)
        with pytest.raises(TypeError, match="optim_wrapper_cfg should be a dict"):
            fo.DefaultOptimWrapperConstructor(cfg)
    # MMEngine asserts, so this is an AssertionError, too.
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match='must contain "optimizer" config'):
            fo.build_optim_wrapper(ToyModel(), {"type": "PlainWrapper"})
    with pytest.raises(
        TypeError, match=r"model must be a torch\.nn\.Module, got a list"
    ):
        build([torch.ones(1)])


@pytest.mark.parametrize(
    "lr", [lambda step: 0.1 / (1 + step), {"a.weight": 0.1, "a.bias": 0.2}]
)
def test_schedule_or_map_cannot_be_multiplied(lr) -> None:
    """Presets take schedules and maps; with rules the error names the way out."""
    optimizer = {"type": "fo.sgd", "lr": lr}
    model = nn.ModuleDict({"a": nn.Linear(1, 1)})
    build(model, optimizer=optimizer)
    with pytest.raises(TypeError, match="map by name, by MultiplyParamwise"):
        build(model, optimizer=optimizer, paramwise_cfg={"lr_mult": 1.0})


def test_products_must_be_finite() -> None:
    """Two numbers that are legal alone may have a product that is not."""
    optimizer = {"type": "SGD", "lr": 1e300}
    with pytest.raises(ValueError, match=r"lr of .* would be 1e\+300 \* 1e\+300"):
        build(ToyModel(), optimizer=optimizer, paramwise_cfg={"lr_mult": 1e300})

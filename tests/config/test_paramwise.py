"""`paramwise_cfg`: each rule, as MMEngine applies it, and what it refuses.

The tables were recorded from MMEngine 0.10.7.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import functional_optim as fo
from functional_optim.config._paramwise import is_deformable, is_norm, strip_wrappers
from functional_optim.core._selection import substrings_of


class DeformConv2d(nn.Module):
    """A deformable convolution, known by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, 1, 1))
        self.bias = nn.Parameter(torch.ones(2))


class DeformConv2dPack(DeformConv2d):
    """One that has the convolution for its offsets in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_offset = nn.Conv2d(2, 4, 1)
        self.norm = nn.BatchNorm2d(2)
        self.mix = nn.Linear(1, 1)


class Model(nn.Module):
    """One of every kind that has a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.conv = nn.Conv2d(2, 2, 1)
        self.bn = nn.BatchNorm2d(2)
        self.depthwise = nn.Conv2d(2, 2, 1, groups=2)
        self.deform = DeformConv2dPack()


ALL = {
    "bias_lr_mult": 2.0,
    "dcn_offset_lr_mult": 0.1,
    "norm_decay_mult": 0.0,
    "bias_decay_mult": 0.5,
    "dwconv_decay_mult": 0.25,
    "flat_decay_mult": 0.75,
}
CUSTOM = {"bn": {"lr_mult": 4.0}, "deform.norm": {"decay_mult": 8.0}, "conv": {}}
NORMS = ("bn.weight", "bn.bias", "deform.norm.weight", "deform.norm.bias")
OFFSETS = ("deform.conv_offset.weight", "deform.conv_offset.bias")
FREE_BIASES = ("conv.bias", "depthwise.bias", "deform.bias")

# What differs from (1, 1), by name.
RECORDED = [
    ({"bias_lr_mult": 2.0}, dict.fromkeys(FREE_BIASES, (2.0, 1.0))),
    ({"dcn_offset_lr_mult": 0.1}, dict.fromkeys(OFFSETS, (0.1, 1.0))),
    ({"norm_decay_mult": 0.0}, dict.fromkeys(NORMS, (1.0, 0.0))),
    (
        {"bias_decay_mult": 0.5},
        dict.fromkeys((*FREE_BIASES, "bn.bias"), (1.0, 0.5)),
    ),
    (
        {"dwconv_decay_mult": 0.25},
        {"depthwise.weight": (1.0, 0.25), "depthwise.bias": (1.0, 0.25)},
    ),
    (
        {"flat_decay_mult": 0.75},
        dict.fromkeys((*FREE_BIASES, "scale", "bn.weight", "bn.bias"), (1.0, 0.75)),
    ),
    (
        {"bias_decay_mult": 0.5, "flat_decay_mult": 0.75},
        {
            "scale": (1.0, 0.75),
            "bn.weight": (1.0, 0.75),
            **dict.fromkeys((*FREE_BIASES, "bn.bias"), (1.0, 0.5)),
        },
    ),
    (
        ALL,
        {
            "scale": (1.0, 0.75),
            "depthwise.weight": (1.0, 0.25),
            **dict.fromkeys(FREE_BIASES, (2.0, 0.5)),
            **dict.fromkeys(OFFSETS, (0.1, 1.0)),
            **dict.fromkeys(NORMS, (1.0, 0.0)),
        },
    ),
    (
        {**ALL, "custom_keys": CUSTOM},
        {
            "scale": (1.0, 0.75),
            "bn.weight": (4.0, 1.0),
            "bn.bias": (4.0, 1.0),
            "depthwise.weight": (1.0, 0.25),
            "depthwise.bias": (2.0, 0.5),
            "deform.bias": (2.0, 0.5),
            "deform.norm.weight": (1.0, 8.0),
            "deform.norm.bias": (1.0, 8.0),
        },
    ),
]
each_recorded = pytest.mark.parametrize(
    ("rules", "expected"), RECORDED, ids=[" ".join(r) for r, _ in RECORDED]
)


@each_recorded
def test_multipliers_are_those_of_mmengine(rules, expected) -> None:
    """All parameters have the recorded multipliers, in the order of the model."""
    model = Model()
    found = fo.paramwise_multipliers(model, rules)
    names = [name for name, _ in model.named_parameters()]
    assert list(found) == names
    assert found == {name: expected.get(name, (1.0, 1.0)) for name in names}
    assert all(isinstance(value, fo.Multipliers) for value in found.values())


@each_recorded
def test_constructor_decides_the_same(rules, expected) -> None:
    """A group for each parameter, with the base values times the multipliers."""
    model = Model()
    optimizer = {"type": "SGD", "lr": 0.3, "weight_decay": 0.7}
    constructor = fo.DefaultOptimWrapperConstructor({"optimizer": optimizer}, rules)
    groups = constructor(model).optimizer.param_groups
    for (name, param), group in zip(model.named_parameters(), groups, strict=True):
        assert group["params"][0] is param
        lr, decay = expected.get(name, (1.0, 1.0))
        assert (group["lr"], group["weight_decay"]) == (0.3 * lr, 0.7 * decay)


@pytest.mark.parametrize("rule", ["lr_mult", "decay_mult"])
def test_rules_for_all_multiply_what_else_applies(rule) -> None:
    """`lr_mult` and `decay_mult` multiply what won, where no custom key decides."""
    rules = {**ALL, "custom_keys": CUSTOM}
    before = fo.paramwise_multipliers(Model(), rules)
    after = fo.paramwise_multipliers(Model(), {**rules, rule: 0.5})
    for name, old in before.items():
        lr, decay = (0.5, 1.0) if rule == "lr_mult" else (1.0, 0.5)
        if any(key in name for key in CUSTOM):
            lr = decay = 1.0
        assert after[name] == (old.lr * lr, old.weight_decay * decay)


def test_composing_rules_multiply() -> None:
    """With `compose` every rule that fits multiplies."""
    rules = {
        **ALL,
        "lr_mult": 10.0,
        "compose": True,
        "custom_keys": {
            "deform": {"lr_mult": 3.0, "decay_mult": 5.0},
            "deform.conv_offset": {"lr_mult": 7.0},
            "bias": {"decay_mult": 11.0},
        },
    }
    found = fo.paramwise_multipliers(Model(), rules)
    assert found["deform.conv_offset.bias"] == pytest.approx(
        (10.0 * 3.0 * 7.0 * 0.1, 5.0 * 11.0)
    )
    assert found["deform.bias"] == (10.0 * 3.0 * 2.0, 5.0 * 11.0 * 0.5 * 0.75)
    assert found["deform.norm.weight"] == (10.0 * 3.0, 0.0)
    assert found["scale"] == (10.0, 0.75)


def test_composed_options_hold_products() -> None:
    """The group has the products; of other options those of the longest key."""
    rules = {
        "compose": True,
        "custom_keys": {
            "conv": {"lr_mult": 3.0, "note": "short"},
            "conv.weight": {"lr_mult": 5.0, "note": "long"},
        },
    }
    cfg = {"optimizer": {"type": "SGD", "lr": 1.0}}
    wrapper = fo.DefaultOptimWrapperConstructor(cfg, rules)(Model())
    group = wrapper.optimizer.param_groups[1]
    assert (group["lr"], group["lr_mult"], group["note"]) == (15.0, 15.0, "long")


def test_longest_piece_of_a_name_wins() -> None:
    """The longest key decides, ties by alphabet; at the top a name has a dot, too."""
    assert substrings_of("a.bias", ["a.", "bias", "as", ".b", "z"]) == [
        "bias",
        ".b",
        "a.",
        "as",
    ]
    assert substrings_of("pos", [".pos", "a.pos"]) == [".pos"]
    assert substrings_of("a.pos", [".a.pos"]) == []
    rules = {"custom_keys": {"onv": {"lr_mult": 2}, "con": {"lr_mult": 3}}}
    assert fo.paramwise_multipliers(Model(), rules)["conv.weight"].lr == 3


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_rms_norms_are_norms(norm) -> None:
    """RMS norms count, torch's and those that models bring."""

    class LlamaRMSNorm(nn.Module):
        pass

    assert is_norm(norm(2))
    assert is_norm(LlamaRMSNorm())
    assert is_norm(nn.SyncBatchNorm(2))
    assert is_norm(nn.InstanceNorm2d(2))
    assert is_norm(nn.GroupNorm(1, 2))
    assert not is_norm(nn.Linear(1, 1))


def test_deformable_convolutions_are_known_by_name() -> None:
    """The name of the class or of one that it derives from tells."""
    classes = {
        name: type(name, (nn.Module,), {})
        for name in ("ModulatedDeformConv2d", "ModulatedDeformConv2dPack", "Conv")
    }
    found = {name: is_deformable(cls()) for name, cls in classes.items()}
    assert list(found.values()) == [True, True, False]
    assert is_deformable(type("Mine", (DeformConv2dPack,), {})())


def test_wrappers_within_a_model_do_not_show() -> None:
    """What torch puts between a module and its name is no part of it for rules."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._checkpoint_wrapped_module = inner

    model = nn.ModuleDict({"a": Wrapper(DeformConv2dPack()), "b": nn.Linear(1, 1)})
    rules = {"dcn_offset_lr_mult": 0.5, "custom_keys": {"a.mix": {"lr_mult": 3}}}
    found = fo.paramwise_multipliers(model, rules)
    assert list(found) == [name for name, _ in model.named_parameters()]
    inner = "a._checkpoint_wrapped_module"
    assert found[f"{inner}.conv_offset.bias"].lr == 0.5
    assert found[f"{inner}.mix.bias"].lr == 3
    assert strip_wrappers(f"{inner}.mix.bias") == "a.mix.bias"


def test_frozen_and_tied_parameters() -> None:
    """Frozen ones are left out, tied ones come once, under their first name."""
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    model["b"].weight = model["a"].weight
    model["a"].bias.requires_grad_(requires_grad=False)
    rules = {"custom_keys": {"b": {"lr_mult": 3}}}
    found = fo.paramwise_multipliers(model, rules)
    assert found == {"a.weight": (1.0, 1.0), "b.bias": (3.0, 1.0)}
    assert list(found) == list(fo.parameters(model))


def test_multiply_paramwise_takes_the_multipliers() -> None:
    """The pure way has the learning rates and decays of groups."""
    model = Model()
    names = [name for name, _ in model.named_parameters()]
    found = fo.paramwise_multipliers(model, ALL)
    decays = {name: 0.1 * value.weight_decay for name, value in found.items()}
    pipeline = fo.chain(fo.sgd(0.5, weight_decay=decays), fo.MultiplyParamwise(found))
    params = fo.parameters(model)
    grads = {name: torch.full_like(p, 2.0) for name, p in params.items()}
    updates, _ = pipeline.update(grads, pipeline.init(params), params)
    for name in names:
        lr, decay = found[name]
        wanted = -0.5 * lr * (2.0 + 0.1 * decay * params[name])
        torch.testing.assert_close(updates[name], wanted)


def test_names_with_the_characters_of_globs_mean_themselves() -> None:
    """A name is its own name, whatever characters it has."""
    model = nn.ModuleDict({"a[0]": nn.Linear(1, 1), "b*": nn.Linear(1, 1)})
    found = fo.paramwise_multipliers(model, {"bias_lr_mult": 2.0})
    params = fo.parameters(model)
    transform = fo.MultiplyParamwise(found)
    updates, _ = transform.update(params, transform.init(params), params)
    assert torch.equal(updates["a[0].bias"], 2 * params["a[0].bias"])
    assert torch.equal(updates["a[0].weight"], params["a[0].weight"])


def test_multipliers_of_another_model_are_refused() -> None:
    """A name that is no parameter's is an error at `init`."""
    found = fo.paramwise_multipliers(Model(), ALL)
    with pytest.raises(ValueError, match="'scale' matches no parameter"):
        fo.MultiplyParamwise(found).init({"other": torch.ones(1)})


def test_rules_that_decide_nothing_warn(caplog) -> None:
    """A rule that matches nothing, or is always overruled, is named in a warning."""
    rules = {
        "norm_decay_mult": 0.0,
        "bias_lr_mult": 2.0,
        "custom_keys": {"bias": {}, "typo": {"lr_mult": 2}, "1.": {}, "1": {}},
    }
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with caplog.at_level(logging.WARNING, "functional_optim"):
        fo.paramwise_multipliers(model, rules)
    overruled = "every parameter that it matches is decided by another rule"
    assert [record.getMessage() for record in caplog.records] == [
        f"paramwise_cfg: bias_lr_mult has no effect, because {overruled}",
        "paramwise_cfg: norm_decay_mult matches no parameter",
        "paramwise_cfg: custom_keys['typo'] matches no parameter",
        f"paramwise_cfg: custom_keys['1'] has no effect, because {overruled}",
    ]


def test_options_that_are_no_multipliers_warn_in_the_pure_way(caplog) -> None:
    """What only a group can have does not vanish silently."""
    rules = {"custom_keys": {"bias": {"momentum": 0.5, "lr_mult": 2.0}}}
    with caplog.at_level(logging.WARNING, "functional_optim"):
        fo.paramwise_multipliers(nn.Linear(1, 1), rules)
    (record,) = caplog.records
    assert "'momentum' in custom_keys is no multiplier" in record.getMessage()


LEFT = "is no rule, it is left over from a config file"
UNREAD = {
    "decay_multi": (
        {"custom_keys": {"bias": {"decay_multi": 0.0}, "norm": {"decay_mult": 0.0}}},
        [0.0, 1.0],
        "custom_keys['bias']['decay_multi'] multiplies nothing; did you mean 'decay_m",
    ),
    "lr_multi": (
        {"custom_keys": {"bias": {"lr_multi": 0.5}}},
        [1.0, 1.0],
        "custom_keys['bias']['lr_multi'] multiplies nothing; did you mean 'lr_mult'?",
    ),
    "LR_Mult": (
        {"custom_keys": {"bias": {"LR_Mult": 0.5}}},
        [1.0, 1.0],
        "custom_keys['bias']['LR_Mult'] multiplies nothing; did you mean 'lr_mult'?",
    ),
    "_delete_": (
        {"_delete_": True, "norm_decay_mult": 0.0},
        [0.0, 0.0],
        f"paramwise_cfg['_delete_'] {LEFT}",
    ),
    "_delete": (
        {"_delete": True, "norm_decay_mult": 0.0},
        [0.0, 0.0],
        f"paramwise_cfg['_delete'] {LEFT}",
    ),
    "_delete_ in custom_keys": (
        {"custom_keys": {"_delete_": True, "bias": {"decay_mult": 0.0}}},
        [1.0, 0.0],
        f"custom_keys['_delete_'] {LEFT}",
    ),
}


class OwnConstructor(fo.DefaultOptimWrapperConstructor):
    """A constructor that never looks at the rules."""

    def add_params(self, params, module, **_) -> None:
        """Add all parameters in one group."""
        params.append({"params": module.parameters(), "lr": self.base_lr})


@pytest.mark.parametrize("case", UNREAD)
@pytest.mark.parametrize("way", ["pure", "constructor", "derived"])
def test_keys_that_mmengine_does_not_read_warn_once(case, way, caplog) -> None:
    """Official configs have such keys: they build, and a warning has the near match."""
    rules, decays, message = UNREAD[case]
    model = nn.ModuleDict({"norm": nn.LayerNorm(1)})
    cfg = {"optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 1.0}}
    with caplog.at_level(logging.WARNING, "functional_optim"):
        if way == "pure":
            found = fo.paramwise_multipliers(model, rules)
            assert [m.weight_decay for m in found.values()] == decays
        elif way == "constructor":
            groups = fo.DefaultOptimWrapperConstructor(cfg, rules)(model).param_groups
            assert [group["weight_decay"] for group in groups[:2]] == decays
        else:
            (group,) = OwnConstructor(cfg, rules)(model).param_groups
            assert len(group["params"]) == 2
    (record,) = caplog.records
    assert record.getMessage().startswith(message)


def test_unread_options_stand_in_the_group_as_in_mmengine() -> None:
    """A key that multiplies nothing is an option like any other."""
    cfg = {"optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.1}}
    rules = {"custom_keys": {"bias": {"decay_multi": 0.0}}}
    groups = fo.DefaultOptimWrapperConstructor(cfg, rules)(nn.Linear(1, 1)).param_groups
    assert groups[1]["decay_multi"] == 0.0
    assert groups[1]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (3, TypeError, "paramwise_cfg should be None or a dict, but got int 3"),
        ({"norm_decay_mul": 0}, ValueError, "did you mean 'norm_decay_mult'"),
        ({"Bias_LR_mult": 0}, ValueError, "did you mean 'bias_lr_mult'"),
        ({"xyz": 0}, ValueError, "the names are .*'bias_decay_mult'"),
        ({3: 0}, ValueError, "no rule 3"),
        ({"lr_mult": "2"}, TypeError, r"\['lr_mult'\] must be a number, got '2'"),
        ({"lr_mult": True}, TypeError, "must be a number, got True"),
        ({"lr_mult": 1j}, TypeError, "must be a number"),
        ({"lr_mult": -1}, ValueError, "must be finite and >= 0, got -1"),
        ({"decay_mult": float("nan")}, ValueError, "must be finite"),
        ({"flat_decay_mult": float("inf")}, ValueError, "must be finite"),
        ({"bypass_duplicate": 1}, TypeError, "must be a bool, got 1"),
        ({"compose": None}, TypeError, "must be a bool"),
        ({"custom_keys": ["a"]}, TypeError, "custom_keys must be a dict"),
        ({"custom_keys": None}, TypeError, "custom_keys must be a dict"),
        ({"custom_keys": {3: {}}}, TypeError, "pieces of parameter names as keys"),
        ({"custom_keys": {"a": 0.1}}, TypeError, r"such as dict\(lr_mult=0.1\)"),
        (
            {"custom_keys": {"a": {"lr_mult": "1"}}},
            TypeError,
            r"custom_keys\['a'\]\['lr_mult'\] must be a number",
        ),
        ({"custom_keys": {"a": {"decay_mult": -1}}}, ValueError, "finite and >= 0"),
        ({"custom_keys": {"a": {"bias_lr_mult": 1}}}, ValueError, "in a custom key"),
        ({"custom_keys": {"a": {"params": []}}}, ValueError, "in a custom key"),
    ],
)
def test_wrong_rules_are_refused(rules, error, message) -> None:
    """Errors name the rule, its value, and the legal ones; both ways alike."""
    with pytest.raises(error, match=message):
        fo.paramwise_multipliers(Model(), rules)
    cfg = {"optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.1}}
    with pytest.raises(error, match=message):
        fo.DefaultOptimWrapperConstructor(cfg, rules)


def test_no_model_is_refused() -> None:
    """Only a module has names and layers."""
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module, got a dict"):
        fo.paramwise_multipliers({}, {})


def test_rule_of_none_is_no_rule() -> None:
    """As in MMEngine, None is what a rule is that is not given."""
    assert fo.paramwise_multipliers(Model(), {"bias_lr_mult": None}) == (
        fo.paramwise_multipliers(Model(), {})
    )

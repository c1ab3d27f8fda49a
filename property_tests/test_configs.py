"""Configs of optimizer wrappers: right ones give base * multiplier, wrong ones fail.

The rules are written once more below, as one reads them in MMEngine's documentation:
parameter by parameter, with no thought of speed or of messages.
"""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest import TestCase

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import functional_optim as fo
from functional_optim.config._paramwise import KEYS


class DeformConv2d(nn.Module):
    """A deformable convolution with its convolution for offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2, 1, 1))
        self.bias = nn.Parameter(torch.zeros(2))
        self.conv_offset = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)


LAYERS = {
    "linear": lambda: nn.Linear(2, 2),
    "norm": lambda: nn.LayerNorm(2),
    "rms": lambda: nn.RMSNorm(2),
    "depthwise": lambda: nn.Conv2d(2, 2, 1, groups=2),
    "conv": lambda: nn.Conv2d(2, 4, 1),
    "deform": DeformConv2d,
}
MULTIPLIERS = st.floats(0, 1e6) | st.integers(0, 1000)
BASES = st.floats(0, 1e6)
DECAY_RULES = (
    "norm_decay_mult",
    "bias_decay_mult",
    "dwconv_decay_mult",
    "flat_decay_mult",
)
NUMBERS = ("lr_mult", "decay_mult", "bias_lr_mult", "dcn_offset_lr_mult", *DECAY_RULES)
PIECES = ("a", "b.", ".bias", "weight", "conv", "a.norm", "norm", "deform.conv_offset")


@st.composite
def models(draw) -> nn.Module:
    """Draw a model of two parts, in which some parameters may be frozen."""
    layers = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, unique=True)
    model = nn.Module()
    for name in "ab":
        part = nn.ModuleDict({kind: LAYERS[kind]() for kind in draw(layers)})
        model.add_module(name, part)
    model.register_parameter("bias", nn.Parameter(torch.zeros(draw(SHAPES))))
    for param in list(model.parameters())[1:]:
        param.requires_grad_(draw(st.booleans()) or draw(st.booleans()))
    return model


SHAPES = st.lists(st.integers(1, 2), max_size=2).map(tuple)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "lr_mult": MULTIPLIERS,
        "decay_mult": MULTIPLIERS,
        "note": st.text(),
        "momentum": st.floats(0, 1),
    },
)
RULES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(NUMBERS, MULTIPLIERS),
        "custom_keys": st.dictionaries(st.sampled_from(PIECES), OPTIONS),
        "bypass_duplicate": st.booleans(),
        "compose": st.booleans(),
    },
)


def _factors(
    model: nn.Module, name: str, rules: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """Return what lr and weight decay of a parameter are multiplied by, in order."""
    prefix, _, last = name.rpartition(".")
    module, param = model.get_submodule(prefix), model.get_parameter(name)
    parent = model.get_submodule(prefix.rpartition(".")[0]) if prefix else None
    in_deform = isinstance(parent, DeformConv2d)
    norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d))
    depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels
    bias = last == "bias" and not in_deform
    fits = {
        "bias_lr_mult": bias and not norm,
        "dcn_offset_lr_mult": in_deform and "conv_offset" in prefix,
        "norm_decay_mult": norm,
        "bias_decay_mult": bias,
        "dwconv_decay_mult": depthwise,
        "flat_decay_mult": param.ndim == 1 and not in_deform,
    }
    keys = [key for key in rules.get("custom_keys", {}) if key in f"{prefix}.{last}"]
    keys.sort(key=lambda key: (-len(key), key))
    composes = rules.get("compose", False)
    lrs, decays = [], []
    if composes or not keys:
        lrs += [rules[rule] for rule in ("lr_mult",) if rule in rules]
        decays += [rules[rule] for rule in ("decay_mult",) if rule in rules]
    for key in keys if composes else keys[:1]:
        lrs.append(rules["custom_keys"][key].get("lr_mult", 1.0))
        decays.append(rules["custom_keys"][key].get("decay_mult", 1.0))
    if composes or not keys:
        lrs += [rules[r] for r in fits if r in rules and fits[r] and "lr" in r]
        found = [rules[r] for r in DECAY_RULES if r in rules and fits[r]]
        decays += found if composes else found[:1]
    return lrs, decays


def _expected(base: float, factors: list[float]) -> float:
    return base * math.prod(factors[1:], start=factors[0]) if factors else base


@given(models(), RULES, BASES, BASES)
def test_right_configs_give_base_times_multiplier(model, rules, lr, decay) -> None:
    """Each group has exactly the product, and what custom keys add; nothing changes."""
    assume(any(param.requires_grad for param in model.parameters()))
    optimizer = {"type": "SGD", "lr": lr, "weight_decay": decay, "momentum": 0.25}
    cfg = {"optimizer": optimizer, "paramwise_cfg": rules}
    before = copy.deepcopy(cfg)
    groups = fo.build_optim_wrapper(model, cfg).optimizer.param_groups
    assert cfg == before
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not rules:
        assert [len(group["params"]) for group in groups] == [
            len(list(model.parameters()))
        ]
        return
    for (name, param), group in zip(trained, groups, strict=True):
        (own,) = group["params"]
        assert own is param
        lrs, decays = _factors(model, name, rules)
        assert group["lr"] == _expected(lr, lrs)
        assert group["weight_decay"] == _expected(decay, decays)
        keys = [key for key in rules.get("custom_keys", {}) if key in f".{name}"] or [
            None
        ]
        longest = min(keys, key=lambda key: (-len(key or ""), key))
        options = rules.get("custom_keys", {}).get(longest, {})
        if not rules.get("compose"):
            assert group["momentum"] == options.get("momentum", 0.25)
            assert group.get("note") == options.get("note")


@given(models(), RULES)
def test_pure_way_has_the_same_multipliers(model, rules) -> None:
    """`paramwise_multipliers` gives the products by name, in order."""
    before = copy.deepcopy(rules)
    found = fo.paramwise_multipliers(model, rules)
    assert rules == before
    assert list(found) == list(fo.parameters(model))
    for name, multipliers in found.items():
        lrs, decays = _factors(model, name, rules)
        assert multipliers == (_expected(1.0, lrs), _expected(1.0, decays))


@given(models(), RULES, st.floats(0, 1), st.floats(0, 1), st.floats(-2, 2))
def test_pure_way_steps_as_groups_do(model, rules, lr, decay, grad) -> None:
    """`MultiplyParamwise` and decays by name make the step that groups make."""
    names = list(fo.parameters(model))
    assume(names)
    for options in rules.get("custom_keys", {}).values():
        options.pop("momentum", None)
    rules.setdefault("lr_mult", 1.0)
    found = fo.paramwise_multipliers(model, rules)
    decays = {name: decay * m.weight_decay for name, m in found.items()}
    pipeline = fo.chain(fo.sgd(lr, weight_decay=decays), fo.MultiplyParamwise(found))
    model.double()
    for param in model.parameters():
        param.data.fill_(0.5)
    params = fo.parameters(model)
    grads = {name: torch.full_like(p, grad) for name, p in params.items()}
    updates, _ = pipeline.update(grads, pipeline.init(params), params)
    wanted = {name: params[name] + updates[name] for name in names}
    cfg = {"type": "SGD", "lr": lr, "weight_decay": decay}
    wrapper = fo.build_optim_wrapper(model, {"optimizer": cfg, "paramwise_cfg": rules})
    for name, param in model.named_parameters():
        param.grad = grads.get(name)
    wrapper.optimizer.step()
    for name in names:
        torch.testing.assert_close(model.get_parameter(name).data, wanted[name])


# -- wrong ones ------------------------------------------------------------------------

SENSELESS = st.one_of(
    st.text(),
    st.booleans(),
    st.floats(max_value=0, exclude_max=True),
    st.just(math.nan),
    st.just(math.inf),
    st.integers(max_value=-1),
    st.complex_numbers(),
    st.lists(st.floats()),
    st.dictionaries(st.text(), st.floats()),
)


@st.composite
def misspelt(draw, names) -> str:
    """Draw a name with a letter too few, too many, or another one."""
    name = draw(st.sampled_from(sorted(names)))
    at = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    wrong = draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
            ]
        )
    )
    assume(wrong not in names)
    return wrong


def _assert_refused(cfg: Any, *errors: type[Exception]) -> str:
    """Check that a config fails as a user's mistake, and return what is said."""
    before = copy.deepcopy(cfg)
    with pytest.raises(errors) as info:
        fo.build_optim_wrapper(nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1)), cfg)
    # NaN is not equal to itself.
    assert repr(cfg) == repr(before)
    return str(info.value)


def _cfg(lr: float, **rules: Any) -> dict[str, Any]:
    optimizer = {"type": "SGD", "lr": lr, "weight_decay": lr}
    return {"optimizer": optimizer, "paramwise_cfg": rules}


@given(RULES, st.sampled_from(NUMBERS), SENSELESS, BASES)
def test_senseless_multipliers_are_refused(rules, rule, value, lr) -> None:
    """What is no finite number >= 0 is refused, and the message names the rule."""
    message = _assert_refused(_cfg(lr, **{**rules, rule: value}), TypeError, ValueError)
    assert rule in message


@given(st.sampled_from(["lr_mult", "decay_mult"]), SENSELESS | st.none(), BASES)
def test_senseless_multipliers_of_keys_are_refused(rule, value, lr) -> None:
    """In custom keys as well."""
    cfg = _cfg(lr, custom_keys={"0": {rule: value}})
    message = _assert_refused(cfg, TypeError, ValueError)
    assert f"custom_keys['0'][{rule!r}]" in message


@given(RULES, misspelt(KEYS), MULTIPLIERS, BASES)
def test_misspelt_rules_are_refused(rules, rule, value, lr) -> None:
    """A rule that does not exist is named, and so is what was probably meant."""
    message = _assert_refused(_cfg(lr, **rules, **{rule: value}), ValueError)
    assert f"no rule {rule!r}" in message
    assert "did you mean" in message


@given(misspelt(["lr_mult", "decay_mult"]), MULTIPLIERS, BASES)
def test_misspelt_multipliers_of_keys_warn(rule, value, lr) -> None:
    """Once, with the near match: official configs have them; at the top no rule may."""
    with TestCase().assertLogs("functional_optim", "WARNING") as logs:
        fo.build_optim_wrapper(
            nn.Linear(1, 1), _cfg(lr, custom_keys={"weight": {rule: value}})
        )
    told = [record.getMessage() for record in logs.records]
    (line,) = [line for line in told if f"custom_keys['weight'][{rule!r}]" in line]
    assert "multiplies nothing; did you mean" in line
    message = _assert_refused(_cfg(lr, **{rule: value}), ValueError)
    assert f"no rule {rule!r}" in message


@given(
    st.sampled_from(["custom_keys", "bypass_duplicate", "compose"]),
    st.text() | st.floats() | st.integers(2) | st.lists(st.text()),
    BASES,
)
def test_wrong_types_of_rules_are_refused(rule, value, lr) -> None:
    """`custom_keys` is a dict, a switch is a bool."""
    assert rule in _assert_refused(_cfg(lr, **{rule: value}), TypeError)


@given(st.text(min_size=1), st.floats(), BASES)
def test_unknown_arguments_are_refused(key, value, lr) -> None:
    """Nobody's argument is refused by name, wherever it stands."""
    names = {*fo.OPTIMIZERS.get("SGD")([torch.ones(1)]).defaults, "params", "type"}
    assume(key not in names)
    cfg = _cfg(lr)
    cfg["optimizer"][key] = value
    assert key in _assert_refused(cfg, TypeError)
    assume(key not in {"optimizer", "accumulative_counts", "clip_grad", "transform"})
    assume(key not in {"merge_groups", "paramwise_cfg", "constructor", "_scope_"})
    assert key in _assert_refused({**_cfg(lr), key: value}, TypeError)


@given(
    misspelt(["type", "optimizer", "paramwise_cfg", "constructor", "clip_grad"]), BASES
)
def test_misspelt_arguments_are_refused(key, lr) -> None:
    """Also where the right key has a default."""
    assert key in _assert_refused({**_cfg(lr), key: {}}, TypeError)


@given(st.text() | st.integers() | st.none(), BASES)
def test_unknown_types_are_refused(kind, lr) -> None:
    """What is in no registry is refused in each of three places."""
    assume(kind not in fo.OPTIMIZERS.module_dict)
    cfg = _cfg(lr)
    cfg["optimizer"]["type"] = kind
    _assert_refused(cfg, KeyError, TypeError)
    for place in ("type", "constructor"):
        _assert_refused({**_cfg(lr), place: kind}, KeyError, TypeError)


@given(st.sampled_from(["lr", "weight_decay"]), SENSELESS)
def test_senseless_base_values_are_refused(key, value) -> None:
    """A learning rate that is a string, NaN or negative never reaches the optimizer."""
    cfg = {"optimizer": {"type": "SGD", "lr": 0.0, key: value}, "paramwise_cfg": {}}
    message = _assert_refused(cfg, TypeError, ValueError)
    # Presets have maps by name, so of dicts torch itself complains.
    assert key in message or isinstance(value, dict)


@given(st.sampled_from(NUMBERS), MULTIPLIERS)
def test_rules_need_base_values(rule, value) -> None:
    """A rule that multiplies what is not there says so."""
    cfg = {"optimizer": {"type": "SGD"}, "paramwise_cfg": {rule: value}}
    base = "base_lr" if "lr" in rule else "base_wd"
    assert f"{base} should not be None" in _assert_refused(cfg, ValueError)

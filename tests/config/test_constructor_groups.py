"""What a derived constructor's `add_params` may hand over, as torch takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import functional_optim as fo

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = ["SGD", "fo.sgd"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def constructor_of(add: Callable[[Any, nn.Module], None]) -> type[Any]:
    """Return a constructor whose `add_params` is a function."""

    class Own(fo.DefaultOptimWrapperConstructor):
        def add_params(self, params: Any, module: nn.Module, **_: Any) -> None:
            add(params, module)

    return Own


def build(
    add: Callable[[Any, nn.Module], None], model: nn.Module, kind: str = "SGD"
) -> fo.OptimWrapper:
    """Build a wrapper from what a function adds."""
    config = {"optimizer": {"type": kind, "lr": 0.1}}
    wrapper: fo.OptimWrapper = constructor_of(add)(config, {"own": True})(model)
    return wrapper


def sizes(wrapper: fo.OptimWrapper) -> list[int]:
    """Return how many parameters stand in each group."""
    return [len(group["params"]) for group in wrapper.optimizer.param_groups]


def two_layers() -> nn.Sequential:
    """Return a model of two layers."""
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


class LayerDecay(fo.DefaultOptimWrapperConstructor):
    """The constructor of MMEngine's tutorial: `parameters()` is an iterator."""

    def add_params(self, params: Any, module: Any, lr: Any = None) -> None:
        """Add the parameters of a module, and of its children at half the rate."""
        lr = self.base_lr if lr is None else lr
        params.append({"params": module.parameters(recurse=False), "lr": lr})
        for child in module.children():
            self.add_params(params, child, lr=lr * 0.5)


def test_a_constructor_may_hand_over_iterators() -> None:
    """What can be read once is read once: all parameters are trained."""
    model = two_layers()
    config = {"optimizer": {"type": "SGD", "lr": 0.1}}
    wrapper = LayerDecay(config, {"decay_factor": 0.5})(model)
    before = [p.detach().clone() for p in model.parameters()]
    wrapper.update_params(model(torch.ones(1, 2)).sum())
    assert sizes(wrapper) == [0, 2, 2]
    assert wrapper.get_lr()["lr"] == [0.1, 0.05, 0.05]
    assert not any(map(torch.equal, before, model.parameters()))


ITERATORS: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda m: m.parameters(),
    "filter": lambda m: filter(lambda p: p.requires_grad, m.parameters()),
    "expression": lambda m: (p for p in m.parameters()),
    "map": lambda m: map(m.get_parameter, ["0.weight", "0.bias", "1.weight", "1.bias"]),
    "values": lambda m: dict(m.named_parameters()).values(),
    "tuple": lambda m: tuple(m.parameters()),
    "named": lambda m: m.named_parameters(),
}


@each_kind
@pytest.mark.parametrize("way", ITERATORS)
def test_any_iterable_of_parameters_is_a_group(way: str, kind: str) -> None:
    """Iterators, views, tuples and `(name, parameter)` pairs train as a list does."""
    model = two_layers()

    def add(params: Any, module: nn.Module) -> None:
        params.append({"params": ITERATORS[way](module), "lr": 0.2})

    wrapper = build(add, model, kind)
    before = [p.detach().clone() for p in model.parameters()]
    wrapper.update_params(model(torch.ones(1, 2)).sum())
    assert sizes(wrapper) == [4]
    assert not any(map(torch.equal, before, model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    assert list(wrapper.parameter_names.values()) == names


def test_iterators_meet_bypass_duplicate() -> None:
    """Looking for duplicates does not use up what stands in the groups so far."""

    class Own(fo.DefaultOptimWrapperConstructor):
        def add_params(self, params: Any, module: Any, *args: Any, **kw: Any) -> None:
            if not params:
                params.append({"params": module[0].parameters(), "lr": 0.5})
            super().add_params(params, module, *args, **kw)

    config = {"optimizer": {"type": "SGD", "lr": 0.1}}
    wrapper = Own(config, {"bypass_duplicate": True})(two_layers())
    assert sizes(wrapper) == [2, 1, 1]
    assert wrapper.get_lr()["lr"] == [0.5, 0.1, 0.1]


@each_kind
def test_a_group_may_be_one_parameter(kind: str) -> None:
    """A bare parameter is a group of one, also where it is a single number."""
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model.register_parameter("logit_scale", nn.Parameter(torch.tensor(1.0)))

    def add(params: Any, module: nn.Module) -> None:
        for name, param in module.named_parameters():
            params.append({"params": param, "name": name, "lr": 0.09})

    wrapper = build(add, model, kind)
    assert sizes(wrapper) == [1, 1, 1, 1, 1]
    names = [name for name, _ in model.named_parameters()]
    assert [group["name"] for group in wrapper.optimizer.param_groups] == names


@each_kind
@pytest.mark.parametrize("named", [False, True])
def test_parameters_alone_are_one_group(kind: str, named: bool) -> None:
    """As torch's optimizers take a list of parameters, or of pairs."""

    def add(params: Any, module: nn.Module) -> None:
        params.extend(module.named_parameters() if named else module.parameters())

    model = nn.Linear(2, 2)
    wrapper = build(add, model, kind)
    assert sizes(wrapper) == [2]
    assert list(wrapper.parameter_names.values()) == ["weight", "bias"]


def add_empty_first(params: Any, module: nn.Module) -> None:
    """Add an empty group and a full one."""
    params.append({"params": [], "lr": 0.1})
    params.append({"params": list(module.parameters()), "lr": 0.5})


def test_a_group_may_be_empty() -> None:
    """A group that no parameter got into stands there all the same."""
    wrapper = build(add_empty_first, nn.Linear(2, 1))
    assert sizes(wrapper) == [0, 2]


def test_a_group_of_a_preset_may_be_empty() -> None:
    """An empty group stands beside named ones, as it does with torch's class."""
    wrapper = build(add_empty_first, nn.Linear(2, 1), "fo.sgd")
    assert sizes(wrapper) == [0, 2]


def test_names_that_a_constructor_gives_count() -> None:
    """Pairs name parameters for a preset, also those that the model does not have."""
    model, extra = nn.Linear(2, 1), nn.Parameter(torch.ones(1))

    def add(params: Any, module: Any) -> None:
        params.append({"params": [("first", module.weight), module.bias]})
        params.append({"params": [extra]})

    groups = build(add, model, "fo.sgd").optimizer.param_groups
    assert [group["param_names"] for group in groups] == [["first", "bias"], ["2"]]


def test_notes_can_be_given_by_a_config() -> None:
    """A key of one's own that looks like a hyperparameter stands in the groups."""
    config = {"optimizer": {"type": "fo.adamw", "lr": 0.1, "notes": ["lrs"]}}
    rules = {"custom_keys": {"bias": {"lrs": 7}}}
    wrapper = fo.DefaultOptimWrapperConstructor(config, rules)(nn.Linear(2, 1))
    groups = wrapper.optimizer.param_groups
    assert [group.get("lrs") for group in groups] == [None, 7]


def test_base_settings_are_those_of_a_group() -> None:
    """What a `TransformOptimizer` is built with is no setting that schedulers see."""
    wrapper = build(add_empty_first, nn.Linear(2, 1), "fo.sgd")
    base = wrapper.base_param_settings
    assert base["lr"] == wrapper.defaults["lr"]
    assert base.keys() <= wrapper.optimizer.param_groups[1].keys()
    assert wrapper.state_dict()["base_param_settings"].keys() == base.keys()


def test_a_derived_transform_optimizer_knows_the_names() -> None:
    """A class derived from ours gets names as ours does."""

    class Own(fo.TransformOptimizer):
        pass

    config = {"optimizer": {"type": Own, "transform": fo.sgd(0.1)}}
    wrapper = fo.DefaultOptimWrapperConstructor(config)(nn.Linear(2, 1))
    assert wrapper.optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_a_failed_constructor_can_be_called_again() -> None:
    """An error in `add_params` leaves nothing behind: rules are read anew."""

    class Own(fo.DefaultOptimWrapperConstructor):
        fails = True

        def add_params(self, params: Any, module: Any, *args: Any, **kw: Any) -> None:
            if self.fails and params:
                msg = "once"
                raise RuntimeError(msg)
            super().add_params(params, module, *args, **kw)

    config = {"optimizer": {"type": "SGD", "lr": 0.1}}
    constructor = Own(config, {"bias_lr_mult": 2.0})
    with pytest.raises(RuntimeError, match="once"):
        constructor(two_layers())
    constructor.fails = False
    constructor.paramwise_cfg["bias_lr_mult"] = 3.0
    groups: list[Any] = []
    constructor.add_params(groups, nn.Linear(1, 1))
    assert [round(group.get("lr", 0.1), 6) for group in groups] == [0.1, 0.3]


# -- what cannot be meant --------------------------------------------------------------


WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "string": (
        lambda m: [{"params": "0.weight"}],
        TypeError,
        r"params of group 0 are '0.weight'; pass the parameters themselves",
    ),
    "names": (
        lambda m: [{"params": list(dict(m.named_parameters()))}],
        TypeError,
        r"can only optimize Tensors.*'0.weight' at position 0; pass the parameters",
    ),
    "dict": (
        lambda m: [{"params": dict(m.named_parameters())}],
        TypeError,
        "params of group 0 are a dict; pass the parameters themselves",
    ),
    "nested list": (
        lambda m: [{"params": [m[0].weight, [m[1].weight, m[1].bias]]}],
        TypeError,
        r"a list of '1.weight', '1.bias' at position 1; put its parameters there one",
    ),
    "nested flat": (
        lambda m: [list(m.parameters())],
        TypeError,
        r"a list of '0.weight', .* at position 0",
    ),
    "module": (
        lambda m: [{"params": m[0]}],
        TypeError,
        "are a Linear; pass the parameters themselves",
    ),
    "none": (lambda m: [{"params": None}], TypeError, "are a NoneType"),
    "set": (
        lambda m: [{"params": set(m.parameters())}],
        TypeError,
        "in ordered collections, but params of group 0 are a set; pass a list",
    ),
    "no params": (
        lambda m: [{"param": list(m.parameters())}],
        ValueError,
        r"group 0 must have 'params', got the keys \['param'\]",
    ),
    "mixed": (
        lambda m: [{"params": m[0].weight}, m[0].bias],
        TypeError,
        "param_group must be a dict, but got a Parameter as group 1",
    ),
    "one twice": (
        lambda m: [{"params": m.parameters()}, {"params": m[0].bias}],
        ValueError,
        "parameter '0.bias' comes twice, in groups 0 and 1; add it once, or let bypas",
    ),
    "twice in one": (
        lambda m: [{"params": [m[0].bias, m[0].bias]}],
        ValueError,
        "parameter '0.bias' comes twice; add it once, or let bypass_duplicate=True",
    ),
    "two names": (
        lambda m: [{"params": [("a", m[0].bias)]}, {"params": [("b", m[0].bias)]}],
        ValueError,
        "'b' comes twice, also as 'a' and '0.bias', in groups 0 and 1; add it once",
    ),
}


@each_kind
@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_group_is_named(case: str, kind: str) -> None:
    """The error names the parameter or the place, and the remedy."""
    make, error, message = WRONG[case]

    def add(params: Any, module: nn.Module) -> None:
        params.extend(make(module))

    with pytest.raises(error, match=message):
        build(add, two_layers(), kind)


def test_a_parameter_that_comes_twice_is_told_in_torchs_words() -> None:
    """The message begins with what users of torch and MMEngine match."""
    model = two_layers()
    model[1].weight = model[0].weight

    def add(params: Any, module: Any) -> None:
        for layer in module:
            params.extend({"params": [p]} for p in layer.parameters())

    message = (
        "^some parameters appear in more than one parameter group: "
        r"parameter '0\.weight' comes twice, also as '1\.weight', in groups 0 and 2"
    )
    with pytest.raises(ValueError, match=message):
        build(add, model)

"""Registries: names, decorators, near matches, and configs that never change."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
import types

import pytest
import torch
from torch import nn

import functional_optim as fo
from functional_optim.config._registry import Registry, arguments_of


class Clipper:
    """Something to build."""

    def __init__(self, max_norm, norm_type=2):
        self.max_norm, self.norm_type = max_norm, norm_type


@pytest.fixture
def registry() -> Registry:
    return Registry("clipper")


def test_decorator_registers_and_returns_the_class(registry) -> None:
    """As a decorator it takes the name of the class, or the one given."""
    assert registry.register_module()(Clipper) is Clipper
    registry.register_module("short")(Clipper)
    registry.register_module(["a", "b"])(Clipper)
    assert sorted(registry.module_dict) == ["Clipper", "a", "b", "short"]
    assert len(registry) == 4
    assert "short" in registry
    assert "long" not in registry
    assert 3 not in registry
    assert repr(registry) == "Registry('clipper', ['Clipper', 'a', 'b', 'short'])"
    assert registry.name == "clipper"


def test_call_registers_and_returns_the_class(registry) -> None:
    """With `module=` it registers at once, functions as well."""
    assert registry.register_module(module=Clipper, name="c") is Clipper
    registry.register_module(module=dict)
    assert registry.get("c") is Clipper
    assert registry.build({"type": "dict", "a": 1}) == {"a": 1}


def test_taken_name_needs_force(registry) -> None:
    """A taken name is refused and nothing changes; `force=True` replaces it."""
    registry.register_module("c", module=Clipper)
    with pytest.raises(KeyError, match="force=True replaces it"):
        registry.register_module(["d", "c"], module=dict)
    assert "d" not in registry
    assert registry.register_module("c", force=True, module=dict) is dict
    assert registry.get("c") is dict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": 3}, "with parentheses"),
        ({"name": Clipper}, "with parentheses"),
        ({"name": ["a", 3]}, "sequence of strings"),
        ({"force": "yes"}, "True or False"),
        ({"module": 3}, "a class or a function"),
    ],
)
def test_wrong_registration_is_refused(registry, arguments, message) -> None:
    """What can be no name, no switch, no class is a TypeError."""
    with pytest.raises(TypeError, match=message):
        registry.register_module(**arguments)


def test_build_takes_names_classes_and_defaults(registry) -> None:
    """`type` is a name or a class; the config wins over the defaults."""
    registry.register_module(module=Clipper)
    by_name = registry.build({"type": "Clipper", "max_norm": 1.0})
    assert (by_name.max_norm, by_name.norm_type) == (1.0, 2)
    cfg = types.MappingProxyType({"type": Clipper, "max_norm": 1.0})
    by_class = registry.build(cfg, {"max_norm": 9.0, "norm_type": 1, "type": "x"})
    assert (by_class.max_norm, by_class.norm_type) == (1.0, 1)
    assert registry.build({"max_norm": 3}, {"type": "Clipper"}).max_norm == 3
    # MMEngine's runner writes scopes into configs.
    assert registry.build({"type": "Clipper", "_scope_": "mmdet", "max_norm": 3})


def test_build_leaves_the_config_alone(registry) -> None:
    """Neither the config nor the defaults change."""
    registry.register_module(module=Clipper)
    cfg, defaults = {"type": "Clipper", "_scope_": "a"}, {"max_norm": [1]}
    before = copy.deepcopy((cfg, defaults))
    assert registry.build(cfg, defaults).max_norm is defaults["max_norm"]
    assert (cfg, defaults) == before


def test_wrong_name_lists_near_ones(registry) -> None:
    """A wrong name is a KeyError and a ValueError, with what may have been meant."""
    registry.register_module(module=Clipper)
    with pytest.raises(KeyError, match=r"^'cliper' is not in the clipper registry; "):
        registry.build({"type": "cliper"})
    with pytest.raises(ValueError, match="did you mean 'Clipper'"):
        registry.build({"type": "Cliper"})
    with pytest.raises(KeyError, match=r"the names are \['Clipper'\]"):
        registry.build({"type": "xyz"})
    assert registry.get("xyz") is None


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        (["Clipper"], TypeError, "cfg should be a dict"),
        ({"max_norm": 1}, KeyError, 'must contain the key "type"'),
        ({"type": 3}, TypeError, "a class or a function, got 3"),
        ({"type": "Clipper", "max_nrom": 1}, TypeError, "did you mean 'max_norm'"),
        ({"type": "Clipper"}, TypeError, "missing 1 required"),
    ],
)
def test_wrong_config_is_refused(registry, cfg, error, message) -> None:
    """Errors name the key, its value and the remedy."""
    registry.register_module(module=Clipper)
    with pytest.raises(error, match=message):
        registry.build(cfg)
    with pytest.raises(TypeError, match="default_args should be a dict"):
        registry.build({"type": "Clipper"}, [3])
    with pytest.raises(TypeError, match="a name in the clipper registry is a string"):
        registry.get(3)


def test_error_from_inside_stays_itself(registry) -> None:
    """A TypeError that is not about an argument of the config is not rewritten."""

    def broken(a):
        return int(b=a)

    registry.register_module(module=broken)
    with pytest.raises(TypeError) as info:
        registry.build({"type": "broken", "a": 1})
    assert "takes no a" not in str(info.value)


def test_dotted_names_are_imported(registry) -> None:
    """A name with dots is imported, as MMEngine does; nonsense finds nothing."""
    assert registry.get("torch.optim.SGD") is torch.optim.SGD
    for nonsense in ("torch.optim.sgd.Nope", "no.such", ".a", "..", "torch.pi", "a."):
        assert registry.get(nonsense) is None
    found = fo.OPTIM_WRAPPERS.get("functional_optim.OptimWrapper")
    assert found is fo.OPTIM_WRAPPERS.get("OptimWrapper")


def test_arguments_reach_through_keyword_arguments() -> None:
    """A class that passes on what it does not know has its bases' arguments, too."""

    class Wide(Clipper):
        def __init__(self, scale, **rest):
            super().__init__(**rest)
            self.scale = scale

    assert arguments_of(Wide) == ["scale", "max_norm", "norm_type"]
    assert arguments_of(lambda a, *b: (a, b)) == ["a"]
    assert arguments_of(int.__add__)


def test_optimizers_has_all_of_torch() -> None:
    """Every class of torch.optim by its name; Adafactor by another one, too."""
    for name in dir(torch.optim):
        found = getattr(torch.optim, name)
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
            assert fo.OPTIMIZERS.get(name) is found
    assert fo.OPTIMIZERS.get("TorchAdafactor") is torch.optim.Adafactor


@pytest.mark.parametrize("name", ["fo.adam", "fo.adamw", "fo.sgd"])
def test_presets_build_transform_optimizers(name) -> None:
    """`fo.adamw` takes parameters, or groups, and the preset's arguments."""
    param = torch.nn.Parameter(torch.ones(2))
    cfg = {"type": name, "params": [param], "lr": 0.5, "weight_decay": 0.25}
    optimizer = fo.OPTIMIZERS.build(cfg)
    preset = getattr(fo, name.removeprefix("fo."))
    assert isinstance(optimizer, fo.TransformOptimizer)
    assert optimizer.transform == fo.chain(preset(0.5, weight_decay=0.25))
    # The function itself means the same.
    assert isinstance(fo.OPTIMIZERS.build({**cfg, "type": preset}), type(optimizer))
    path = f"functional_optim.{name.removeprefix('fo.')}"
    assert isinstance(fo.OPTIMIZERS.build({**cfg, "type": path}), type(optimizer))
    assert repr(fo.OPTIMIZERS.get(name)) == f"<{name}>"
    with pytest.raises(TypeError, match=rf"{name} takes no lrr=1; did you mean 'lr'"):
        fo.OPTIMIZERS.build({"type": name, "params": [param], "lrr": 1})


@pytest.mark.parametrize("name", ["fo.adam", "fo.adamw", "fo.sgd"])
def test_presets_take_groups_with_settings_of_their_own(name) -> None:
    """Groups may have a decay where the preset has none, and step as torch's do."""
    ours = [torch.nn.Parameter(torch.full((2,), 3.0)) for _ in range(3)]
    theirs = [torch.nn.Parameter(torch.full((2,), 3.0)) for _ in range(3)]

    def groups(params):
        return [
            {"params": [params[0]], "weight_decay": 0.5},
            {"params": [params[1]], "lr": 0.01},
            {"params": [params[2]]},
        ]

    kind = {"fo.adam": "Adam", "fo.adamw": "AdamW", "fo.sgd": "SGD"}[name]
    settings = {"lr": 0.1, "weight_decay": 0.0}
    mine = fo.OPTIMIZERS.build({"type": name, "params": groups(ours), **settings})
    other = fo.OPTIMIZERS.build({"type": kind, "params": groups(theirs), **settings})
    assert [g["weight_decay"] for g in mine.param_groups] == [0.5, 0.0, 0.0]
    assert [g["lr"] for g in mine.param_groups] == [0.1, 0.01, 0.1]
    assert mine.defaults["weight_decay"] == 0.0
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad, b.grad = torch.ones(2), torch.ones(2)
        mine.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


class _Lion(torch.optim.SGD):
    """Stands in for other packages' optimizers."""


@pytest.fixture
def elsewhere(monkeypatch):
    """Install packages with optimizers."""

    def install(name, **members):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()
        module.__path__ = []
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def test_other_packages_are_looked_for_when_asked(elsewhere) -> None:
    """Optimizers of packages that are installed are found at lookup, and not before."""
    assert "Lion" not in fo.OPTIMIZERS
    elsewhere("lion_pytorch", Lion=_Lion, helper=len)
    elsewhere("dadaptation", DAdaptAdam=_Lion)
    bitsandbytes = elsewhere("bitsandbytes")
    bitsandbytes.optim = elsewhere("bitsandbytes.optim", Adam=_Lion, Adam8bit=_Lion)
    assert fo.OPTIMIZERS.get("Lion") is _Lion
    assert fo.OPTIMIZERS.get("DAdaptAdam") is _Lion
    assert fo.OPTIMIZERS.get("Adam8bit") is _Lion
    assert fo.OPTIMIZERS.get("bnb_Adam") is _Lion
    assert fo.OPTIMIZERS.get("Adam") is torch.optim.Adam
    assert fo.OPTIMIZERS.get("helper") is None


def test_broken_package_is_left_out_with_a_warning(
    monkeypatch, tmp_path, caplog
) -> None:
    """A package that cannot be imported does not hide the error about the name."""
    (tmp_path / "Sophia.py").write_text("raise RuntimeError('no GPU')")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        caplog.at_level(logging.WARNING, "functional_optim"),
        pytest.raises(KeyError, match="did you mean 'SGD'"),
    ):
        fo.OPTIMIZERS.build({"type": "SDG"})
    assert "optimizers of Sophia are left out: RuntimeError('no GPU')" in caplog.text


# -- configs and constructors that are written for MMEngine ----------------------------


@pytest.mark.parametrize(
    ("registry", "path"),
    [
        (fo.OPTIM_WRAPPERS, "mmengine.optim.AmpOptimWrapper"),
        (fo.OPTIM_WRAPPERS, "mmengine.optim.OptimWrapper"),
        (fo.OPTIM_WRAPPERS, "mmengine.optim.optimizer.optimizer_wrapper.OptimWrapper"),
        (
            fo.OPTIM_WRAPPERS,
            "mmengine.optim.optimizer.amp_optimizer_wrapper.AmpOptimWrapper",
        ),
        (fo.OPTIM_WRAPPERS, "mmengine.OptimWrapper"),
        (
            fo.OPTIM_WRAPPER_CONSTRUCTORS,
            "mmengine.optim.optimizer.default_constructor.DefaultOptimWrapperConstructor",
        ),
        (fo.OPTIMIZERS, "mmengine.SGD"),
        (fo.OPTIMIZERS, "torch.optim.sgd.SGD"),
    ],
)
def test_dotted_names_of_mmengines_classes_are_ours(registry, path) -> None:
    """Configs that were dumped name classes so; MMEngine need not be there."""
    ours = registry.module_dict[path.rpartition(".")[2]]
    assert registry.get(path) is ours
    assert registry.resolve(path) is ours
    if path.startswith("mmengine."):
        assert path in registry


def test_a_dumped_config_builds_ours() -> None:
    """All of its names are dotted."""
    wrapper = fo.build_optim_wrapper(
        nn.Linear(1, 1),
        {
            "type": "mmengine.optim.AmpOptimWrapper",
            "optimizer": {"type": "torch.optim.AdamW", "lr": 0.1},
            "constructor": "mmengine.optim.DefaultOptimWrapperConstructor",
            "dtype": "bfloat16",
        },
    )
    assert type(wrapper) is fo.AmpOptimWrapper
    assert type(wrapper.optimizer) is torch.optim.AdamW


def test_what_is_not_ours_is_looked_for_in_mmengine() -> None:
    """A class of MMEngine that has no counterpart is named in the error."""
    path = "mmengine.optim.NoSuchOptimWrapper"
    assert path not in fo.OPTIM_WRAPPERS
    with pytest.raises(KeyError, match="'mmengine.optim.NoSuchOptimWrapper' is not in"):
        fo.OPTIM_WRAPPERS.resolve(path)


@pytest.mark.parametrize("scope", [None, "mmdet"])
def test_switching_the_scope_has_the_registry_itself(scope) -> None:
    """Constructors copied from MMEngine look the class of an optimizer up so."""
    with fo.OPTIMIZERS.switch_scope_and_registry(scope) as registry:
        assert registry is fo.OPTIMIZERS
        assert registry.get("SGD") is torch.optim.SGD


def test_a_constructor_copied_from_mmengine_builds() -> None:
    """`__call__` as MMEngine's constructor has it."""

    class Own(fo.DefaultOptimWrapperConstructor):
        def __call__(self, model):
            optimizer_cfg = self.optimizer_cfg.copy()
            with fo.OPTIMIZERS.switch_scope_and_registry(None) as registry:
                optimizer_cls = registry.get(self.optimizer_cfg["type"])
            first = next(iter(inspect.signature(optimizer_cls).parameters))
            optimizer_cfg[first] = model.parameters()
            optimizer = fo.OPTIMIZERS.build(optimizer_cfg)
            return fo.OPTIM_WRAPPERS.build(
                {"type": "OptimWrapper"}, default_args={"optimizer": optimizer}
            )

    for kind in ("SGD", "fo.sgd"):
        wrapper = Own({"optimizer": {"type": kind, "lr": 0.1}})(nn.Linear(1, 1))
        assert wrapper.get_lr() == {"lr": [0.1]}

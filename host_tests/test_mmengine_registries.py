"""MMEngine's functions, registries and strategies take our registries and names."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import mmengine
import mmengine_runs
import pytest
import torch
from mmengine._strategy import FSDPStrategy
from mmengine.registry import OPTIM_WRAPPERS, Registry, build_from_cfg
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import functional_optim as fo
from functional_optim.integrations.mmengine import register

if TYPE_CHECKING:
    from collections.abc import Iterator

SGD = {"type": "SGD", "lr": 0.1}
OURS = mmengine_runs.OURS
DOTTED = [
    "mmengine.optim.AmpOptimWrapper",
    "mmengine.optim.optimizer.amp_optimizer_wrapper.AmpOptimWrapper",
    "mmengine.AmpOptimWrapper",
    mmengine.optim.AmpOptimWrapper,
]


@pytest.fixture
def child() -> Iterator[Any]:
    """Return a registry of MMEngine whose parent is ours."""
    yield Registry("child optimizer", parent=fo.OPTIMIZERS, scope="child")
    del fo.OPTIMIZERS.children["child"]  # type: ignore[attr-defined]


def test_build_from_cfg_takes_our_registries() -> None:
    """Names, presets, defaults; a wrong name is a KeyError with both names."""
    params = list(nn.Linear(1, 1).parameters())
    built = build_from_cfg(SGD, fo.OPTIMIZERS, {"params": params})
    assert type(built) is torch.optim.SGD
    built = build_from_cfg({**SGD, "type": "fo.sgd", "params": params}, fo.OPTIMIZERS)
    assert type(built) is fo.TransformOptimizer
    config = {"type": "OptimWrapper", "optimizer": built}
    assert type(build_from_cfg(config, fo.OPTIM_WRAPPERS)) is fo.OptimWrapper
    with pytest.raises(KeyError, match="SDG is not in the functional_optim::optimizer"):
        build_from_cfg({"type": "SDG", "params": params}, fo.OPTIMIZERS)


def test_our_registries_may_be_parents(child: Any) -> None:
    """A child finds what ours have; ours find what it has, behind its scope."""

    @child.register_module()
    class Descent(torch.optim.SGD):
        pass

    assert child.get("AdamW") is torch.optim.AdamW
    assert child.get("fo.adamw") is fo.OPTIMIZERS.get("fo.adamw")
    assert child.get("Descent") is child.get("child.Descent") is Descent
    assert fo.OPTIMIZERS.get("child.Descent") is Descent
    assert fo.OPTIMIZERS.get("child.Descend") is fo.OPTIMIZERS.get("Descent") is None
    params = list(nn.Linear(1, 1).parameters())
    assert type(child.build({**SGD, "params": params})) is torch.optim.SGD
    built = child.build({"type": "Descent", "lr": 0.1, "params": params})
    assert type(built) is Descent
    config = {"optimizer": {"type": "child.Descent", "lr": 0.1}}
    wrapper = fo.build_optim_wrapper(nn.Linear(1, 1), config)
    assert type(wrapper.optimizer) is Descent


def test_our_registries_stay_what_they_are() -> None:
    """The same objects, with the methods that they have without MMEngine."""
    register()
    assert fo.OPTIMIZERS.name == "optimizer"
    assert repr(fo.OPTIMIZERS).startswith("Registry('optimizer', ['ASGD', ")
    assert isinstance(fo.OPTIM_WRAPPERS, Registry)
    assert type(fo.OPTIMIZERS).__mro__.count(Registry) == 1
    with pytest.raises(ValueError, match="did you mean 'Adam'"):
        fo.OPTIMIZERS.build({"type": "AdamV"})
    with fo.OPTIMIZERS.switch_scope_and_registry(None) as registry:
        assert registry is fo.OPTIMIZERS


@pytest.mark.parametrize("kind", DOTTED, ids=str)
def test_names_of_mmengines_classes_build_ours(kind: Any) -> None:
    """Dumped configs have dotted names, others the classes; both are one config."""
    config = {"type": kind, "optimizer": SGD, "dtype": "bfloat16"}
    wrapper = fo.build_optim_wrapper(nn.Linear(1, 1), config)
    assert type(wrapper) is fo.AmpOptimWrapper
    # MMEngine itself goes on to find its own.
    if isinstance(kind, str):
        assert OPTIM_WRAPPERS.get(kind) is mmengine.optim.AmpOptimWrapper


def test_what_only_mmengine_has_is_mmengines() -> None:
    """Classes without a counterpart here are found there."""
    path = "mmengine.optim.ApexOptimWrapper"
    assert fo.OPTIM_WRAPPERS.get(path) is mmengine.optim.ApexOptimWrapper


# -- FSDPStrategy ----------------------------------------------------------------------


def strategys_wrapper(kind: Any, **more: Any) -> Any:
    """Return what the strategy builds from a config."""
    strategy = object.__new__(FSDPStrategy)
    config = {"type": kind, "optimizer": SGD, **more}
    return strategy.build_optim_wrapper(config, nn.Linear(1, 1))


@pytest.mark.parametrize("constructor", [None, "DefaultOptimWrapperConstructor"])
@pytest.mark.parametrize("kind", [f"{OURS}AmpOptimWrapper", fo.AmpOptimWrapper])
def test_the_strategy_shares_a_scaler(kind: Any, constructor: str | None) -> None:
    """`use_fsdp` is on unless the config says otherwise, as for MMEngine's class."""
    more = {} if constructor is None else {"constructor": OURS + constructor}
    wrapper = strategys_wrapper(kind, **more)
    assert type(wrapper) is fo.AmpOptimWrapper
    assert type(wrapper.loss_scaler) is ShardedGradScaler
    own = strategys_wrapper(kind, use_fsdp=False, **more)
    assert type(own.loss_scaler) is torch.amp.GradScaler


def test_a_strategy_that_others_wrapped_shares_a_scaler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever wrapped its method before or after; registering again adds nothing."""
    method = "build_optim_wrapper"

    def wrapped(build: Any) -> Any:
        @functools.wraps(build)
        def logging_too(*args: Any) -> Any:
            return build(*args)

        return logging_too

    plain = getattr(FSDPStrategy, method).__wrapped__
    monkeypatch.setattr(FSDPStrategy, method, wrapped(plain))
    register()
    wrapper = strategys_wrapper(f"{OURS}AmpOptimWrapper")
    assert type(wrapper.loss_scaler) is ShardedGradScaler
    monkeypatch.setattr(FSDPStrategy, method, wrapped(getattr(FSDPStrategy, method)))
    before = getattr(FSDPStrategy, method)
    register()
    assert getattr(FSDPStrategy, method) is before


def test_the_strategy_leaves_others_alone() -> None:
    """Our plain wrapper, instances and mistakes go on as before."""
    wrapper = strategys_wrapper(f"{OURS}OptimWrapper")
    assert type(wrapper) is fo.OptimWrapper
    with pytest.raises(TypeError, match="should be an OptimWrapper"):
        object.__new__(FSDPStrategy).build_optim_wrapper(3)
    with pytest.raises(KeyError, match="Wrappr"):
        strategys_wrapper(f"{OURS}Wrappr")

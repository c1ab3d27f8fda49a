"""What a step was given is freed when its last user lets go, without the collector."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import functional_optim as fo

STEPS = 4


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _parameters() -> list[Parameter]:
    return [Parameter(torch.zeros(8, 8)) for _ in range(2)]


def _alive(params: list[Parameter], step: Callable[[], Any], value: float = 1.0) -> int:
    """Take steps that may raise; return how many of their gradients are left."""
    kept: list[weakref.ref[Tensor]] = []
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.full_like(p, value)
            kept.append(weakref.ref(p.grad))
        with contextlib.suppress(ValueError, RuntimeError):
            step()
        for p in params:
            p.grad = None
    return sum(ref() is not None for ref in kept)


@dataclasses.dataclass(frozen=True)
class _Raises:
    """A rule that gives up behind a total."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params: Any) -> Any:
        return ()

    def update(self, u: Any, s: Any, params: Any, *, context: Any = None) -> Any:
        msg = "not today"
        raise ValueError(msg)


@dataclasses.dataclass(frozen=True)
class _ReadsOnHost:
    """A rule of which no code can be made."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params: Any) -> Any:
        return ()

    def update(self, u: Any, s: Any, params: Any, *, context: Any = None) -> Any:
        return {n: g * (1.0 if bool(g.sum() > 0) else 0.5) for n, g in u.items()}, s


def _guarded(*before: Any) -> Any:
    return fo.chain(*before, fo.ClipByGlobalNorm(1.0), fo.adamw(0.1))


CHAINS = {
    "no total": fo.adamw(0.1),
    "clip": _guarded(),
    "clip by the largest": fo.chain(
        fo.ClipByGlobalNorm(1.0, norm_type=float("inf")), fo.sgd(0.1)
    ),
    "two totals": fo.SkipNonfinite(_guarded()),
    "observe": fo.chain(fo.sgd(0.1), fo.Observe("step")),
    "window": _guarded(fo.Accumulate(2)),
    "whole tensors": _guarded(fo.Centralize()),
    "partition": fo.chain(
        fo.ClipByGlobalNorm(1.0),
        fo.Partition(
            {"a": fo.adamw(0.1), "b": fo.sgd(0.1)},
            lambda name, _: "a" if name == "0" else "b",
        ),
    ),
    "mask": fo.chain(fo.Masked(fo.ClipByGlobalNorm(1.0), fo.exclude("1")), fo.sgd(0.1)),
    "raises on the host": fo.chain(
        fo.ClipByGlobalNorm(1.0, error_if_nonfinite=True), fo.sgd(0.1)
    ),
    "raises": fo.chain(fo.ClipByGlobalNorm(1.0), _Raises(), fo.sgd(0.1)),
    "reads on the host": fo.chain(
        fo.ClipByGlobalNorm(1.0), _ReadsOnHost(), fo.sgd(0.1)
    ),
}
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "compile": {"compile": True},
}


@pytest.mark.parametrize("value", [1.0, float("nan")])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHAINS)
def test_a_step_frees_its_gradients(name: str, way: str, value: float) -> None:
    """Also behind a total, where a pass stops in the middle, and where it raises."""
    params = _parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = fo.TransformOptimizer(params, CHAINS[name], **WAYS[way])
        assert _alive(params, optimizer.step, value) == 0


@pytest.mark.parametrize("value", [1.0, float("nan")])
@pytest.mark.parametrize("of", ["torch", "ours"])
@pytest.mark.parametrize(
    "given",
    [
        {"clip_grad": {"max_norm": 1.0}},
        {"clip_grad": {"max_norm": 1.0, "error_if_nonfinite": True}},
        {"transform": fo.chain(fo.Centralize(), fo.ClipByGlobalNorm(1.0))},
    ],
    ids=str,
)
def test_a_wrapper_frees_its_gradients(given: Any, of: str, value: float) -> None:
    """Whatever stands between backward and step."""
    params = _parameters()
    optimizer: Any = torch.optim.AdamW(params, 0.1)
    if of == "ours":
        optimizer = fo.TransformOptimizer(params, _guarded())
    wrapper = fo.OptimWrapper(optimizer, **given)
    assert _alive(params, wrapper.step, value) == 0


def test_a_scaler_that_skips_frees_its_gradients() -> None:
    """A step under a gradient scaler, too."""
    params = _parameters()
    optimizer = fo.TransformOptimizer(params, _guarded(), amp_scaling=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    assert _alive(params, step, float("inf")) == 0


def test_the_pure_way_frees_its_updates() -> None:
    """No cycle holds what went into `update`."""
    params = {"w": torch.zeros(8, 8)}
    chained = _guarded()
    state = chained.init(params)
    kept = []
    for _ in range(STEPS):
        updates = {"w": torch.ones(8, 8)}
        kept.append(weakref.ref(updates["w"]))
        _, state = chained.update(updates, state, params)
        del updates
    assert [ref() for ref in kept] == [None] * STEPS

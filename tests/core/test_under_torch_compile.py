"""A training step inside `torch.compile`: the same numbers, and no compiling again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import functional_optim as fo

Body: TypeAlias = Callable[[Tensor], Any]

# Of torch itself, for a loss that crosses a break of the graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

CALLS, SETTLED = 14, 8
"""What a window or a schedule changes has come up by then."""


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _grouped(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [p], "lr": 0.1} for p in model.parameters()]


CLIPPED = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(0.1))
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "ours": lambda model: fo.TransformOptimizer(_grouped(model), CLIPPED),
    "ours compiled": lambda model: fo.TransformOptimizer(
        _grouped(model), CLIPPED, compile=True
    ),
    # With a rate of one binary digit, which torch's traced step does not round.
    "torch": lambda model: torch.optim.SGD(_grouped(model), 0.125),
}


def _step(model: nn.Module, optimizer: Any) -> Body:
    def body(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    return body


def _closure(model: nn.Module, optimizer: Any) -> Body:
    def body(x: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    return body


def _saves_and_loads(model: nn.Module, optimizer: Any) -> Body:
    def body(x: Tensor) -> None:
        model(x).sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad(set_to_none=False)

    return body


def _copies(model: nn.Module, optimizer: Any) -> Body:
    def body(x: Tensor) -> None:
        model(x).sum().backward()
        optimizer.step()
        copy.deepcopy(optimizer)
        optimizer.zero_grad()

    return body


def _asks(model: nn.Module, optimizer: Any) -> Body:
    def body(x: Tensor) -> Any:
        model(x).sum().backward()
        optimizer.step()
        told = optimizer.readings(), optimizer.transform, fo.explain(optimizer)
        optimizer.load_transform_state(optimizer.transform_state())
        theirs = fo.to_torch_state_dict(optimizer)
        optimizer.load_state_dict(fo.from_torch_state_dict(optimizer, theirs))
        optimizer.zero_grad()
        return told

    return body


def _wrapped(kind: Any = fo.OptimWrapper, **options: Any) -> Any:
    def make(model: nn.Module, optimizer: Any) -> Body:
        wrapper = kind(optimizer=optimizer, **options)
        wrapper.initialize_count_status(model, 0, CALLS)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        def body(x: Tensor) -> Any:
            with wrapper.optim_context(model):
                loss = model(x).sum()
            wrapper.update_params(loss)
            if wrapper.should_update():
                scheduler.step()
            return wrapper.get_lr()

        return body

    return make


def _wrapper_saves(model: nn.Module, optimizer: Any) -> Body:
    wrapper = fo.OptimWrapper(optimizer, clip_grad={"max_norm": 1.0})
    both = fo.OptimWrapperDict(one=wrapper)

    def body(x: Tensor) -> None:
        wrapper.update_params(model(x).sum())
        wrapper.load_state_dict(wrapper.state_dict())
        both.load_state_dict(both.state_dict())

    return body


CLIP = {"max_norm": 1.0}
BODIES: dict[str, Callable[[nn.Module, Any], Body]] = {
    "step": _step,
    "closure": _closure,
    "save and load": _saves_and_loads,
    "wrapper": _wrapped(),
    "wrapper, clip": _wrapped(clip_grad=CLIP),
    "wrapper, clip by value": _wrapped(clip_grad={"type": "value", "clip_value": 0.5}),
    "wrapper, error": _wrapped(clip_grad={**CLIP, "error_if_nonfinite": True}),
    "wrapper, transform": _wrapped(
        transform=fo.chain(fo.Centralize(), fo.ClipByGlobalNorm(1.0))
    ),
    "wrapper, windows": _wrapped(accumulative_counts=2, clip_grad=CLIP),
    "wrapper, scaled": _wrapped(fo.AmpOptimWrapper, loss_scale=4.0, clip_grad=CLIP),
    "wrapper, save and load": _wrapper_saves,
}


def _trained(make: Any, build: Any, *, compiled: bool) -> tuple[list[Tensor], int]:
    """Return the parameters, and how many frames were compiled late."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    body = build(model, make(model))
    if compiled:
        body = torch.compile(body, backend="eager")
    before = 0
    for call in range(CALLS):
        if call == SETTLED:
            before = counters["frames"]["total"]
        body(torch.full((1, 2), 1.0 + call))
    late = counters["frames"]["total"] - before
    return [p.detach().clone() for p in model.parameters()], late


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", BODIES)
def test_a_compiled_step_is_the_step(name: str, optimizer: str) -> None:
    """With the graph broken where the optimizer works, and nothing compiled again."""
    if optimizer == "torch" and not name.startswith("wrapper"):
        pytest.skip("nothing of ours")
    make, build = OPTIMIZERS[optimizer], BODIES[name]
    plain, _ = _trained(make, build, compiled=False)
    counters.clear()
    found, late = _trained(make, build, compiled=True)
    assert late == 0
    for ours, wanted in zip(found, plain, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", ["asks", "copies", "builds", "builds by a config"])
def test_what_else_an_optimizer_can_do_in_a_compiled_function(name: str) -> None:
    """Whatever makes new objects is called, not traced; torch's are guarded, too."""
    ours = OPTIMIZERS["ours"]

    def builds(model: nn.Module, _: Any) -> Body:
        return lambda x: _step(model, ours(model))(x)

    def builds_by_config(model: nn.Module, _: Any) -> Body:
        config = {"optimizer": {"type": "fo.adamw", "lr": 0.1}, "clip_grad": CLIP}
        return lambda x: fo.build_optim_wrapper(model, config).update_params(
            model(x).sum()
        )

    build = {
        "asks": _asks,
        "copies": _copies,
        "builds": builds,
        "builds by a config": builds_by_config,
    }[name]
    plain, _ = _trained(ours, build, compiled=False)
    found, _ = _trained(ours, build, compiled=True)
    for mine, wanted in zip(found, plain, strict=True):
        assert torch.equal(mine, wanted)

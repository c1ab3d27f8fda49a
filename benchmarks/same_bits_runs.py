"""What two packages do in turns: each run yields what is to be the same, step by step.

A run is a generator; it is given the package and the numbers, and nothing of the other.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from same_bits_specs import SHAPES, Case, built
from torch import Tensor
from torch.nn import Parameter

Run: TypeAlias = Iterator[tuple[str, Any]]
Tensors: TypeAlias = dict[str, Tensor]

LARGE, HUGE = {"a.weight": (600, 500)}, {"a.weight": (1100, 1000)}
"""Shapes for runs where tensors are not gathered, and where they are cut into units."""

GOING_ON = 5
"""Steps after a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What both packages are given.

    Attributes:
        params: Parameters by name.
        grads: Gradients by name for each step; some are missing.
        told: Weight, and whether the data ends, for each step.
    """

    params: Tensors
    grads: list[Tensors]
    told: list[dict[str, Any]]


def numbers(
    case: Case, dtype: torch.dtype | None, seed: int, steps: int, larger: Any = None
) -> Numbers:
    """Draw the numbers for a case.

    A tenth of each gradient is 0, half of that -0. Infinities and NaN come where the
    case guards against them, else in the last two steps of every other case.

    Args:
        case: The case.
        dtype: Of all parameters; None draws one for each.
        seed: Where from.
        steps: How many.
        larger: Other shapes by name.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    kinds = [torch.float32, torch.float64, torch.bfloat16]
    params: Tensors = {}
    for name, shape in (SHAPES | (larger or {})).items():
        param = torch.randn(shape, generator=generator)
        chosen = kinds[int(3 * uniform())] if dtype is None else dtype
        params[name] = param.to(chosen)
        if param.ndim == 4:
            params[name] = params[name].contiguous(memory_format=torch.channels_last)
    guarded = case.has("SkipNonfinite", "ZeroNans")
    accumulates = case.has("Accumulate")
    grads, told = [], []
    for step in range(steps):
        ends = not guarded and seed % 2 == 0 and step >= steps - 2
        bad = uniform() < (0.25 if guarded else 1.0 if ends else 0.0)
        held = uniform() < 0.05
        found: Tensors = {}
        for name, param in params.items():
            size = 10 ** (2 * uniform() - 1.5)
            grad = size * torch.randn(param.shape, generator=generator)
            grad[torch.rand(param.shape, generator=generator) < 0.1] = 0.0
            grad[torch.rand(param.shape, generator=generator) < 0.05] = -0.0
            if bad and uniform() < 0.5:
                value = (float("inf"), float("-inf"), float("nan"))[int(3 * uniform())]
                grad.view(-1)[int(grad.numel() * uniform())] = value
            if not held and uniform() > 0.12:
                found[name] = grad.to(param.dtype)
        grads.append(found)
        weight = [None, 3.0, torch.tensor(0.5)][int(3 * uniform())]
        last = uniform() < 0.15
        told.append({"weight": weight, "last": last} if accumulates else {})
    return Numbers(params, grads, told)


def values(schedule: Any, package: Any) -> Run:
    """Yield what a schedule is at each step."""
    made = built(package, schedule)
    for step in range(30):
        yield f"step {step}", made(torch.tensor(float(step), dtype=torch.float64))


# -- pure ------------------------------------------------------------------------------


def pure(package: Any, case: Case, given: Numbers) -> Run:
    """Update and apply, as the pure way does."""
    pipeline = _Pipeline(package, case, given.params)
    yield "init", pipeline.state
    for step in range(len(given.grads)):
        yield f"step {step}", pipeline.step(given, step)
    yield "readings", package.readings(pipeline.transform, pipeline.state)


class _Pipeline:
    """A transform with its state and the parameters."""

    def __init__(self, package: Any, case: Case, params: Tensors) -> None:
        self._package = package
        self.transform = built(package, case.transform)
        self.params = {name: param.clone() for name, param in params.items()}
        self.state = self.transform.init(self.params)

    def step(self, given: Numbers, index: int) -> dict[str, Any]:
        """Take a step, and return all that came out."""
        context = self._package.Context(**given.told[index])
        updates, self.state = self.transform.update(
            given.grads[index], self.state, self.params, context=context
        )
        self.params = self._package.apply_updates(self.params, updates)
        return {"updates": updates, "state": self.state, "params": self.params}


def mapped(package: Any, case: Case, given: Numbers) -> Run:
    """Update three members at once, with vmap over init and update."""
    transform = built(package, case.transform)
    factors = torch.tensor([1.0, 0.5, -2.0])

    def three(tensors: Tensors) -> Tensors:
        return {
            name: torch.stack([x * f.to(x.dtype) for f in factors])
            for name, x in tensors.items()
        }

    params = three(given.params)
    state = torch.vmap(transform.init)(params)
    for step, grads in enumerate(given.grads[:4]):
        updates, state = torch.vmap(transform.update)(three(grads), state, params)
        params = package.apply_updates(params, updates)
        yield f"step {step}", {"updates": updates, "state": state, "params": params}


def differentiated(package: Any, case: Case, given: Numbers) -> Run:
    """Take derivatives through some updates."""
    transform = built(package, case.transform)
    first = {name: p.clone().requires_grad_() for name, p in given.params.items()}
    params, state = first, transform.init(first)
    context = package.Context(differentiable=True)
    for grads in given.grads[:3]:
        given_now = {n: g + 0.1 * params[n] for n, g in grads.items()}
        updates, state = transform.update(given_now, state, params, context=context)
        params = package.apply_updates(params, updates, differentiable=True)
    total = sum(param.double().square().sum() for param in params.values())
    yield "total", total
    yield "derivatives", torch.autograd.grad(total, [*first.values()])


# -- in place --------------------------------------------------------------------------


class InPlace:
    """An optimizer over parameters of its own.

    Args:
        package: The package.
        case: The transform.
        given: The parameters.
        groups: How they are given: 0 by name, 1 in two groups, 2 in three, one of them
            late, and one parameter frozen at first, 3 without names.
        options: Arguments of `TransformOptimizer`.
    """

    def __init__(
        self,
        package: Any,
        case: Case,
        given: Numbers,
        groups: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        transform = built(package, case.transform)
        if groups >= 2 and case.has_names:
            groups -= 2  # A name that is not there, or not yet, is refused.
        self.params = {n: Parameter(p.clone()) for n, p in given.params.items()}
        self._late: dict[str, Any] | None = None
        self._frozen = groups == 2
        named = [*self.params.items()]
        made: Any = named
        if groups == 1:
            probe = package.TransformOptimizer(copy.deepcopy(named), transform)
            own = {
                key: v for key, v in _smaller(probe.defaults).items() if key != "eps"
            }
            made = [{"params": named[:2]}, {"params": named[2:], **own}]
        elif groups == 2:
            made = [{"params": named[:2]}, {"params": named[2:4]}]
            self._late = {"params": named[4:]}
            self.params["a.bias"].requires_grad_(False)
        elif groups == 3:
            made = [*self.params.values()]
        self.optimizer = package.TransformOptimizer(made, transform, **(options or {}))

    def step(self, index: int, grads: Tensors, told: dict[str, Any]) -> None:
        """Take a step; some also write into groups, or add one."""
        groups = self.optimizer.param_groups
        if self._late is not None and index == 5:
            self.optimizer.add_param_group(self._late)
            self._late = None
        if self._frozen and index == 6:
            self.params["a.bias"].requires_grad_(True)
        if index == 3:
            groups[-1].update(_smaller(groups[-1]))
        if index == 8 and type(groups[0].get("lr")) is float:
            groups[0]["lr"] = 1.5 * groups[0]["lr"]
        here = {id(p) for group in groups for p in group["params"]}
        for name, param in self.params.items():
            grad = grads.get(name)
            used = grad is not None and param.requires_grad and id(param) in here
            param.grad = grad.clone() if used else None
        self.optimizer.step(**told)

    def seen(self) -> dict[str, Any]:
        """Return what others see of it."""
        state = self.optimizer.state
        return {
            "params": {name: param.detach() for name, param in self.params.items()},
            "state": {n: dict(state[p]) for n, p in self.params.items() if p in state},
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                for group in self.optimizer.param_groups
            ],
        }


def _smaller(group: dict[str, Any]) -> dict[str, Any]:
    """Return the plain numbers of a group, halved, and its betas."""
    found: dict[str, Any] = {}
    for key, value in group.items():
        if type(value) is float:
            found[key] = 0.5 * value
        elif isinstance(value, tuple) and {*map(type, value)} == {float}:
            found[key] = tuple(0.5 * part for part in value)
    return found


def in_place(
    package: Any,
    case: Case,
    given: Numbers,
    groups: int = 0,
    options: dict[str, Any] | None = None,
) -> Run:
    """Step as an optimizer."""
    one = InPlace(package, case, given, groups, options)
    yield "start", one.seen()
    for step, (grads, told) in enumerate(zip(given.grads, given.told, strict=True)):
        one.step(step, grads, told)
        yield f"step {step}", one.seen()
        if step % 7 == 6:
            yield f"state dict {step}", one.optimizer.state_dict()
            yield f"transform state {step}", one.optimizer.transform_state()
    yield "readings", one.optimizer.readings()


def scaled(package: Any, case: Case, given: Numbers, *, hands_over: bool) -> Run:
    """Step as an optimizer under a GradScaler, which skips some."""
    one = InPlace(package, case, given, 0, {"amp_scaling": hands_over})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for step, grads in enumerate(given.grads):
        scale = scaler.scale(torch.ones(()))
        for name, param in one.params.items():
            grad = grads.get(name)
            param.grad = None if grad is None else grad * scale.to(grad.dtype)
        if step == 5:
            one.params["scale"].grad = torch.tensor(float("inf")).to(
                one.params["scale"].dtype
            )
        if all(param.grad is None for param in one.params.values()):
            continue
        scaler.step(one.optimizer)
        scaler.update()
        yield f"step {step}", {**one.seen(), "scaler": scaler.state_dict()}


def recorded(package: Any, case: Case, given: Numbers) -> Run:
    """Step with an optimizer whose steps autograd records."""
    first = {n: p.clone().requires_grad_() for n, p in given.params.items()}
    params = {name: param.clone() for name, param in first.items()}
    transform = built(package, case.transform)
    optimizer = package.TransformOptimizer(
        params.items(), transform, differentiable=True
    )
    for step, grads in enumerate(given.grads[:3]):
        for name, param in params.items():
            param.grad = grads.get(name)
        optimizer.step()
        yield f"step {step}", params
    total = sum(param.double().square().sum() for param in params.values())
    yield "derivatives", torch.autograd.grad(total, [*first.values()])


# -- checkpoints -----------------------------------------------------------------------

Box: TypeAlias = dict[str, Any]
"""A checkpoint: what one package leaves, and both go on from."""


def through_file(data: Any) -> Any:
    """Return data as it comes out of a file that holds plain data only."""
    file = io.BytesIO()
    torch.save(data, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved(
    package: Any,
    case: Case,
    given: Numbers,
    groups: int = 0,
    options: dict[str, Any] | None = None,
) -> Box:
    """Take the first steps as an optimizer, and return a checkpoint."""
    one = InPlace(package, case, given, groups, options)
    for step in range(len(given.grads) - GOING_ON):
        one.step(step, given.grads[step], given.told[step])
    return {
        "params": {n: p.detach().clone() for n, p in one.params.items()},
        "groups": groups,
        "optimizer": through_file(one.optimizer.state_dict()),
    }


def restored(package: Any, case: Case, given: Numbers, box: Box) -> Run:
    """Load the checkpoint of an optimizer, and take the last steps."""
    there = dataclasses.replace(given, params=box["params"])
    one = InPlace(package, case, there, box["groups"])
    one.optimizer.load_state_dict(box["optimizer"])
    yield from _going_on(one, given)


def _going_on(one: InPlace, given: Numbers) -> Run:
    yield "loaded", one.seen()
    for step in range(len(given.grads) - GOING_ON, len(given.grads)):
        one.step(step, given.grads[step], given.told[step])
        yield f"step {step}", one.seen()
    yield "state dict", one.optimizer.state_dict()


def pure_saved(package: Any, case: Case, given: Numbers) -> Box:
    """Take the first steps in the pure way, and return a checkpoint."""
    pipeline = _Pipeline(package, case, given.params)
    for step in range(len(given.grads) - GOING_ON):
        pipeline.step(given, step)
    state = package.state_dict(pipeline.state)
    return {"params": pipeline.params, "state": through_file(state)}


def pure_restored(package: Any, case: Case, given: Numbers, box: Box) -> Run:
    """Load the checkpoint of a pure state, and take the last steps."""
    pipeline = _Pipeline(package, case, box["params"])
    pipeline.state = package.load_state_dict(pipeline.state, box["state"])
    yield "loaded", pipeline.state
    for step in range(len(given.grads) - GOING_ON, len(given.grads)):
        yield f"step {step}", pipeline.step(given, step)
    yield "state dict", package.state_dict(pipeline.state)


def to_torch(package: Any, case: Case, given: Numbers, kind: Any) -> Run:
    """Step, go on with torch's own optimizer, and come back."""
    one = InPlace(package, case, given)
    for step in range(6):
        one.step(step, given.grads[step], {})
    theirs = kind([*one.params.values()])
    data = package.to_torch_state_dict(one.optimizer)
    yield "for torch", data
    theirs.load_state_dict(data)
    for step in range(6, 9):
        for name, param in one.params.items():
            grad = given.grads[step].get(name)
            param.grad = None if grad is None else grad.clone()
        theirs.step()
        yield f"step {step}", one.seen()["params"]
    data = package.from_torch_state_dict(one.optimizer, theirs.state_dict())
    yield "from torch", data
    one.optimizer.load_state_dict(data)
    yield from _going_on(one, given)

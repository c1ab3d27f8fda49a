"""A combinator of a user's: labels, groups, windows, readings and explain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

import functional_optim as fo
from functional_optim.testing import check_transform


class ByLayer:
    """Serve each parameter by the transform of its layer: "0.weight" by that of "0"."""

    def __init__(self, layers: dict[str, fo.Transform]) -> None:
        self.layers = layers

    @property
    def scope(self) -> fo.Scope:
        """Return the widest scope of the layers."""
        return max(layer.scope for layer in self.layers.values())

    def children(self) -> dict[str, fo.Transform]:
        """Return the transforms by layer."""
        return self.layers

    def with_children(self, children: dict[str, fo.Transform]) -> ByLayer:
        """Return the same layers with other transforms."""
        return type(self)(children)

    def route(self, name: str, param: torch.Tensor) -> str | None:
        """Return the layer of a parameter, None for another."""
        layer = name.partition(".")[0]
        return layer if layer in self.layers else None

    def split_state(self, state: Any) -> dict[str, Any]:
        """Return the states by layer."""
        return dict(zip(self.layers, state, strict=True))

    def _served(self, layer: str, tensors: fo.TensorMap) -> fo.TensorMap:
        return {n: t for n, t in tensors.items() if self.route(n, t) == layer}

    def init(self, params: fo.TensorMap) -> tuple[Any, ...]:
        """Return the states of the layers."""
        return tuple(
            transform.init(self._served(layer, params))
            for layer, transform in self.layers.items()
        )

    def update(
        self,
        updates: fo.TensorMap,
        state: Any,
        params: fo.TensorMap,
        *,
        context: fo.Context | None = None,
    ) -> tuple[fo.TensorMap, Any]:
        """Return the updates of the layers, and the others as they are."""
        context = context or fo.Context()
        moved = {n: u.clone() for n, u in updates.items() if not self.route(n, u)}
        states = self.split_state(state)
        for layer, transform in self.layers.items():
            served = self._served(layer, updates)
            if served:
                out, states[layer] = transform.update(
                    served,
                    states[layer],
                    self._served(layer, params),
                    context=context.child(layer),
                )
                moved |= out
        return {n: moved[n] for n in params if n in moved}, tuple(states.values())


class ByNumber(ByLayer):
    """The same with positions as labels, which make no groups."""

    def route(self, name: str, param: torch.Tensor) -> Any:
        """Return the number of the layer."""
        return int(name.partition(".")[0])


NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]


def _pipeline() -> fo.Chain:
    return fo.chain(
        fo.Accumulate(2),
        fo.ClipByGlobalNorm(1.0),
        ByLayer({"0": fo.adamw(0.1), "1": fo.sgd(0.5, momentum=0.9)}),
    )


def _parameters() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: Parameter(torch.randn(3, 2, generator=generator).double())
        for name in NAMES
    }


def _gradients(step: int) -> fo.TensorMap:
    generator = torch.Generator().manual_seed(1 + step)
    grads = {n: torch.randn(3, 2, generator=generator).double() for n in NAMES}
    return grads if step != 3 else {n: g for n, g in grads.items() if n != "1.bias"}


def _step(optimizer: fo.TransformOptimizer, params: dict[str, Parameter]) -> None:
    for step in range(6):
        grads = _gradients(step)
        for name, param in params.items():
            param.grad = grads.get(name)
        optimizer.step()


def test_labels_make_groups_with_their_own_hyperparameters() -> None:
    """Parameters of one group in, a group for each label out, as for a `Partition`."""
    optimizer = fo.TransformOptimizer(_parameters().items(), _pipeline())
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight", "0.bias"],
        ["1.weight", "1.bias"],
    ]
    first, second = optimizer.param_groups
    assert first["lr"] == 0.1
    assert second["lr"] == 0.5
    assert second["momentum"] == 0.9
    first["lr"] = 0.2
    layers = optimizer.transform[-1].children()
    assert layers["0"][-1].lr == 0.2
    assert layers["1"][-1].lr == 0.5


@pytest.mark.parametrize("compiles", [False, True])
def test_in_place_is_the_pure_way(compiles: bool) -> None:
    """Windows, one joint norm, other rates: the numbers of `update`."""
    params, pure = _parameters(), _parameters()
    optimizer = fo.TransformOptimizer(params.items(), _pipeline(), compile=compiles)
    optimizer.param_groups[0]["lr"] = 0.2
    transform = optimizer.transform
    state = transform.init(pure)
    for step in range(6):
        updates, state = transform.update(_gradients(step), state, pure)
        pure = fo.apply_updates(pure, updates)
    _step(optimizer, params)
    for name, param in params.items():
        torch.testing.assert_close(param.detach(), pure[name], rtol=1e-12, atol=1e-14)


def test_routes_see_names_and_shapes_in_place() -> None:
    """Small tensors of two children are not one tensor under the name of the first."""
    params = _parameters()
    layers: Any = ByNumber({0: fo.Scale(-0.25), 1: fo.Identity()})
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer = fo.TransformOptimizer(params.items(), layers)
    assert len(optimizer.param_groups) == 1
    for name, param in params.items():
        param.grad = _gradients(0)[name]
    optimizer.step()
    for name, param in params.items():
        factor = -0.25 if name.startswith("0") else 1.0
        assert torch.equal(param, before[name] + factor * _gradients(0)[name])


def test_saved_state_goes_on() -> None:
    params, others = _parameters(), _parameters()
    optimizer = fo.TransformOptimizer(params.items(), _pipeline())
    other = fo.TransformOptimizer(others.items(), _pipeline())
    _step(optimizer, params)
    other.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(params.values(), others.values(), strict=True):
        theirs.data.copy_(mine)
    _step(optimizer, params)
    _step(other, others)
    assert all(map(torch.equal, params.values(), others.values()))


def test_readings_have_the_labels_in_front() -> None:
    params = _parameters()
    optimizer = fo.TransformOptimizer(params.items(), _pipeline())
    _step(optimizer, params)
    found = fo.fetch(optimizer.readings())
    assert {"0.lr": 0.1, "1.lr": 0.5}.items() <= found.items()
    transform, state = optimizer.transform, optimizer.transform_state()
    assert len(fo.state_of(transform, state, "1")) == 2


def test_explain_shows_the_children() -> None:
    text = fo.explain(_pipeline(), {n: p.detach() for n, p in _parameters().items()})
    assert "0:" in text
    assert "ScaleByAdam" in text
    assert "Trace(0.9)" in text


def test_resolve_reaches_the_child_that_serves() -> None:
    """Maps by name and masks inside are constants for one parameter."""
    layers = {"0": fo.Scale({"0.weight": 2.0, "0.bias": 3.0}), "1": fo.Scale(1.0)}
    one = fo.resolve(ByLayer(layers), "0.bias", torch.zeros(1))
    assert one.children() == {"0": fo.Scale(3.0), "1": fo.Scale(1.0)}


def test_it_obeys_the_laws() -> None:
    check_transform(ByLayer({"a": fo.Scale(2.0), "b": fo.Trace(0.9)}), max_examples=5)


class OfJointNorm:
    """Divide by the joint norm, and subtract each tensor's mean."""

    scope = fo.Scope.PER_TENSOR

    def init(self, params: fo.TensorMap) -> tuple[()]:
        """Return the empty state."""
        return ()

    def update(
        self,
        updates: fo.TensorMap,
        state: tuple[()],
        params: fo.TensorMap,
        *,
        context: fo.Context | None = None,
    ) -> tuple[fo.TensorMap, tuple[()]]:
        """Return u / ||updates|| - mean(u)."""
        norms = torch.stack([u.norm() for u in updates.values()])
        joint = (context or fo.Context()).reduce(norms, fo.Norm(2.0))
        return {n: u / joint - u.mean() for n, u in updates.items()}, state


class Twice:
    """Run a transform on its own results."""

    scope = fo.Scope.PER_TENSOR

    def __init__(self, inner: fo.Transform) -> None:
        self.inner = inner

    def children(self) -> dict[int, fo.Transform]:
        """Return the one transform."""
        return {0: self.inner}

    def with_children(self, children: dict[int, fo.Transform]) -> Twice:
        """Return the same of another transform."""
        return Twice(children[0])

    def split_state(self, state: Any) -> dict[int, Any]:
        """Return the state of the transform."""
        return {0: state}

    def init(self, params: fo.TensorMap) -> Any:
        """Return the state of the transform."""
        return self.inner.init(params)

    def update(
        self,
        updates: fo.TensorMap,
        state: Any,
        params: fo.TensorMap,
        *,
        context: fo.Context | None = None,
    ) -> tuple[fo.TensorMap, Any]:
        """Return the updates of the updates."""
        child = (context or fo.Context()).child(0)
        for _ in range(2):
            updates, state = self.inner.update(updates, state, params, context=child)
        return updates, state


@pytest.mark.parametrize("guards", [False, True])
def test_a_whole_tensor_child_that_runs_twice_gets_both_totals(guards: bool) -> None:
    """Its first result is memoized; the call of `reduce` in it counts all the same."""
    transform: fo.Transform = fo.chain(Twice(OfJointNorm()), fo.sgd(1.0))
    transform = fo.SkipNonfinite(transform) if guards else transform
    grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 2.0])}
    grads = {name: grad.double() for name, grad in grads.items()}
    params = {n: Parameter(torch.zeros_like(grad)) for n, grad in grads.items()}
    optimizer = fo.TransformOptimizer(params.items(), transform)
    for name, param in params.items():
        param.grad = grads[name].clone()
    optimizer.step()
    zeros = {n: torch.zeros_like(grad) for n, grad in grads.items()}
    wanted, _ = transform.update(grads, transform.init(zeros), zeros)
    torch.testing.assert_close(params, wanted, rtol=1e-12, atol=0, check_dtype=True)

"""One mask, one map by name, one set of rules for all parts of a pipeline."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from comparison import assert_same
from law_examples import numbers

import functional_optim as fo

SHAPES = {"b.w": (3, 2), "b.bias": (3,), "h.w": (2, 3), "h.bias": (2,)}
PARAMS = numbers(SHAPES, 1)
GRADS = numbers(SHAPES, 2)
MASK = {"b.w": True, "b.bias": False, "h.w": True, "h.bias": False}
RATES = {"b.w": 0.1, "b.bias": 0.2, "h.w": 0.3, "h.bias": torch.tensor(0.4).double()}
LABELS = {"b.*": "body", "*": "head"}

PARTS = {
    "a mask": lambda: fo.adamw(0.1, mask=MASK),
    "a rate for each name": lambda: fo.sgd(RATES, momentum=0.9),
    "betas by name": lambda: fo.adam(0.1, betas=(dict.fromkeys(SHAPES, 0.5), 0.9)),
    "eps_root by name": lambda: fo.adam(0.1, eps_root=dict.fromkeys(SHAPES, 1e-9)),
    "limits by name": lambda: fo.chain(fo.ClipByNorm(RATES), fo.ClipByValue(RATES)),
    "multipliers": lambda: fo.MultiplyParamwise({"h.bias": 2.0, "b.w": 0.5}),
    "rules": lambda: fo.MultiplyParamwise({"h.*": 2.0, "*.bias": 0.5}),
    "excluded": lambda: fo.adamw(0.1, mask=fo.exclude("h.*", "*.bias")),
    "a Masked": lambda: fo.Masked(fo.Scale(RATES), MASK),
    "guarded": lambda: fo.SkipNonfinite(fo.Named("part", fo.adamw(RATES, mask=MASK))),
}

each_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)


def _moved(transform: fo.Transform) -> fo.TensorMap:
    """Return the parameters after two steps."""
    params, state = PARAMS, transform.init(PARAMS)
    for factor in (1.0, -0.5):
        grads = {name: factor * g for name, g in GRADS.items()}
        updates, state = transform.update(grads, state, params)
        params = fo.apply_updates(params, updates)
    return params


@each_part
def test_parts_take_what_is_written_for_the_whole(part) -> None:
    """What has the names of the whole model does the same in each of its parts."""
    expected = _moved(part())
    both = fo.Partition({"body": part(), "head": part()}, LABELS)
    assert_same(_moved(both), expected, "partition")
    masked = fo.chain(fo.Masked(part(), "b.*"), fo.Masked(part(), "h.*"))
    assert_same(_moved(masked), expected, "masked")
    inside = fo.Masked(fo.chain(fo.Masked(part(), "*.w")), "b.*")
    rest = fo.chain(fo.Masked(part(), "h.*"), fo.Masked(part(), "b.bias"))
    assert_same(_moved(fo.chain(inside, rest)), expected, "masked in masked")


def _check_in_place(transform: fo.Transform, *, compiled: bool = False) -> None:
    """Take two steps of an optimizer, and load its checkpoint into another."""
    params = {name: torch.nn.Parameter(p.clone()) for name, p in PARAMS.items()}
    optimizer = fo.TransformOptimizer(params.items(), transform, compile=compiled)
    for factor in (1.0, -0.5):
        for name, p in params.items():
            p.grad = factor * GRADS[name]
        optimizer.step()
    again = fo.TransformOptimizer(params.items(), transform, compile=compiled)
    again.load_state_dict(optimizer.state_dict())
    expected = _moved(transform)
    for name, p in params.items():
        assert torch.allclose(p, expected[name], rtol=1e-12), name


@each_part
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_parts_of_an_optimizer(part, compiled: bool) -> None:
    """In place, too, and its checkpoint loads."""
    both = fo.Partition({"body": part(), "head": part()}, LABELS)
    _check_in_place(both, compiled=compiled)


@dataclasses.dataclass(frozen=True)
class _Only:
    """A user's combinator: a transform for the names with a prefix, others stay."""

    inner: fo.Transform
    prefix: str

    scope = fo.Scope.PER_TENSOR  # It looks at names.

    def _own(self, tensors: fo.TensorMap) -> fo.TensorMap:
        return {n: x for n, x in tensors.items() if n.startswith(self.prefix)}

    def init(self, params):
        """Return the inner state over its own parameters."""
        return self.inner.init(self._own(params))

    def update(self, updates, state, params, *, context=None):
        """Return inner(u) for its own names, u for the others."""
        own, ours = self._own(updates), self._own(params)
        moved, state = self.inner.update(own, state, ours, context=context)
        others = {n: u.clone() for n, u in updates.items() if n not in own}
        return moved | others, state


@each_part
def test_parts_of_a_users_combinator(part) -> None:
    """A combinator made elsewhere gives parts to its transforms as ours do."""
    both = fo.chain(_Only(part(), "b."), _Only(part(), "h."))
    assert_same(_moved(both), _moved(part()), "both")
    _check_in_place(both)
    inside = fo.Named("part", fo.chain(_Only(_Only(part(), "b.w"), "b.")))
    rest = [_Only(part(), prefix) for prefix in ("b.bias", "h.")]
    assert_same(_moved(fo.chain(inside, *rest)), _moved(part()), "inside")


WRONG = {
    "a mask": (
        lambda: fo.adamw(0.1, mask=MASK | {"h.biass": False}),
        r"mask must have .* unknown \['h.biass'\]",
    ),
    "a mask that lacks one": (
        lambda: fo.adamw(0.1, mask={n: True for n in MASK if n != "b.bias"}),
        r"mask must have .* missing \['b.bias'\]",
    ),
    "a rate": (
        lambda: fo.sgd(RATES | {"b.weight": 0.1}),
        r"lr must have .* unknown \['b.weight'\]",
    ),
    "a rate that lacks one": (
        lambda: fo.sgd({n: r for n, r in RATES.items() if n != "b.w"}),
        r"lr must have .* missing \['b.w'\]",
    ),
    "a multiplier": (
        lambda: fo.MultiplyParamwise({"b.w": 2.0, "h.biass": 0.5}),
        "rule in multipliers: 'h.biass' matches no parameter; .*'h.bias'",
    ),
    "a glob": (
        lambda: fo.adamw(0.1, mask=fo.exclude("*.biass")),
        r"mask: '\*.biass' matches no parameter; .*'h.bias'",
    ),
}


@pytest.mark.parametrize(("part", "message"), WRONG.values(), ids=WRONG)
def test_misspelt_names_are_refused_in_parts(part, message: str) -> None:
    """A name that not even the whole model has is refused, and what lacks one."""
    with pytest.raises(ValueError, match=message):
        fo.Partition({"body": part(), "head": part()}, LABELS).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        fo.Masked(part(), "b.*").init(PARAMS)
    with pytest.raises(ValueError, match=message):
        fo.chain(_Only(part(), "b.")).init(PARAMS)
    body = {name: p for name, p in PARAMS.items() if name.startswith("b.")}
    with pytest.raises(ValueError, match=r"unknown \['h.w', 'h.bias'\]"):
        fo.adamw(0.1, mask=MASK).init(body)  # Here the body is the whole.

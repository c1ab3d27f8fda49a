"""The table: at least one valid instance of every public transform and preset.

A public transform that is missing here fails `test_public_api.py`. Tags say where a law
does not apply, with the reason.
"""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import Tensor

import functional_optim as fo
from functional_optim import schedules
from functional_optim.testing._examples import SHAPES


def is_matrix(name: str, param: Tensor) -> bool:
    """Select what is no bias: a predicate with a name, so that it pickles."""
    return param.ndim >= 2


def by_shape(name: str, param: Tensor) -> str:
    """Label matrices and the rest."""
    return "matrix" if param.ndim >= 2 else "other"


def by_letter(name: str, param: Tensor) -> str:
    """Label by the first letter of the name."""
    return "x" if name.startswith("a") else "y"


def halving(step: Tensor) -> Tensor:
    """Halve at every step: a user's own schedule."""
    return 0.5**step


def the_parameter(update: Tensor, param: Tensor) -> Tensor:
    """Observe parameters."""
    return param


def magnitude(update: Tensor, param: Tensor) -> Tensor:
    """Observe sizes."""
    return update.abs()


def is_small(update: Tensor, param: Tensor) -> Tensor:
    """Observe which updates are smaller than their parameters: booleans."""
    return update.abs() < param.abs()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A transform, and what is known about it."""

    transform: fo.Transform
    smooth: bool = True
    """Whether the output has a derivative everywhere; maxima and limits have none."""
    contexts: tuple[fo.Context, ...] = ()
    """What the loop knows at each step, in turns; nothing if left out."""
    row: str = ""
    """In which row of docs/laws.md it stands; the name of its class if left out."""

    @property
    def label(self) -> str:
        """The row it stands in."""
        return self.row or type(self.transform).__name__.replace("Chain", "chain")

    def __repr__(self) -> str:
        return repr(self.transform)


NAMES = list(SHAPES)

CASES = [
    Case(transform=fo.Scale(-2.0)),
    Case(transform=fo.Scale(halving)),
    Case(
        transform=fo.Scale(
            schedules.join((schedules.linear(0.0, 1.0, 2), halving), (2,))
        )
    ),
    Case(transform=fo.Scale(dict.fromkeys(NAMES, 0.5) | {"scale": torch.tensor(3.0)})),
    Case(transform=fo.Scale(torch.tensor(0.3, dtype=torch.float64))),
    Case(transform=fo.Unscale(1024.0)),
    Case(transform=fo.Unscale(torch.tensor(3.0))),
    Case(transform=fo.ScaleByLearningRate(0.1)),
    Case(transform=fo.ScaleByLearningRate(schedules.linear(0.1, 0.0, 7))),
    Case(transform=fo.ScaleByLearningRate(schedules.one_cycle(0.1, 7))),
    Case(transform=fo.Accumulate(1)),
    Case(transform=fo.Accumulate(3)),
    Case(
        transform=fo.Accumulate(4),
        contexts=(
            fo.Context(weight=3.0),
            fo.Context(weight=torch.tensor(0.5), last=True),
        ),
    ),
    Case(transform=fo.Accumulate(2, mean=False, dtype=torch.float64)),
    Case(transform=fo.ClipByGlobalNorm(0.5)),
    Case(transform=fo.ClipByGlobalNorm(schedules.linear(0.5, 0.1, 5))),
    Case(transform=fo.ClipByGlobalNorm(0.5, norm_type=float("inf")), smooth=False),
    Case(transform=fo.ClipByGlobalNorm(0.5, norm_type=1.0)),
    Case(transform=fo.ClipByNorm(0.5)),
    Case(transform=fo.ClipByNorm(torch.tensor(0.5), norm_type=1.0)),
    Case(transform=fo.ClipByNorm(0.5, norm_type=float("inf")), smooth=False),
    Case(transform=fo.ClipByNorm(schedules.exponential(2.0, 0.5, end_value=0.1))),
    Case(
        transform=fo.ClipByNorm(
            dict.fromkeys(NAMES, 0.5) | {"scale": torch.tensor(0.1)}, norm_type=3.0
        )
    ),
    Case(transform=fo.ClipByValue(0.3), smooth=False),
    Case(transform=fo.ClipByValue(torch.tensor(0.3)), smooth=False),
    Case(transform=fo.ClipByValue(dict.fromkeys(NAMES, 0.3)), smooth=False),
    Case(transform=fo.Trace(0.9)),
    Case(transform=fo.Trace(0.9, dampening=0.5)),
    Case(transform=fo.Trace(0.9, nesterov=True)),
    Case(transform=fo.Trace(schedules.linear(0.5, 0.9, 5), dampening=halving)),
    Case(transform=fo.Trace(schedules.piecewise((0.5, 0.9), (2,)))),
    Case(transform=fo.Trace(0.9, dampening=dict.fromkeys(NAMES, 0.1))),
    Case(transform=fo.ScaleByAdam()),
    Case(transform=fo.ScaleByAdam((0.8, 0.99), eps=1e-6, eps_root=1e-9, amsgrad=True)),
    Case(transform=fo.ScaleByAdam((torch.tensor(0.9), schedules.linear(0.9, 0.99, 5)))),
    Case(transform=fo.ScaleByAdam((dict.fromkeys(NAMES, 0.7), 0.9))),
    Case(transform=fo.AddDecayedWeights(0.1)),
    Case(transform=fo.Masked(fo.AddDecayedWeights(halving), is_matrix)),
    Case(transform=fo.AddDecayedWeights(schedules.polynomial(0.1, 0.0, 5, power=2))),
    Case(transform=fo.Masked(fo.AddDecayedWeights(torch.tensor(0.1)), "*.weight")),
    Case(transform=fo.MultiplyParamwise({"*.bias": 2.0, "b.*": 0.5})),
    Case(
        transform=fo.MultiplyParamwise(
            [(re.compile(r"^a\."), 3.0), (is_matrix, torch.tensor(0.1))]
        )
    ),
    Case(transform=fo.Identity()),
    Case(transform=fo.Centralize()),
    Case(transform=fo.ZeroNans()),
    Case(transform=fo.SetToZero()),
    Case(transform=fo.Masked(fo.Centralize(), is_matrix)),
    Case(
        transform=fo.Partition(
            {"matrix": fo.sgd(0.1, momentum=0.9), "other": fo.SetToZero()}, by_shape
        )
    ),
    Case(
        transform=fo.chain(
            fo.ZeroNans(), fo.Centralize(), fo.ClipByNorm(1.0), fo.adamw(0.1)
        )
    ),
    Case(transform=fo.Observe("grad_norm")),
    Case(transform=fo.Observe("param_norm", the_parameter, op=fo.Norm(1.0))),
    Case(transform=fo.Observe("small_norm", is_small, op=fo.Norm(float("inf")))),
    Case(transform=fo.Observe("total", op="sum")),
    Case(transform=fo.Observe("small", is_small, op="sum")),
    Case(transform=fo.Observe("largest", magnitude, op="max")),
    Case(transform=fo.Observe("any_small", is_small, op="max")),
    Case(transform=fo.Observe("all_small", is_small, op="all")),
    Case(
        transform=fo.chain(
            fo.Observe("before"),
            fo.Trace(0.9),
            fo.Observe("after", magnitude, op="max"),
        )
    ),
    Case(
        transform=fo.Partition(
            {"x": fo.Observe("x"), "y": fo.chain(fo.Observe("y", op="sum"))}, by_letter
        )
    ),
    Case(transform=fo.Named("direction", fo.ScaleByAdam())),
    Case(
        transform=fo.Named(
            "outer", fo.chain(fo.ClipByGlobalNorm(0.5), fo.adamw(halving))
        )
    ),
    Case(transform=fo.Named("window", fo.chain(fo.Accumulate(3)))),
    Case(transform=fo.Masked(fo.Named("some", fo.Scale(halving)), "*.weight")),
    Case(transform=fo.SkipNonfinite(fo.Named("guarded", fo.sgd(0.1, 0.9)))),
    Case(transform=fo.Masked(fo.Trace(0.9), "*.weight")),
    Case(transform=fo.Masked(fo.ClipByGlobalNorm(0.1), fo.exclude("scale"))),
    Case(
        transform=fo.Partition(
            {"matrix": fo.ScaleByAdam(), "other": fo.Trace(0.5)}, by_shape
        )
    ),
    Case(
        transform=fo.Partition(
            {"x": fo.ClipByGlobalNorm(0.1), "y": fo.Scale(halving)},
            {"a.*": "x", "*": "y"},
        )
    ),
    Case(transform=fo.SkipNonfinite(fo.sgd(0.1, momentum=0.9))),
    Case(
        transform=fo.SkipNonfinite(
            fo.chain(fo.ClipByGlobalNorm(0.5), fo.adamw(schedules.linear(1.0, 0.0, 9)))
        )
    ),
    Case(transform=fo.chain()),
    Case(transform=fo.sgd(0.1, 0.9, 0.1, 0.01), row="sgd"),
    Case(transform=fo.sgd(schedules.inverse_sqrt(0.1, 2), momentum=0.9), row="sgd"),
    Case(
        transform=fo.adam(0.1, weight_decay=0.1, amsgrad=True, maximize=True),
        row="adam",
    ),
    Case(
        transform=fo.adamw(schedules.cosine_decay(0.1, 9), mask="*.weight"), row="adamw"
    ),
    Case(
        transform=fo.chain(
            fo.Unscale(8.0),
            fo.Accumulate(2),
            fo.ClipByGlobalNorm(0.5),
            fo.MultiplyParamwise({"b.*": 0.5}),
            fo.adamw(schedules.warmup_cosine(0.1, 2, 9)),
        ),
    ),
]

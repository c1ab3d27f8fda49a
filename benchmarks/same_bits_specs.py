"""Transforms written down for no package yet, so that two can build the same.

`SAY.chain(SAY.sgd(0.1))` is a `Call`; `built(package, call)` makes it with the names of
a package. Only public names stand here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (5, 3),
    "a.bias": (5,),
    "b.weight": (4, 3, 2, 2),
    "b.bias": (4,),
    "scale": (),
}
NAMES = list(SHAPES)

INSIDE, WRAPPED = "accumulate-inside", "accumulate-wrapped"
"""Tags of chains with Accumulate behind more than Unscale, or inside a combinator."""


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call to make: of what, with what."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __repr__(self) -> str:
        parts = [*map(_text, self.args)]
        parts += [f"{key}={_text(value)}" for key, value in self.kwargs.items()]
        return f"{self.path}({', '.join(parts)})"


class Say:
    """Writes down what is called under its name."""

    def __init__(self, path: str = "") -> None:
        self._path = path

    def __getattr__(self, name: str) -> Say:
        return Say(f"{self._path}.{name}" if self._path else name)

    def __call__(self, *args: Any, **kwargs: Any) -> Call:
        """Write down a call."""
        return Call(self._path, args, kwargs)


SAY = Say()
S = SAY.schedules


def _text(value: Any) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{k!r}: {_text(v)}" for k, v in value.items())
        return f"{{{pairs}}}"
    if isinstance(value, Tensor):
        return f"tensor({value.item()}, {value.dtype})"
    return str(getattr(value, "__name__", repr(value)))


def built(package: Any, value: Any) -> Any:
    """Return what is written down, made with the names of a package."""
    if isinstance(value, Call):
        made = functools.reduce(getattr, value.path.split("."), package)
        kwargs = {key: built(package, part) for key, part in value.kwargs.items()}
        args = [built(package, part) for part in value.args]
        if value.path == "AddDecayedWeights" and hasattr(package, "Rule"):
            # Its mask became a combinator.
            mask = kwargs.pop("mask", None)
            decay = made(*args, **kwargs)
            return decay if mask is None else package.Masked(decay, mask)
        return made(*args, **kwargs)
    if isinstance(value, dict):
        return {key: built(package, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(built(package, part) for part in value)
    return value.clone() if isinstance(value, Tensor) else value


@dataclasses.dataclass(frozen=True)
class Case:
    """A transform to compare.

    Attributes:
        transform: It.
        tags: What it has that may be refused some day; see `REFUSED`.
    """

    transform: Call
    tags: frozenset[str] = frozenset()

    def has(self, *names: str) -> bool:
        """Whether one of these is called in it."""
        return any(f"{name}(" in repr(self.transform) for name in names)

    @property
    def has_names(self) -> bool:
        """Whether names of parameters may stand in it."""
        return any(mark in repr(self.transform) for mark in ("'", "re.compile"))


# -- functions that users write --------------------------------------------------------


def is_matrix(name: str, param: Tensor) -> bool:
    """Select what is no bias."""
    return param.ndim >= 2


def by_shape(name: str, param: Tensor) -> str:
    """Label matrices and the rest."""
    return "matrix" if param.ndim >= 2 else "other"


def halving(step: Tensor) -> Tensor:
    """Halve at every step."""
    return 0.5**step


def wave(step: Tensor) -> Tensor:
    """Go up and down between 0 and 0.4."""
    return 0.2 + 0.2 * torch.sin(step)


def the_parameter(update: Tensor, param: Tensor) -> Tensor:
    """Observe parameters."""
    return param


def magnitude(update: Tensor, param: Tensor) -> Tensor:
    """Observe sizes."""
    return update.abs()


def is_small(update: Tensor, param: Tensor) -> Tensor:
    """Observe which updates are smaller than their parameters: booleans."""
    return update.abs() < param.abs()


# -- the tables ------------------------------------------------------------------------

SCHEDULES = [
    S.constant(0.3),
    S.linear(0.1, 0.5, 7),
    S.polynomial(0.1, 0.0, 5, power=2),
    S.polynomial(0.1, 0.4, 9),
    S.exponential(0.5, 0.9),
    S.exponential(0.5, 0.5, decay_steps=4, staircase=True, end_value=0.05),
    S.inverse_sqrt(0.2, 3),
    S.cosine_decay(0.4, 11),
    S.cosine_decay(0.4, 11, 0.1),
    S.warmup_cosine(0.4, 3, 12),
    S.warmup_cosine(0.4, 3, 12, init_value=0.1, end_value=0.05),
    S.one_cycle(0.4, 13),
    S.one_cycle(0.4, 13, pct_start=0.5, div_factor=3.0, final_div_factor=10.0),
    S.piecewise((0.5, 0.3, 0.1), (2, 7)),
    S.join((S.linear(0.0, 0.5, 3), halving, S.cosine_decay(0.2, 6)), (3, 8)),
]


def _named(value: float, **others: Any) -> dict[str, Any]:
    return dict.fromkeys(NAMES, value) | others


def _tensor(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def transform_cases() -> list[Case]:
    """Return every public transform, with several sets of options."""
    fourth = _tensor(0.25, torch.float64)
    plain = [
        *(SAY.Scale(f) for f in (-2.0, 0.3, 0.0, 1.0, halving, wave, _tensor(0.3))),
        *(SAY.Scale(f) for f in (_named(0.5, scale=_tensor(3.0)), fourth)),
        *(SAY.Scale(schedule) for schedule in SCHEDULES),
        *(SAY.Unscale(f) for f in (1024.0, 3.0, _tensor(3.0), S.linear(8.0, 2.0, 5))),
        *(SAY.ScaleByLearningRate(f) for f in (0.1, 0.0, _tensor(0.1), wave)),
        SAY.ScaleByLearningRate(_named(0.1, scale=0.3)),
        SAY.ScaleByLearningRate(S.one_cycle(0.1, 7)),
        *(SAY.Accumulate(every) for every in (1, 2, 3)),
        SAY.Accumulate(3, mean=False),
        SAY.Accumulate(2, mean=False, dtype=torch.float64),
        SAY.Accumulate(2, dtype=torch.float32),
        *(
            SAY.ClipByGlobalNorm(bound, norm_type=order)
            for bound in (0.5, 100.0, S.linear(0.5, 0.1, 5), _tensor(0.7))
            for order in (2.0, 1.0, 3.0, math.inf)
        ),
        SAY.ClipByGlobalNorm(0.5, error_if_nonfinite=True),
        *(
            SAY.ClipByNorm(bound, norm_type=order)
            for bound in (0.5, wave, _named(0.5, scale=_tensor(0.1)), fourth)
            for order in (2.0, 1.0, 3.0, math.inf)
        ),
        *(SAY.ClipByValue(bound) for bound in (0.3, _tensor(0.3), _named(0.3), wave)),
        SAY.Centralize(),
        SAY.ZeroNans(),
        SAY.SetToZero(),
        SAY.Identity(),
        SAY.chain(),
        SAY.Trace(0.9),
        SAY.Trace(0.9, dampening=0.5),
        SAY.Trace(0.9, nesterov=True),
        SAY.Trace(0.0),
        SAY.Trace(_tensor(0.9), nesterov=True),
        SAY.Trace(S.linear(0.5, 0.9, 5), dampening=halving),
        SAY.Trace(S.piecewise((0.5, 0.9), (2,))),
        SAY.Trace(0.9, dampening=_named(0.1)),
        SAY.Trace(_named(0.9, scale=0.0)),
        *(
            SAY.ScaleByAdam(betas, eps_root=root, amsgrad=amsgrad)
            for betas in ((0.9, 0.999), (0.0, 0.5))
            for root in (0.0, 1e-9)
            for amsgrad in (False, True)
        ),
        SAY.ScaleByAdam((0.8, 0.99), eps=1e-3),
        SAY.ScaleByAdam((_tensor(0.9), S.linear(0.9, 0.99, 5)), eps=_tensor(1e-6)),
        SAY.ScaleByAdam((_named(0.7, scale=0.3), 0.9), eps_root=1e-8),
        SAY.ScaleByAdam((wave, 0.9), eps=halving, amsgrad=True),
        *(
            SAY.AddDecayedWeights(rate, mask=mask)
            for rate in (0.1, halving, _tensor(0.1), _named(0.1))
            for mask in (None, is_matrix, "*.weight", SAY.exclude("*bias"))
        ),
        SAY.AddDecayedWeights(0.1, mask=_named(True, scale=False)),
        SAY.AddDecayedWeights(0.1, mask=("a.*", re.compile("scale"))),
        SAY.MultiplyParamwise({"*.bias": 2.0, "b.*": 0.5}),
        SAY.MultiplyParamwise([(re.compile(r"^a\."), 3.0), (is_matrix, _tensor(0.1))]),
        SAY.Masked(SAY.Centralize(), is_matrix),
        SAY.Masked(SAY.Trace(0.9), "*.weight"),
        SAY.Masked(SAY.ClipByGlobalNorm(0.1), SAY.exclude("scale")),
        SAY.Partition(
            {"matrix": SAY.sgd(0.1, momentum=0.9), "other": SAY.SetToZero()}, by_shape
        ),
        SAY.Partition(
            {"x": SAY.ClipByGlobalNorm(0.1), "y": SAY.Scale(halving)},
            {"a.*": "x", "*": "y"},
        ),
        SAY.Partition(
            {"x": SAY.adamw(0.1, weight_decay=0.1), "y": SAY.adamw(wave)},
            {"*weight": "x", "*": "y"},
        ),
        *(SAY.Observe("seen", op=op) for op in (SAY.Norm(2.0), "sum", "max")),
        SAY.Observe("seen", the_parameter, op=SAY.Norm(1.0)),
        SAY.Observe("seen", magnitude, op=SAY.Norm(math.inf)),
        *(SAY.Observe("seen", is_small, op=op) for op in ("sum", "max", "all")),
        SAY.Named("outer", SAY.chain(SAY.ClipByGlobalNorm(0.5), SAY.adamw(halving))),
        SAY.SkipNonfinite(SAY.sgd(0.1, momentum=0.9)),
        SAY.SkipNonfinite(SAY.Named("guarded", SAY.adamw(0.1, amsgrad=True))),
        SAY.SkipNonfinite(
            SAY.chain(SAY.ClipByGlobalNorm(0.5), SAY.adamw(S.linear(1.0, 0.0, 9)))
        ),
        SAY.chain(
            SAY.Unscale(8.0),
            SAY.Accumulate(2),
            SAY.ClipByGlobalNorm(0.5),
            SAY.MultiplyParamwise({"b.*": 0.5}),
            SAY.adamw(S.warmup_cosine(0.1, 2, 9), mask=SAY.exclude("*bias", "scale")),
        ),
    ]
    wrapped = [
        SAY.Named("window", SAY.chain(SAY.Accumulate(3))),
        SAY.Masked(SAY.Accumulate(2), "*.weight"),
        SAY.Partition(
            {"x": SAY.chain(SAY.Accumulate(2), SAY.adamw(0.1)), "y": SAY.sgd(0.1)},
            {"a.*": "x", "*": "y"},
        ),
    ]
    inside = [
        SAY.chain(SAY.ClipByNorm(0.5), SAY.Accumulate(2), SAY.sgd(0.1)),
        SAY.chain(SAY.ZeroNans(), SAY.Accumulate(3), SAY.adamw(0.1)),
        SAY.chain(SAY.Accumulate(2), SAY.Accumulate(2), SAY.adamw(0.1)),
    ]
    return [
        *map(Case, plain),
        *(Case(call, frozenset({WRAPPED})) for call in wrapped),
        *(Case(call, frozenset({INSIDE})) for call in inside),
    ]


def preset_cases() -> list[Case]:
    """Return every preset with every combination of flags that makes sense."""
    flags = (False, True)
    found = [
        SAY.sgd(0.1, momentum, dampening, decay, nesterov, maximize=maximize)
        for momentum, dampening, decay, nesterov, maximize in itertools.product(
            (0.0, 0.9), (0.0, 0.1), (0.0, 0.01), flags, flags
        )
        if not (nesterov and (dampening or not momentum))
    ]
    found += [
        SAY.adam(
            0.01,
            weight_decay=decay,
            amsgrad=amsgrad,
            eps_root=root,
            maximize=maximize,
            decoupled_weight_decay=decoupled,
        )
        for decay, amsgrad, root, maximize, decoupled in itertools.product(
            (0.0, 0.1), flags, (0.0, 1e-9), flags, flags
        )
    ]
    found += [
        SAY.adamw(
            0.01, weight_decay=decay, amsgrad=amsgrad, eps_root=root, maximize=maximize
        )
        for decay, amsgrad, root, maximize in itertools.product(
            (0.0, 0.1), flags, (0.0, 1e-9), flags
        )
    ]
    for lr in (S.warmup_cosine(0.1, 3, 15), wave, _tensor(0.03), _named(0.1, scale=0)):
        found += [
            SAY.sgd(lr, 0.9, weight_decay=0.1, mask="*.weight"),
            SAY.sgd(lr, S.linear(0.5, 0.9, 9), 0.1),
            SAY.adam(lr, (0.8, 0.95), weight_decay=_tensor(0.1), mask=is_matrix),
            SAY.adamw(lr, (wave, 0.9), 1e-6, wave, mask=SAY.exclude("*bias")),
            SAY.chain(SAY.ClipByGlobalNorm(0.5), SAY.adamw(lr)),
        ]
    return [*map(Case, found)]


# -- random chains ---------------------------------------------------------------------


class Drawing:
    """Draws chains."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()
        self._tags: set[str] = set()

    def case(self) -> Case:
        """Return a chain in an order that is allowed; in places odd, never wrong."""
        r = self._rng
        self._used, self._tags = set(), set()
        first = [SAY.Unscale(self._number(0.5, 64.0, named=False))] * (r.random() < 0.2)
        windowed = r.random() < 0.3
        if windowed:
            first.append(self._accumulate())
        rest = self._some(self._before(), 3)
        if not windowed and r.random() < 0.2:
            rest.append(self._late_window(alone=not first and not rest))
        rest += self._core()
        if r.random() < 0.25 and not self._tags:
            return Case(SAY.chain(*first, SAY.SkipNonfinite(SAY.chain(*rest))))
        return Case(SAY.chain(*first, *rest), frozenset(self._tags))

    def _late_window(self, *, alone: bool) -> Call:
        kind = self._rng.choice(["plain", "plain", "plain", "named", "masked"])
        self._tags.add(WRAPPED if kind != "plain" or alone else INSIDE)
        if kind == "masked":
            return SAY.Masked(self._accumulate(), self._mask())
        window = self._accumulate()
        return window if kind == "plain" and not alone else SAY.Named("window", window)

    def _accumulate(self) -> Call:
        r = self._rng
        dtype = r.choice([None, None, torch.float32, torch.float64])
        return SAY.Accumulate(r.choice([2, 3]), mean=r.random() < 0.7, dtype=dtype)

    def _before(self) -> list[Callable[[], Call]]:
        r = self._rng
        return [
            SAY.ZeroNans,
            SAY.Centralize,
            SAY.Identity,
            lambda: SAY.ClipByValue(self._number(0.2, 2.0)),
            lambda: SAY.ClipByNorm(self._number(0.2, 2.0), norm_type=self._order()),
            lambda: SAY.ClipByGlobalNorm(
                self._number(0.2, 2.0, named=False), norm_type=self._order()
            ),
            lambda: SAY.Masked(SAY.ClipByGlobalNorm(0.3), self._mask()),
            lambda: SAY.Observe("before", op=r.choice(["sum", "max", SAY.Norm(2.0)])),
            lambda: SAY.Scale(self._number(-2.0, 2.0)),
            # Named: a preset behind it may have a decay of its own.
            lambda: SAY.Named("l2", self._decay()),
        ]

    def _after(self) -> list[Callable[[], Call]]:
        return [
            self._decay,
            lambda: SAY.MultiplyParamwise({"*.bias": 2.0, "b.*": 0.5}),
            lambda: SAY.Observe("after", magnitude, op="max"),
            lambda: SAY.Masked(SAY.Scale(self._number(0.1, 1.0)), self._mask()),
        ]

    def _decay(self) -> Call:
        return SAY.AddDecayedWeights(self._number(0.0, 0.2), mask=self._mask())

    def _some(self, makers: list[Callable[[], Call]], most: int) -> list[Call]:
        chosen = self._rng.sample(makers, self._rng.randint(0, most))
        return [self._alone(make()) for make in chosen]

    def _alone(self, call: Call) -> Call:
        """Give it a name where the chain has one of its class already."""
        classes = set(re.findall(r"[A-Z]\w+(?=\()", repr(call)))
        known = classes & self._used
        self._used |= classes
        return SAY.Named(f"n{len(self._used)}", call) if known else call

    def _core(self) -> list[Call]:
        r = self._rng
        kind = r.choice(["preset", "preset", "moment", "moment", "partition", "none"])
        if kind == "partition":
            inner = {"x": self._preset(), "y": self._preset()}
            if r.random() < 0.3:
                inner["y"] = SAY.SetToZero()
            labels = r.choice([{"a.*": "x", "*": "y"}, {"*weight": "x", "*": "y"}])
            return [SAY.Partition(inner, labels)]
        if kind == "preset":
            preset = self._preset()
            return [SAY.Named("rule", preset) if r.random() < 0.2 else preset]
        moment: list[Call] = []
        if kind == "moment":
            one = self._alone(self._moment())
            moment = [SAY.Masked(one, self._mask()) if r.random() < 0.25 else one]
        after = self._some(self._after(), 2)
        rate = SAY.ScaleByLearningRate(self._number(0.0, 0.2))
        return [*moment, *after, rate]

    def _moment(self) -> Call:
        r = self._rng
        if r.random() < 0.5:
            nesterov = r.random() < 0.3
            dampening = 0.0 if nesterov else self._number(0.0, 0.5)
            momentum = self._number(0.1, 0.95)
            return SAY.Trace(momentum, dampening=dampening, nesterov=nesterov)
        betas = (self._number(0.0, 0.95), self._number(0.5, 0.999))
        root = r.choice([0.0, 0.0, 1e-8])
        amsgrad = r.random() < 0.3
        return SAY.ScaleByAdam(betas, eps=1e-6, eps_root=root, amsgrad=amsgrad)

    def _preset(self) -> Call:
        r = self._rng
        lr, decay = self._number(0.0, 0.2), r.choice([0.0, self._number(0.0, 0.2)])
        mask = self._mask() if r.random() < 0.5 else None
        common = {"weight_decay": decay, "maximize": r.random() < 0.2, "mask": mask}
        if r.random() < 0.4:
            return SAY.sgd(lr, r.choice([0.0, 0.9]), **common)
        betas = (self._number(0.0, 0.95), self._number(0.5, 0.999))
        kind = r.choice([SAY.adam, SAY.adamw])
        return kind(lr, betas, amsgrad=r.random() < 0.3, **common)

    def _number(self, low: float, high: float, *, named: bool = True) -> Any:
        """Return a number, a schedule, a tensor or a map by name."""
        r = self._rng
        value, other = (round(r.uniform(low, high), 3) for _ in range(2))
        kind = r.choice(["plain"] * 4 + ["schedule", "tensor", "map"])
        if kind == "schedule":
            return self._schedule(value, other, low)
        if kind == "tensor":
            return _tensor(value, r.choice([torch.float32, torch.float64]))
        if kind == "map" and named:
            return _named(value, scale=r.choice([other, _tensor(other)]))
        return value

    def _schedule(self, value: float, other: float, low: float) -> Call:
        r = self._rng
        line = S.linear(value, other, r.randint(1, 15))
        split = r.randint(1, 9)
        found = [
            line,
            S.constant(value),
            S.polynomial(value, other, 9, power=2.0),
            S.piecewise((value, other), (split,)),
            S.join((line, S.constant(other)), (split,)),
        ]
        if low == 0.0:
            found += [
                S.cosine_decay(value, 9, 0.1),
                S.warmup_cosine(value, 3, 12),
                S.exponential(value, 0.8),
                S.inverse_sqrt(value, 3),
            ]
        return r.choice(found)

    def _order(self) -> float:
        return self._rng.choice([2.0, 2.0, 1.0, 3.0, math.inf])

    def _mask(self) -> Any:
        found = ["*.weight", is_matrix, SAY.exclude("*bias"), ("a.*", "scale")]
        return self._rng.choice([*found, re.compile("b"), _named(True, scale=False)])


def random_cases(count: int, seed: int) -> list[Case]:
    """Return random chains, the same for the same seed."""
    return [Drawing(random.Random(f"{seed}-{i}")).case() for i in range(count)]

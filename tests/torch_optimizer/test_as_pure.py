"""What once was another number in place than in the pure way: the smallest cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from comparison import assert_same

import functional_optim as fo

ONE = torch.ones(2, dtype=torch.float64)
Steps = Sequence[dict[int, torch.Tensor]]


class Two(NamedTuple):
    """A state with two fields."""

    a: Any
    b: Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """A user's transform, given as its functions."""

    start: Callable[..., Any]
    function: Callable[..., Any]
    scope: fo.Scope = fo.Scope.ELEMENTWISE

    def init(self, params: fo.TensorMap) -> Any:
        """Return the state."""
        return self.start(params)

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return what the function does."""
        return self.function(updates, state, params, context)


def _ones(count: int = 2) -> list[torch.Tensor]:
    return [ONE.clone() for _ in range(count)]


def _zeros(params: fo.TensorMap) -> fo.TensorMap:
    return {name: torch.zeros_like(p) for name, p in params.items()}


def _agree(
    values: Sequence[torch.Tensor], transform: fo.Transform, steps: Steps
) -> Any:
    """Assert that both ways end alike; return the optimizer."""
    leaves = [torch.nn.Parameter(value.clone()) for value in values]
    names = [str(index) for index in range(len(leaves))]
    pipeline = fo.chain(transform)
    params = dict(zip(names, values, strict=True))
    state = pipeline.init(params)
    optimizer = fo.TransformOptimizer(zip(names, leaves, strict=True), pipeline)
    for number, step in enumerate(steps):
        for index, leaf in enumerate(leaves):
            leaf.grad = step[index].clone() if index in step else None
        grads = {name: step[i] for i, name in enumerate(names) if i in step}
        moved, state = pipeline.update(grads, state, params)
        params = fo.apply_updates(params, moved)
        optimizer.step()
        own = {name: leaf.detach() for name, leaf in zip(names, leaves, strict=True)}
        assert_same(params, own, f"step {number}: parameters", 1e-12)
        kept = optimizer.transform_state()
        assert_same(state, kept, f"step {number}: state", 1e-12)


def test_scalars_count_each_for_itself() -> None:
    """0-dim parameters do not share a count of steps."""
    one = torch.ones((), dtype=torch.float64)
    _agree([one, one], fo.adam(0.1), [{0: one}] * 3 + [{0: one, 1: one}])


LABELS = {"0": "a", "1": "b"}


def halving(count: torch.Tensor) -> torch.Tensor:
    """Halve at every step."""
    return 0.1 * 0.5**count


WINDOWS: dict[str, tuple[fo.Transform, Steps]] = {
    "a guard around labels": (
        fo.chain(
            fo.Accumulate(1),
            fo.SkipNonfinite(
                fo.Partition({"a": fo.sgd(0.1), "b": fo.adam(halving)}, LABELS)
            ),
        ),
        [{0: ONE}, {0: ONE}, {0: ONE, 1: ONE}],
    ),
    "a schedule behind the window": (
        fo.chain(
            fo.Accumulate(2),
            fo.Partition({"a": fo.Identity(), "b": fo.Scale(halving)}, LABELS),
            fo.sgd(0.1),
        ),
        [{0: ONE, 1: ONE}, {0: ONE}] * 2,
    ),
    "a norm behind the window": (
        fo.chain(
            fo.Unscale(2.0),
            fo.Accumulate(2),
            fo.Masked(fo.ClipByGlobalNorm(1.0), "1"),
            fo.sgd(0.1),
        ),
        [{0: ONE, 1: ONE}, {0: ONE}],
    ),
    "a named window": (
        fo.chain(fo.Named("window", fo.chain(fo.Accumulate(3))), fo.adam(halving)),
        [{0: ONE, 1: ONE}, {0: ONE}, {1: ONE}, {0: -ONE}, {1: ONE}, {0: ONE}],
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_that_close_without_a_gradient(case: str) -> None:
    """A window that closes moves all names in it, with a gradient now or not."""
    transform, steps = WINDOWS[case]
    _agree(_ones(), transform, steps)


def _previous_norm(u, s, p, c):
    norm = c.reduce(torch.stack([x.norm() for x in u.values()]), fo.Norm(2.0))
    return {k: -x * s.b for k, x in u.items()}, Two(norm, s.a)


def _squares(u, s, p, c):
    new = {k: s.a[k] + x for k, x in u.items()}
    squares = {k: s.b[k] + x * x for k, x in u.items()}
    moved = {k: -0.1 * x / (1 + s.a[k]) for k, x in u.items()}
    return moved, Two(s.a | new, s.b | squares)


def _pulled(u, s, p, c):
    return {k: -0.1 * x + 0.5 * (s.a[k] - p[k]) for k, x in u.items()}, s


def _same_twice(params):
    zeros = _zeros(params)
    return Two(zeros, zeros)


def _same_number(params):
    zero = torch.zeros((), dtype=torch.float64)
    return Two(zero, zero)


def _counts(u, s, p, c):
    return {k: -0.1 * (1 + s.a) * x for k, x in u.items()}, Two(s.a + 1, s.b + 2)


RULES: dict[str, fo.Transform] = {
    "the norm of the step before": Rule(
        lambda p: Two(*torch.zeros(2, dtype=torch.float64).unbind()), _previous_norm
    ),
    "one number for two fields": Rule(_same_number, _counts),
    "one map for two fields": Rule(_same_twice, _squares),
    "the start is kept": Rule(lambda p: Two(dict(p), ()), _pulled),
    "a delay at the end": fo.chain(
        fo.sgd(0.1),
        Rule(
            lambda p: Two(_zeros(p), ()),
            lambda u, s, p, c: ({k: s.a[k] for k in u}, Two(s.a | u, ())),
        ),
    ),
    "a delay of two": Rule(
        lambda p: Two(_zeros(p), _zeros(p)),
        lambda u, s, p, c: (
            {k: -s.b[k] for k in u},
            Two(s.a | u, s.b | {k: s.a[k] for k in u}),
        ),
    ),
}


@pytest.mark.parametrize("sizes", [(2, 2), (2,), (600_000, 2)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_states_that_pass_tensors_on(rule: str, sizes: tuple[int, ...]) -> None:
    """Old tensors may come back; fields may begin as one tensor, or the parameters."""
    values = [torch.ones(size, dtype=torch.float64) for size in sizes]
    steps = [dict(enumerate(by * v for v in values)) for by in (1.0, 10.0, 1.0)]
    _agree(values, RULES[rule], steps)


@dataclasses.dataclass(frozen=True)
class Then:
    """A combinator that does not say where its parts stand."""

    first: fo.Transform
    second: fo.Transform

    @property
    def scope(self) -> fo.Scope:
        """The wider scope."""
        return max(self.first.scope, self.second.scope)

    def init(self, params: fo.TensorMap) -> Any:
        """Return both states."""
        return self.first.init(params), self.second.init(params)

    def update(self, updates, state, params, *, context=None) -> Any:
        """Apply one after the other."""
        updates, a = self.first.update(updates, state[0], params, context=context)
        updates, b = self.second.update(updates, state[1], params, context=context)
        return updates, (a, b)


@pytest.mark.parametrize("twice", [False, True])
def test_combinators_that_do_not_tell_their_parts_apart(twice: bool) -> None:
    """What ran in a first pass is remembered for each part, in its turn."""
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    clip = fo.ClipByNorm(0.5)
    both = Then(clip, clip) if twice else Then(fo.Centralize(), clip)
    pipeline = fo.chain(both, fo.ClipByGlobalNorm(1.0), fo.sgd(0.1))
    _agree([value], pipeline, [{0: value**2}, {0: value}])


def test_what_may_not_be_cut_with_gradients_missing() -> None:
    """A total that only some names reach is asked for only if they have gradients."""
    whole = Rule(
        lambda p: (),
        lambda u, s, p, c: ({k: x.clone() for k, x in u.items()}, s),
        fo.Scope.GLOBAL,
    )
    pipeline = fo.chain(whole, fo.Masked(fo.ClipByGlobalNorm(1.0), "1"), fo.sgd(0.1))
    _agree(_ones(), pipeline, [{0: ONE, 1: ONE}, {0: ONE}, {0: ONE, 1: ONE}])


def test_states_of_their_own_shape_behind_a_window() -> None:
    """A state that is not like its parameter is there when a window closes alone."""
    rule = Rule(
        lambda p: Two({k: torch.zeros(2) for k in p}, ()),
        lambda u, s, p, c: ({k: x + s.a[k][0] for k, x in u.items()}, s),
        fo.Scope.PER_TENSOR,
    )
    big = torch.ones(600_000, dtype=torch.float64)
    steps = [{0: ONE, 1: big}, {0: ONE}]
    _agree([ONE, big], fo.chain(fo.Accumulate(2), rule, fo.sgd(0.1)), steps)


def test_a_first_unit_of_zeros() -> None:
    """An error over a total looks at the total, not at that of a part."""

    def divided(u, s, p, c):
        norm = c.reduce(torch.stack([x.norm() for x in u.values()]), fo.Norm(2.0))
        return {k: x / norm for k, x in u.items()}, s

    big = torch.ones(600_000, dtype=torch.float64)
    late = torch.where(torch.arange(600_000) < 550_000, 0.0, big)
    clip = fo.ClipByGlobalNorm(1.0, error_if_nonfinite=True)
    _agree([big], fo.chain(Rule(lambda p: (), divided), clip, fo.sgd(0.1)), [{0: late}])


def test_joint_norms_of_half_precision() -> None:
    """Pools of float16 have a norm that float16 could not hold."""
    params = [
        torch.nn.Parameter(torch.zeros(n, dtype=d))
        for n, d in ((40_000, torch.float16), (40_000, torch.float16), (3, torch.float))
    ]
    clipped = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(1.0))
    optimizer = fo.TransformOptimizer(params, clipped)
    for param in params:
        param.grad = torch.full_like(param, 250.0)
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in params]))
    optimizer.step()
    # Norms of float16 tensors are rounded to float16 in torch: 2^-11 relative.
    assert abs(float(optimizer.readings()["norm"]) / expected - 1) < 2**-10
    assert all((param < 0).all() for param in params)


def test_learning_rates_in_tensors_of_their_own() -> None:
    """Groups whose tensors are equal by chance go on as two groups."""
    params = [torch.nn.Parameter(p) for p in _ones()]
    rates = [torch.tensor(0.1, dtype=torch.float64) for _ in params]
    groups = [{"params": [p], "lr": r} for p, r in zip(params, rates, strict=True)]
    optimizer = fo.TransformOptimizer(groups, fo.sgd(0.1))
    for param in params:
        param.grad = ONE.clone()
    optimizer.step()
    optimizer.param_groups[1]["lr"].fill_(0.5)
    optimizer.step()
    assert [round(param[0].item(), 12) for param in params] == [0.8, 0.4]


@pytest.mark.parametrize("how", ["state", "state_dict"])
def test_states_change_places(how: str) -> None:
    """The states of two parameters can be exchanged."""
    params = [torch.nn.Parameter(p) for p in _ones()]
    optimizer = fo.TransformOptimizer(params, fo.sgd(0.1, momentum=0.9))
    for factor, param in enumerate(params, start=1):
        param.grad = factor * ONE
    optimizer.step()
    if how == "state":
        state = optimizer.state
        state[params[0]], state[params[1]] = state[params[1]], state[params[0]]
    else:
        saved = optimizer.state_dict()
        saved["state"] = {0: saved["state"][1], 1: saved["state"][0]}
        optimizer.load_state_dict(saved)
    buffers = optimizer.transform_state()[0].momentum_buffer
    assert [buffer[0].item() for buffer in buffers.values()] == [2.0, 1.0]


@pytest.mark.parametrize("first", [0, 1])
def test_unscaling_now_and_then(first: int) -> None:
    """A scaler may hand over unscaled gradients now, and scaled ones then."""
    ends = []
    for amp_scaling in (False, True):
        param = torch.nn.Parameter(ONE.clone())
        optimizer = fo.TransformOptimizer(
            [param],
            fo.chain(fo.ClipByGlobalNorm(1.0), fo.adam(0.1)),
            amp_scaling=amp_scaling,
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale((param**2).sum()).backward()
            if step % 2 == first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        ends.append(param.detach().clone())
    assert_same(ends[0], ends[1], "parameters", 1e-12)


def test_a_step_in_inference_mode() -> None:
    """A step inside inference_mode leaves nothing that later steps cannot use."""
    params = [torch.nn.Parameter(p) for p in _ones()]
    optimizer = fo.TransformOptimizer(params, fo.adam(0.1))
    for step in range(3):
        for index, param in enumerate(params):
            param.grad = None if (step, index) == (1, 1) else ONE.clone()
        with torch.inference_mode(mode=step == 1):
            optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [3.0, 2.0]


def test_parameters_without_memory() -> None:
    """On the meta device an optimizer can be built, and steps."""
    param = torch.nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = fo.TransformOptimizer([param], fo.adam(0.1))
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].is_meta


BASE = torch.zeros(12)


@pytest.mark.parametrize(
    "views",
    [
        (BASE[::2], BASE[::2]),
        (BASE[::2], BASE[:4]),
        (BASE[::3], BASE[1::3], BASE[2:9:2]),
        (BASE.as_strided((3, 4), (2, 1)),),
    ],
    ids=range(4),
)
def test_memory_in_common(views: tuple[torch.Tensor, ...]) -> None:
    """Views that share an element, with others or with themselves, are refused."""
    with pytest.raises(ValueError, match="lie in the same memory|overlaps itself"):
        fo.TransformOptimizer(map(torch.nn.Parameter, views), fo.sgd(0.1))


def test_memory_side_by_side() -> None:
    """Views that only lie between each other are welcome."""
    base = torch.zeros(12)
    params = [torch.nn.Parameter(base[i::3]) for i in range(3)]
    optimizer = fo.TransformOptimizer(params, fo.sgd(0.1))
    for index, param in enumerate(params):
        param.grad = torch.full_like(param, float(index))
    optimizer.step()
    assert torch.allclose(base, -0.1 * (torch.arange(12) % 3))


def test_momentum_that_a_scheduler_takes_away() -> None:
    """While momentum is 0 the buffer waits, as in torch."""
    ends = []
    for make in (
        lambda p: fo.TransformOptimizer(p, fo.sgd(0.1, momentum=0.9)),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ):
        param = torch.nn.Parameter(ONE.clone())
        optimizer = make([param])
        scheduler = torch.optim.lr_scheduler.CyclicLR(
            optimizer, 1e-2, 1e-1, 3, base_momentum=0.0, max_momentum=0.9
        )
        for step in range(13):
            param.grad = ONE * (1 + step)
            optimizer.step()
            scheduler.step()
        ends.append(param.detach().clone())
    assert_same(ends[0], ends[1], "parameters", 1e-12)


def test_a_total_of_some_before_one_of_all() -> None:
    """Parameters that ask for fewer totals wait for those that ask for more."""
    some, everyone = fo.Masked(fo.ClipByGlobalNorm(1.0), "1"), fo.ClipByGlobalNorm(1.0)
    steps = [{0: ONE, 1: 3 * ONE}, {0: ONE}, {1: ONE}]
    _agree(_ones(), fo.chain(some, everyone, fo.sgd(0.1)), steps)

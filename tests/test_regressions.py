"""What was once wrong, or could be without any other test noticing."""

from __future__ import annotations

import math
import re

import pytest
import torch
from comparison import assert_same
from law_examples import example

import functional_optim as fo
from functional_optim import schedules

PARAMS = {"w": torch.tensor([0.5, -2.0]), "b": torch.tensor([1.0])}


def _kinds(value: float) -> list[fo.Hyperparameter]:
    """Return one number as every kind of hyperparameter."""
    as_tensor = torch.tensor(value, dtype=torch.float64)
    return [value, as_tensor, schedules.constant(value), dict.fromkeys(PARAMS, value)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_gradients_do_not_depend_on_the_kind_of_a_beta(dtype) -> None:
    """A tensor beta once rounded (1 - beta) * g * g to 16 bits: 1000 times too far."""
    grads = {name: torch.full_like(p, 1e-5, dtype=dtype) for name, p in PARAMS.items()}
    results = []
    for beta in _kinds(0.999):
        adam = fo.ScaleByAdam((0.9, beta))
        out, state = adam.update(grads, adam.init(PARAMS), PARAMS)
        results.append((out, getattr(state, "state", state).exp_avg_sq))
    for other in results[1:]:
        # float32 has 24 bits; the kinds differ by a rounding of (1 - beta) * g.
        assert_same(results[0], other, "kinds of beta", rtol=3e-7)


def test_narrow_parameters_do_not_depend_on_the_kind_of_weight_decay() -> None:
    """A tensor weight decay once rounded wd * p to 16 bits, which could be 0."""
    params = {name: torch.full_like(p, 1e-2).half() for name, p in PARAMS.items()}
    updates = {
        name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()
    }
    for decay in _kinds(1e-6):
        add = fo.AddDecayedWeights(decay)
        out, _ = add.update(updates, add.init(params), params)
        # p is 1e-2 rounded to 16 bits: 2^-11 relative.
        assert out["w"][0].item() == pytest.approx(1e-8, rel=2**-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_moments_are_interpolated_with_a_wide_weight(dtype) -> None:
    """A tensor beta1 gives the bits of the number for 1000 different gradients."""
    params = {"w": torch.linspace(-1, 1, 1001).to(dtype)}
    results = []
    for beta in (0.9, torch.tensor(0.9, dtype=torch.float64)):
        adam = fo.ScaleByAdam((beta, 0.9))
        results.append(adam.update(params, adam.init(params), params)[1].exp_avg["w"])
    assert torch.equal(*results)


def test_options_that_change_the_state_need_a_new_one() -> None:
    """amsgrad and dampening are not dropped in silence for want of their state."""
    grads = PARAMS
    plain, dampened = fo.Trace(0.9), fo.Trace(0.9, dampening=0.5)
    with pytest.raises(ValueError, match="made without started; call init again"):
        dampened.update(grads, plain.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="made with started; call init again"):
        plain.update(grads, dampened.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="made without max_exp_avg_sq; call init"):
        fo.adam(amsgrad=True).update(grads, fo.adam().init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "transform",
    [
        fo.Accumulate(2),
        fo.ClipByGlobalNorm(1.0),
        fo.Trace(0.9),
        fo.ScaleByAdam(),
        fo.SkipNonfinite(fo.Identity()),
    ],
    ids=repr,
)
def test_a_wrong_state_is_named(transform: fo.Transform) -> None:
    """The empty state where there should be one says what is needed."""
    with pytest.raises(ValueError, match="needs a .*State, got tuple of length 0"):
        transform.update(PARAMS, (), PARAMS)


def test_integer_parameters_are_refused_when_updates_are_applied() -> None:
    """0.7 is not silently cut off."""
    with pytest.raises(TypeError, match="parameter of 'w' has dtype torch.int64"):
        fo.apply_updates({"w": torch.ones(2).long()}, {"w": torch.full((2,), 0.7)})
    with pytest.raises(TypeError, match="parameter of 'w' must be a tensor, got None"):
        fo.apply_updates({"w": None}, {"w": torch.ones(2)})


def test_the_default_device_does_not_matter() -> None:
    """Factors are made where the data lies."""
    pipeline = fo.chain(
        fo.Unscale(2.0), fo.Accumulate(1), fo.adamw(schedules.constant(0.1))
    )
    context = fo.Context(weight=2.0)
    state = pipeline.init(PARAMS)
    expected = pipeline.update(PARAMS, state, PARAMS, context=context)
    with torch.device("meta"):
        state = pipeline.init(PARAMS)
        got = pipeline.update(PARAMS, state, PARAMS, context=context)
    assert_same(expected, got, "under another default device")


def test_contexts_that_are_equal_have_one_hash() -> None:
    """Contexts are values: equal by their numbers, and the same key of a map."""
    context = fo.Context(weight=2, loss=torch.tensor(0.5))
    again = fo.Context(weight=2.0, loss=torch.tensor(0.5))
    assert context == again
    assert len({context, again}) == 1
    assert context != fo.Context(weight=3.0, loss=torch.tensor(0.5))
    assert context != fo.Context(weight=2.0)


@pytest.mark.parametrize("value", ["hello", None, 1.5, [1], {"a": 1}])
def test_damaged_static_values_are_refused(value: object) -> None:
    """A position that is no int is found when it is loaded, not steps later."""
    state = fo.Accumulate(3).init(PARAMS)
    data = fo.state_dict(state)
    data["state"]["fields"]["position"]["value"] = value
    with pytest.raises(ValueError, match="state.position must hold a int"):
        fo.load_state_dict(state, data)
    del data["state"]["fields"]
    with pytest.raises(ValueError, match="state must have fields"):
        fo.load_state_dict(state, data)


def test_plain_data_shares_no_memory() -> None:
    """Writing to what was saved or loaded does not reach the state."""
    trace = fo.Trace(0.9)
    _, state = trace.update(PARAMS, trace.init(PARAMS), PARAMS)
    before = {name: x.clone() for name, x in state.momentum_buffer.items()}
    data = fo.state_dict(state)
    loaded = fo.load_state_dict(state, data)
    for x in data["state"]["fields"]["momentum_buffer"].values():
        x.zero_()
    assert_same(before, state.momentum_buffer, "state")
    assert_same(before, loaded.momentum_buffer, "loaded state")


def test_loaded_counts_are_shared_again() -> None:
    """Names with the same count share a tensor, after loading as after init."""
    adam = fo.ScaleByAdam()
    _, state = adam.update(PARAMS, adam.init(PARAMS), PARAMS)
    _, state = adam.update({"b": PARAMS["b"]}, state, PARAMS)
    loaded = fo.load_state_dict(state, fo.state_dict(state))
    assert loaded.step["w"] is not loaded.step["b"]
    _, state = adam.update({"w": PARAMS["w"]}, state, PARAMS)
    loaded = fo.load_state_dict(state, fo.state_dict(state))
    assert loaded.step["w"] is loaded.step["b"]


def test_a_state_of_another_checkpoint_is_refused_with_the_place() -> None:
    """Names, shapes, dtypes, kinds and lengths that differ are named."""
    pipeline = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.1, 0.9))
    state = pipeline.init(PARAMS)
    data = fo.state_dict(state)
    for other, message in [
        (
            fo.chain(fo.sgd(0.1, 0.9)).init(PARAMS),
            "must be a list of 3 states, got a l",
        ),
        (fo.chain(fo.sgd(0.1, 0.9), fo.Scale(1.0), fo.Scale(1.0)).init(PARAMS), "list"),
        (pipeline.init({"w": PARAMS["w"]}), r"missing \['b'\], unknown \[\]"),
        (pipeline.init(PARAMS | {"x": PARAMS["w"]}), r"unknown \['x'\]"),
        (pipeline.init({n: p.double() for n, p in PARAMS.items()}), "float64"),
        (pipeline.init(PARAMS | {"w": torch.ones(3)}), r"shape \(2,\) .* got \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            fo.load_state_dict(state, fo.state_dict(other))
    with pytest.raises(ValueError, match="data has format 2, this version reads 1"):
        fo.load_state_dict(state, data | {"format": 2})
    with pytest.raises(TypeError, match="data must be what state_dict returns, got l"):
        fo.load_state_dict(state, [])


def test_a_skipped_step_ignores_what_inner_makes_of_it() -> None:
    """NaN that arises inside, from the parameters, is selected away, not multiplied."""
    params = {"w": torch.tensor([math.nan, 1.0])}
    guarded = fo.SkipNonfinite(fo.adamw(0.1))
    bad = {"w": torch.tensor([math.inf, 1.0])}
    out, _ = guarded.update(bad, guarded.init(params), params)
    assert (out["w"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_large_finite_numbers_are_no_reason_to_skip(dtype: torch.dtype) -> None:
    """Each number is judged, not a norm of all, which overflows long before."""
    large = {"w": torch.full((2,), torch.finfo(dtype).max, dtype=dtype)}
    guarded = fo.SkipNonfinite(fo.Identity())
    out, state = guarded.update(large, guarded.init(large), large)
    assert torch.equal(out["w"], large["w"])
    assert state.skipped == 0


def test_hypergradient_over_a_skipped_step_is_finite() -> None:
    """The bad gradient does not reach the derivative of the step that was taken."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def after(lr: torch.Tensor) -> torch.Tensor:
        guarded = fo.SkipNonfinite(fo.adamw(lr))
        params, state = {"w": x}, guarded.init({"w": x})
        for bad in (False, True, False):
            grads = {"w": torch.full_like(x, math.nan) if bad else 2 * params["w"]}
            updates, state = guarded.update(grads, state, params)
            params = fo.apply_updates(params, updates)
        return params["w"].sum()

    lr = torch.tensor(0.1, dtype=torch.float64)
    slope = torch.func.grad(after)(lr)
    difference = (after(lr + 1e-6) - after(lr - 1e-6)) / 2e-6
    # Central differences of 1e-6 leave about 1e-9 relative.
    assert torch.allclose(slope, difference, rtol=1e-6)


def test_reductions_are_identified_by_their_place() -> None:
    """Two clips never take each other's total, wherever they stand."""
    clip = fo.ClipByGlobalNorm(1.0)
    pipeline = fo.chain(
        clip,
        fo.Masked(clip, "w"),
        fo.Partition(
            {"x": fo.chain(fo.Identity(), clip), "y": clip}, {"w": "x", "*": "y"}
        ),
        fo.SkipNonfinite(fo.chain(clip)),
    )
    seen = []

    def reducer(path, partial, op):
        seen.append(path)
        return fo.Context().reduce(partial, op)

    context = fo.Context(reducer=reducer)
    pipeline.update(PARAMS, pipeline.init(PARAMS), PARAMS, context=context)
    assert seen == [(0,), (1, 0), (2, "x", 1), (2, "y"), (3,), (3, 0, 0)]


class Counter:
    """A user's transform that would count even nothing."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params):
        """Return zero."""
        return fo.Static(0)

    def update(self, updates, state, params, *, context=None):
        """Count the call."""
        return {n: u.clone() for n, u in updates.items()}, fo.Static(state.value + 1)


def test_a_chain_stops_where_it_holds() -> None:
    """What stands behind an open window is not even called."""
    pipeline = fo.chain(fo.Accumulate(3), Counter())
    state = pipeline.init(PARAMS)
    for _ in range(7):
        _, state = pipeline.update(PARAMS, state, PARAMS)
    assert state[1].value == 2


class Witness:
    """A user's transform that says which names it is shown."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params):
        """Return the names."""
        return fo.Static(tuple(params))

    def update(self, updates, state, params, *, context=None):
        """Return the names of parameters and updates."""
        seen = fo.Static((*params, *updates))
        return {n: u.clone() for n, u in updates.items()}, seen


@pytest.mark.parametrize(
    "combinator",
    [
        fo.Masked(Witness(), "w"),
        fo.Partition({"x": Witness(), "y": fo.Identity()}, {"w": "x", "*": "y"}),
    ],
    ids=["Masked", "Partition"],
)
def test_an_inner_transform_sees_only_what_is_selected(combinator) -> None:
    """The parameters of others are not there, in `init` as in `update`."""
    state = combinator.init(PARAMS)
    _, after = combinator.update(PARAMS, state, PARAMS)
    for told, names in ((state, ("w",)), (after, ("w", "w"))):
        assert (told[0] if isinstance(told, tuple) else told).value == names


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("*.weight", ["a.weight", "b.weight"]),
        ("a.bias", ["a.bias"]),
        (re.compile(r"\.b"), ["a.bias"]),
        (lambda name, p: p.ndim == 0, ["scale"]),
        (("a.*", re.compile("^s")), ["a.weight", "a.bias", "scale"]),
        (fo.exclude("*.weight", "scale"), ["a.bias", "empty"]),
        (("a.bias", fo.exclude("a.*", "empty")), ["a.bias", "b.weight", "scale"]),
    ],
    ids=map(str, range(7)),
)
def test_what_a_selection_picks(selection, expected: list[str]) -> None:
    """Several selections pick what any of them picks; `exclude` all that none does."""
    params = example().params
    ones = {name: torch.ones_like(p) for name, p in params.items()}
    masked = fo.Masked(fo.Scale(2.0), selection)
    out, _ = masked.update(ones, masked.init(params), params)
    doubled = [name for name, x in out.items() if not torch.equal(x, ones[name])]
    assert doubled == [name for name in expected if params[name].numel()]


class Logged(torch.Tensor):
    """A tensor subclass that sees every operation on it."""

    operations: list[str] = []  # noqa: RUF012 - shared on purpose

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Note the operation and go on."""
        cls.operations.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_see_ordinary_operations() -> None:
    """foreach is for plain tensors: subclasses rarely have rules for it."""
    data = example(full=True)
    params = {name: p.as_subclass(Logged) for name, p in data.params.items()}
    pipeline = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(0.1))
    expected, _ = pipeline.update(
        data.steps[0][0], pipeline.init(data.params), data.params
    )
    Logged.operations.clear()
    grads = {name: g.as_subclass(Logged) for name, g in data.steps[0][0].items()}
    updates, _ = pipeline.update(grads, pipeline.init(params), params)
    assert all(isinstance(u, Logged) for u in updates.values())
    assert not [name for name in Logged.operations if "foreach" in name]
    plain = {name: u.as_subclass(torch.Tensor) for name, u in updates.items()}
    assert_same(expected, plain, "subclass")


def test_load_parameters_is_the_inverse_of_parameters() -> None:
    """Batch norm's buffers, tied and frozen parameters stay as they are."""
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2)
    )
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(requires_grad=False)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    frozen = model[2].bias.clone()
    params = {name: p + 1 for name, p in fo.parameters(model).items()}
    assert list(params) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    fo.load_parameters(model, params)
    assert_same(params, fo.parameters(model), "parameters")
    assert_same(buffers, dict(model.named_buffers()), "buffers")
    assert torch.equal(model[2].bias, frozen)
    assert torch.equal(model[2].weight, params["0.weight"])


def test_gradients_of_frozen_parameters_are_left_out() -> None:
    """The names are those of `parameters`, also if a stale gradient is there."""
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    model.bias.requires_grad_(requires_grad=False)
    assert list(fo.gradients(model)) == list(fo.parameters(model)) == ["weight"]


def test_a_number_in_place_of_a_schedule_keeps_the_count() -> None:
    """Whoever puts the schedule back goes on where it stood."""
    falling = fo.Scale(schedules.linear(1.0, 0.0, 4))
    out, state = falling.update(PARAMS, falling.init(PARAMS), PARAMS)
    _, state = fo.Scale(1.0).update(PARAMS, state, PARAMS)
    out, _ = falling.update(PARAMS, state, PARAMS)
    assert torch.equal(out["b"], 0.75 * PARAMS["b"])


def test_a_schedule_that_returns_nothing_is_named() -> None:
    """A schedule returns a number or a 0-dim tensor."""
    scale = fo.Scale(lambda step: None)
    with pytest.raises(
        TypeError, match="must return a number or a 0-dim tensor, got N"
    ):
        scale.update(PARAMS, scale.init(PARAMS), PARAMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_by_name_is_rounded_as_for_all(dtype: torch.dtype) -> None:
    """torch rounds x + alpha * y once; a map by name rounded the product, too."""
    generator = torch.Generator().manual_seed(0)
    names = ("a", "b")

    def drawn() -> dict[str, torch.Tensor]:
        return {n: torch.randn(99, dtype=dtype, generator=generator) for n in names}

    updates, params = drawn(), drawn()
    for by_name in ({"a": 0.3, "b": 0.3}, {"a": 0.3, "b": torch.tensor(0.5)}):
        for one, other in [
            (fo.AddDecayedWeights(0.3), fo.AddDecayedWeights(by_name)),
            (fo.ScaleByAdam((0.9, 0.7)), fo.ScaleByAdam((0.9, by_name | {"a": 0.7}))),
        ]:
            wanted, _ = one.update(updates, one.init(params), params)
            found, _ = other.update(updates, other.init(params), params)
            assert torch.equal(found["a"], wanted["a"])


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_has_a_finite_norm_in_float16(norm_type, value: float) -> None:
    """A clip inside SkipNonfinite does not raise on it, however large tensors are."""
    params = {"w": torch.zeros(70_000, dtype=torch.float16)}
    clip = fo.ClipByGlobalNorm(1.0, norm_type=norm_type, error_if_nonfinite=True)
    pipeline = fo.SkipNonfinite(fo.chain(clip, fo.sgd(0.1)))
    grads = {"w": torch.full_like(params["w"], value)}
    updates, state = pipeline.update(grads, pipeline.init(params), params)
    assert updates["w"].count_nonzero() == 0
    assert state.skipped == 1

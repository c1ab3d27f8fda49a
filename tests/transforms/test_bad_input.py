"""What users get wrong: each has an error with name, value, legal range and remedy."""

from __future__ import annotations

import copy
import dataclasses
import math
import re

import pytest
import torch
from comparison import assert_same
from transform_cases import CASES

import functional_optim as fo
from functional_optim import schedules

PARAMS = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)}
GRADS = {"a.weight": torch.full((2, 3), 0.5), "a.bias": torch.ones(2)}


@dataclasses.dataclass
class Wrong:
    """A user's transform that returns something else than it should."""

    result: object = None
    scope: object = fo.Scope.ELEMENTWISE

    def init(self, params):
        """Return the empty state."""
        return ()

    def update(self, updates, state, params, *, context=None):
        """Return the wrong thing."""
        return self.result


PIPELINE = fo.chain(fo.Accumulate(1), fo.ClipByGlobalNorm(1.0), fo.adamw(1e-3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: fo.Scale(x), "factor must be finite"),
        (lambda x: fo.Unscale(x), "scale must be finite and > 0"),
        (lambda x: fo.ScaleByLearningRate(x), "lr must be finite and >= 0"),
        (lambda x: fo.ClipByGlobalNorm(x), "max_norm must be finite and > 0"),
        (lambda x: fo.ClipByGlobalNorm(1.0, norm_type=-x), "norm_type must be > 0"),
        (lambda x: fo.ClipByNorm({"a": x}), r"max_norm\['a'\] must be finite and > 0"),
        (lambda x: fo.ClipByValue(x), "clip_value must be finite and >= 0"),
        (lambda x: fo.Trace(x), "momentum must be finite and >= 0"),
        (lambda x: fo.Trace(0.9, dampening=x), "dampening must be finite"),
        (lambda x: fo.ScaleByAdam((x, 0.9)), r"betas\[0\] must be finite and >= 0 and"),
        (lambda x: fo.ScaleByAdam((0.9, x)), r"betas\[1\] must be finite and >= 0 and"),
        (lambda x: fo.ScaleByAdam(eps=x), "eps must be finite and >= 0"),
        (lambda x: fo.ScaleByAdam(eps_root=x), "eps_root must be finite and >= 0"),
        (lambda x: fo.AddDecayedWeights(x), "weight_decay must be finite and >= 0"),
        (
            lambda x: fo.MultiplyParamwise({"a": x}),
            r"multipliers\['a'\] must be finite",
        ),
        pytest.param(lambda x: fo.sgd(x), "lr must be finite and >= 0", id="sgd"),
        pytest.param(
            lambda x: fo.adam(weight_decay=x),
            "weight_decay must be finite and >= 0",
            id="adam",
        ),
        pytest.param(
            lambda x: fo.adamw(eps=x), "eps must be finite and >= 0", id="adamw"
        ),
        (lambda x: fo.Scale({"a": x}), r"factor\['a'\] must be finite"),
        (lambda x: schedules.constant(x), "value must be finite"),
        (lambda x: schedules.linear(x, 0.0, 3), "init_value must be finite"),
        (lambda x: schedules.cosine_decay(1.0, 3, x), "alpha must be finite"),
        (lambda x: schedules.warmup_cosine(x, 1, 3), "peak_value must be finite"),
        (lambda x: fo.Context(weight=x), "weight must be finite and >= 0"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_hyperparameter(make, message: str, value: float) -> None:
    """Numbers that are not finite are refused with the legal range."""
    if message == "norm_type must be > 0" and value == -math.inf:
        return  # -(-inf) is the infinity norm.
    with pytest.raises(ValueError, match=message):
        make(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (fo.ClipByGlobalNorm, "max_norm must be finite and > 0"),
        (fo.ClipByNorm, "max_norm must be finite and > 0"),
        (lambda x: fo.ClipByNorm({"a": x}), r"max_norm\['a'\] must be finite and > 0"),
        (fo.Unscale, "scale must be finite and > 0"),
        (fo.sgd, "lr must be finite and >= 0"),
        (lambda x: fo.adamw(betas=(0.9, 0.3 - x)), r"betas\[1\] must be .* and < 1"),
        (lambda x: fo.adamw(eps=x), "eps must be finite and >= 0"),
        (lambda x: fo.Masked(fo.AddDecayedWeights(x), "*"), "weight_decay must be"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_out_of_range(make, message: str, dtype: torch.dtype) -> None:
    """A step against its meaning is refused when it is written, in a tensor as well."""
    for value in (-1.0, math.nan, -math.inf):
        tensor = torch.tensor(value, dtype=dtype, requires_grad=True)
        with pytest.raises(ValueError, match=f"{message}.*, got .* in a tensor"):
            make(tensor)


def test_a_tensor_is_not_read_where_that_would_wait_or_break() -> None:
    """No value is looked at elsewhere than on the CPU, in a trace or in torch.func."""
    real = torch.tensor(-1.0)
    fo.ClipByGlobalNorm(real.to("meta"))
    with torch._subclasses.FakeTensorMode() as mode:
        fo.ClipByGlobalNorm(torch.tensor(-1.0))
        fo.ClipByGlobalNorm(real)
    fo.ClipByGlobalNorm(mode.from_tensor(real))

    def clipped(limit: torch.Tensor) -> torch.Tensor:
        clip = fo.ClipByGlobalNorm(limit)
        return clip.update(GRADS, clip.init(PARAMS), PARAMS)[0]["a.bias"].sum()

    limits = torch.tensor([-1.0, 2.0])
    torch.func.vmap(clipped)(limits)
    torch.func.grad(clipped)(limits[0])
    torch.compiler.reset()
    torch.compile(clipped, fullgraph=True, backend="eager")(limits[0])
    scale = fo.Scale(lambda step: torch.full_like(step, math.nan))
    updates, _ = scale.update(GRADS, scale.init(PARAMS), PARAMS)
    assert updates["a.bias"].isnan().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fo.ScaleByLearningRate(-0.1), "lr must be .* >= 0, got -0.1"),
        (lambda: fo.sgd(0.1, momentum=-0.9), "momentum must be .* got -0.9"),
        (lambda: fo.adamw(betas=(0.9, 1.0)), r"betas\[1\] must be .* < 1, got 1.0"),
        (lambda: fo.adamw(betas=(0.9,)), "betas must be a pair"),
        (lambda: fo.ClipByGlobalNorm(0.0), "max_norm must be .* > 0, got 0.0"),
        (lambda: fo.ClipByNorm(-1.0), "max_norm must be .* > 0, got -1.0"),
        (lambda: fo.ClipByNorm(1.0, norm_type=0), "norm_type must be > 0 .* got 0"),
        (lambda: fo.ClipByNorm(torch.ones(2)), "max_norm must be a 0-dim tensor, got"),
        (lambda: fo.Unscale(0), "scale must be .* > 0, got 0"),
        (lambda: fo.ClipByValue(-1), "clip_value must be .* >= 0, got -1"),
        (lambda: fo.Accumulate(0), "every must be >= 1, got 0"),
        (lambda: fo.Scale(torch.ones(2)), r"factor must be a 0-dim tensor, got shape"),
        (lambda: fo.Context(weight=torch.ones(2)), r"weight must be .* got shape \(2,"),
        (lambda: fo.sgd(nesterov=True), "nesterov=True needs momentum > 0"),
        (lambda: fo.sgd(0.1, 0.9, 0.1, nesterov=True), "nesterov=True needs .* damp"),
        (lambda: schedules.linear(1.0, 0.0, 0), "num_steps must be >= 1, got 0"),
        (lambda: schedules.cosine_decay(1.0, 0), "decay_steps must be >= 1"),
        (
            lambda: schedules.warmup_cosine(1.0, 5, 5),
            "decay_steps must be > warmup_steps = 5",
        ),
        (lambda: schedules.warmup_cosine(1.0, -1, 5), "warmup_steps must be >= 0"),
        (lambda: fo.Partition({}, {}), "inner must have at least one label"),
        (lambda: fo.Norm(0.0), "p must be > 0"),
        (lambda: fo.Named("", fo.Identity()), "name must not be empty .* got ''"),
        (lambda: fo.Named("a.b", fo.Identity()), "which joins names, got 'a.b'"),
        (lambda: fo.Observe("a.b"), "name must not be empty and not contain"),
        (lambda: fo.Observe("x", op="mean"), "op must be 'sum', .* got 'mean'"),
        (lambda: fo.Observe("x", op=2.0), r"op must be .* or Norm\(p\), got 2.0"),
        (
            lambda: fo.Chain((fo.chain(fo.ClipByValue(1.0)), fo.Unscale(2.0))),
            "threshold is meant for true",
        ),
    ],
)
def test_illegal_value(make, message: str) -> None:
    """A number out of range is refused with its value."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fo.sgd("0.1"), "lr must be a number, a 0-dim tensor, a schedule"),
        (lambda: fo.sgd(True), "lr must be a number.* got True"),
        (lambda: fo.sgd(None), "lr must be a number.* got None"),
        (lambda: fo.Scale(torch.tensor(1)), "factor must be a floating-point tensor"),
        (lambda: fo.ClipByGlobalNorm({"a": 1.0}), "max_norm applies to all parameters"),
        (lambda: fo.ClipByNorm("1"), "max_norm must be a number.* or a map.* got '1'"),
        (lambda: fo.ClipByNorm(1.0, norm_type="2"), "norm_type must be a number > 0"),
        (lambda: fo.Scale({1: 1.0}), "factor must map parameter names"),
        (lambda: fo.Scale({"a": schedules.constant(1.0)}), r"factor\['a'\] must be a"),
        (lambda: fo.adamw(betas=0.9), "betas must be a pair"),
        (lambda: fo.Accumulate(2.0), "every must be an int.* got 2.0"),
        (
            lambda: fo.adamw(lr=schedules.constant),
            r"got a class; write constant\(...\)",
        ),
        (lambda: fo.adam(amsgrad="no"), "amsgrad must be True or False, got 'no'"),
        (lambda: fo.Accumulate(2, mean=1), "mean must be True or False, got 1"),
        (lambda: fo.ClipByGlobalNorm(1.0, norm_type="2"), "norm_type must be a number"),
        (lambda: fo.Context(weight="3"), "weight must be a number or a 0-dim tensor"),
        (lambda: fo.Context(loss="x"), "loss must be a number or a .* tensor, got 'x'"),
        (lambda: fo.Accumulate(True), "every must be an int.* got True"),
        (lambda: fo.Accumulate(2, dtype=torch.int32), "dtype must be a floating"),
        (lambda: fo.chain(fo.Scale), r"got the class Scale; write Scale\(\.\.\.\)"),
        (lambda: fo.chain([fo.Scale(1.0)]), r"got a list; write chain\(\*transforms\)"),
        (lambda: fo.chain(fo.adamw), r"got a function; write adamw\(...\)"),
        (lambda: fo.chain(torch.nn.Linear(99, 9).bias), "members.0. must be a transf"),
        (lambda: fo.parameters([]), "model must be a torch.nn.Module, got a list"),
        (lambda: fo.load_parameters({}, {}), "torch.nn.Module, got a dict"),
        (lambda: fo.apply_updates({}, ({}, ())), "write updates, state = "),
        (lambda: fo.sgd().update((torch.ones(2),), (), PARAMS), r"got a tuple of tens"),
        (lambda: fo.sgd().update([torch.ones(2)], (), PARAMS), r"dict\(zip\(params, "),
        (lambda: fo.apply_updates({}, (None, torch.ones(2))), r"dict\(zip\("),
        (lambda: fo.chain(Wrong(scope="all")), "scope must be one of"),
        (lambda: fo.chain(3), "without init and update and scope"),
        (lambda: fo.Masked(3, "*"), "inner must be a transform .* got 3"),
        (lambda: fo.Masked(fo.Identity(), 3), "mask must be a glob"),
        (lambda: fo.Masked(fo.Identity(), {"a": 1}), "mask as a map must give a bool"),
        (lambda: fo.adamw(mask=3.0), "mask must be a glob.* 3.0"),
        (lambda: fo.exclude(3), "selections must be a glob"),
        (lambda: fo.MultiplyParamwise([3]), r"must be \(selection, value\) pairs"),
        (lambda: fo.MultiplyParamwise({"a": "2"}), "must be a number"),
        (lambda: fo.Partition([fo.Identity()], {}), "inner must be a map from label"),
        (lambda: fo.Partition({"x": 3}, {}), r"inner\['x'\] must be a transform"),
        (lambda: fo.Partition({"x": fo.Identity()}, {"*": 3}), "must be a label"),
        (lambda: fo.Named(3, fo.Identity()), "name must be a string, got 3"),
        (lambda: fo.Named(fo.Identity(), "x"), r"name must be .* got Identity\(\)"),
        (lambda: fo.Named("x", fo.Scale), r"inner must be .* write Scale\(...\)"),
        (lambda: fo.Observe(None), "name must be a string, got None"),
        (lambda: fo.Observe("x", 2.0), "fn must be a function of an update and its"),
        (lambda: fo.explain(fo.adamw, {}), r"tx must be a transform.*adamw\(...\)"),
        (lambda: fo.explain(fo.sgd(), torch.nn.Linear(1, 1)), "params must be a dict"),
        (lambda: fo.SkipNonfinite(None), "inner must be a transform .* got None"),
        (lambda: schedules.linear(1.0, 0.0, 2.5), "num_steps must be an int"),
        (lambda: schedules.constant("1"), "value must be a number"),
    ],
)
def test_wrong_kind(make, message: str) -> None:
    """An argument of the wrong kind is refused with what it must be."""
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"a.bias": torch.ones(2, dtype=torch.int64)}, TypeError, r"'a.bias' .*int64"),
        ({"a.bias": torch.ones(2, dtype=torch.complex64)}, TypeError, "view_as_real"),
        ({"a.bias": torch.ones(2).to_sparse()}, TypeError, "'a.bias' is sparse"),
        ({"a.bias": None}, TypeError, "omit names without a gradient"),
        ({"a.bias": 1.0}, TypeError, "update of 'a.bias' must be a tensor, got 1.0"),
        ({"a.bias": torch.ones(3)}, ValueError, r"shape \(3,\), its parameter \(2,\)"),
        ({"a.bias": torch.ones(2, device="meta")}, ValueError, "lies on meta"),
        ({"unknown": torch.ones(2)}, ValueError, r"no parameter has: \['unknown'\]"),
    ],
)
@pytest.mark.parametrize("where", ["update", "apply_updates"])
def test_bad_gradient(changed, error, message: str, where: str) -> None:
    """A gradient that does not fit is refused by name, and nothing changes."""
    grads = GRADS | changed
    state = PIPELINE.init(PARAMS)
    before = copy.deepcopy((PARAMS, state))
    calls = {
        "update": lambda: PIPELINE.update(grads, state, PARAMS),
        "apply_updates": lambda: fo.apply_updates(PARAMS, grads),
    }
    with pytest.raises(error, match=message):
        calls[where]()
    assert_same(before, (PARAMS, state), "inputs")


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"w": torch.ones(2, dtype=torch.int64)}, TypeError, "'w' has dtype .*int64"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, TypeError, "view_as_real"),
        ({"w": torch.ones(2).to_sparse()}, TypeError, "parameter of 'w' is sparse"),
        ({1: torch.ones(2)}, TypeError, "names must be strings, got 1"),
        ([torch.ones(2)], TypeError, "params must be a dict .* got list"),
        (
            {"w": torch.ones(2), "v": torch.ones(2, device="meta")},
            ValueError,
            "several devices: 'w' on cpu, 'v' on meta",
        ),
    ],
)
def test_bad_parameters(params, error, message: str) -> None:
    """Parameters that cannot be optimized are refused at init."""
    with pytest.raises(error, match=message):
        PIPELINE.init(params)


def test_names_unknown_to_init() -> None:
    """A parameter added after init is named, with the remedy."""
    state = PIPELINE.init(PARAMS)
    more = PARAMS | {"new": torch.ones(1)}
    with pytest.raises(ValueError, match=r"no entry for 'new'.*call init again"):
        PIPELINE.update({"new": torch.ones(1)}, state, more)
    with pytest.raises(ValueError, match="call init again"):
        fo.Trace(0.9).update({"new": torch.ones(1)}, fo.Trace(0.9).init(PARAMS), more)


def test_state_of_another_chain() -> None:
    """A state that is not this chain's is refused."""
    with pytest.raises(ValueError, match="tuple of 5 states, one for each member, got"):
        PIPELINE.update(GRADS, fo.sgd(0.1).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="got NoneType; make it with this transform's"):
        PIPELINE.update(GRADS, None, PARAMS)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (
            None,
            TypeError,
            r"Wrong.*update must return \(updates, state\), got NoneType",
        ),
        ({}, TypeError, r"must return \(updates, state\), got dict"),
        (([], ()), TypeError, "must return updates as a dict by name, got list"),
        (({"x": torch.ones(1)}, ()), ValueError, r"that no parameter has: \['x'\]"),
    ],
)
def test_a_users_wrong_result_is_named(result, error, message: str) -> None:
    """A chain says which member returned what it must not."""
    pipeline = fo.chain(Wrong(result))
    with pytest.raises(error, match=message):
        pipeline.update(GRADS, pipeline.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "transform", [case.transform for case in CASES], ids=lambda t: repr(t)[:40]
)
def test_every_init_refuses_what_is_no_map(transform: fo.Transform) -> None:
    """A list of parameters is refused with the remedy, inside and outside a chain."""
    with pytest.raises(TypeError, match="params must be a dict.*parameters.model."):
        transform.init([torch.ones(2)])


def test_a_predicate_must_take_a_name_and_a_tensor() -> None:
    """The usual slip of a mask with one argument is explained."""
    with pytest.raises(
        TypeError, match="must take a name and a tensor, such as lambda"
    ):
        fo.adamw(mask=lambda p: p.ndim >= 2).init(PARAMS)


@pytest.mark.parametrize(
    "transform",
    [
        fo.Partition({"x": fo.Identity()}, "x"),
        fo.Masked(fo.Identity(), "*"),
        fo.chain(fo.Identity()),
    ],
    ids=repr,
)
def test_unknown_names_are_not_dropped(transform: fo.Transform) -> None:
    """A combinator does not take an unknown name for one that it leaves out."""
    state = transform.init(PARAMS)
    with pytest.raises(ValueError, match="no parameter has: \\['typo'\\]"):
        transform.update({"typo": torch.ones(1)}, state, PARAMS)


def test_partition_refuses_another_state() -> None:
    """A state with too few labels is refused before anything runs."""
    both = fo.Partition({"x": fo.Identity()}, "x")
    with pytest.raises(
        ValueError, match="tuple of 1 states, one for each label, got N"
    ):
        both.update(GRADS, None, PARAMS)


def test_load_parameters_refuses_another_model() -> None:
    """Unknown names and other shapes are named, and the model stays as it was."""
    model = torch.nn.Linear(3, 2)
    before = copy.deepcopy(fo.parameters(model))
    for bad in (
        {"weight": torch.ones(2, 2)},
        {"bias": torch.ones(2), "x": torch.ones(1)},
    ):
        with pytest.raises(
            ValueError,
            match=r"no parameter 'x'|'weight' has shape \(2, 2\), the model's has",
        ):
            fo.load_parameters(model, bad)
    assert_same(before, fo.parameters(model), "model")


def test_zero_nans_refuses_another_state() -> None:
    """A state without a count is refused with the remedy."""
    with pytest.raises(ValueError, match=r"ZeroNans\(\) needs a ZeroNansState, got"):
        fo.ZeroNans().update(GRADS, (), PARAMS)


def test_schedule_added_after_init() -> None:
    """A schedule whose count is not in the state asks for init."""
    state = fo.Scale(1.0).init(PARAMS)
    scheduled = fo.Scale(schedules.constant(1.0))
    with pytest.raises(ValueError, match="holds a schedule.*call init again"):
        scheduled.update(GRADS, state, PARAMS)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            fo.MultiplyParamwise({"typo.*": 2.0}),
            "multipliers: 'typo.*' matches no p",
        ),
        (fo.MultiplyParamwise([(re.compile("typo"), 2.0)]), "matches no parameter"),
        (
            fo.MultiplyParamwise([(lambda n, p: False, 2.0)]),
            "<lambda> matches no param",
        ),
        (fo.Masked(fo.Identity(), "typo"), "mask: 'typo' matches no parameter"),
        (fo.Masked(fo.Identity(), ("a.*", "typo")), "'typo' matches no parameter"),
        (fo.Masked(fo.Identity(), fo.exclude("typo")), "'typo' matches no parameter"),
        (
            fo.Masked(fo.Identity(), {"a.weight": True}),
            "missing ['a.bias'], unknown []",
        ),
        (
            fo.Masked(fo.Identity(), {"a.weight": True, "a.bias": True, "x": True}),
            "missing [], unknown ['x']",
        ),
        (fo.adamw(mask="typo"), "mask: 'typo' matches no parameter"),
        (fo.adamw(mask=()), "mask: () matches no parameter"),
        (fo.Masked(fo.Identity(), fo.exclude("*")), "exclude('*') matches no param"),
        (fo.Scale({"a.weight": 1.0}), "factor must have a value for every parameter"),
        (
            fo.ClipByNorm({"a.weight": 1.0}),
            "max_norm must have a value for every parameter and no other: missing ['a.",
        ),
        (
            fo.adam(betas=({"a.weight": 0.9, "a.bias": 0.9, "typo": 0.9}, 0.9)),
            "parameter and no other: missing [], unknown ['typo']",
        ),
        (fo.Partition({"x": fo.Identity()}, {"a.weight": "x"}), "'a.bias' no label"),
        (
            fo.Partition({"x": fo.Identity()}, {"a.weight": "x", "*": "y"}),
            "label 'y', which inner does not have",
        ),
        (
            fo.Partition({"x": fo.Identity(), "y": fo.Identity()}, {"*": "x"}),
            "no parameter has the label 'y'",
        ),
        (
            fo.Partition({"x": fo.Identity()}, {"typo": "x", "*": "x"}),
            "labels: 'typo' matches no parameter",
        ),
    ],
    ids=repr,
)
def test_rules_that_match_nothing(transform: fo.Transform, message: str) -> None:
    """A rule, mask or label that selects nothing is an error at init."""
    with pytest.raises(ValueError, match=re.escape(message)):
        transform.init(PARAMS)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            (fo.ClipByGlobalNorm(1.0), fo.Unscale(2.0)),
            r"Write chain\(Unscale\(2.0\), ..., ClipByGlobalNorm\(1.0\), ...\)",
        ),
        ((fo.ClipByNorm(1.0), fo.Unscale(2.0)), "threshold is meant for true"),
        ((fo.ClipByValue(1.0), fo.Unscale(2.0)), "threshold is meant for true grad"),
        (
            (fo.SkipNonfinite(fo.sgd(0.1)), fo.Unscale(2.0)),
            r"Write chain\(Unscale\(2.0\), ..., SkipNonfinite",
        ),
        ((fo.sgd(0.1), fo.Accumulate(2)), "once a window"),
        ((fo.Trace(0.9), fo.Accumulate(2)), "one gradient a window"),
        ((fo.ScaleByAdam(), fo.Scale(1.0), fo.Accumulate(2)), "one gradient a window"),
        ((fo.adamw(0.1), fo.ScaleByLearningRate(0.1)), "two learning rates"),
        (
            (fo.SkipNonfinite(fo.ScaleByAdam()), fo.Scale(0.1)),
            r"Write SkipNonfinite\(chain\(..., Scale\(0.1\)\)\)",
        ),
        (
            (fo.adamw(), fo.Named("window", fo.Accumulate(4))),
            r"Write chain\(Named\('window', Accumulate\(4\)\), ..., ScaleB",
        ),
        ((fo.adamw(), fo.Named("x", fo.chain(fo.Accumulate(4)))), "one gradient a win"),
        (
            (fo.Named("x", fo.sgd(0.1)), fo.Accumulate(4)),
            r"chain\(Acc.* Named\('x', chain",
        ),
        ((fo.Named("x", fo.ClipByValue(1.0)), fo.Unscale(2.0)), "threshold is meant"),
        ((fo.ClipByValue(1.0), fo.Named("x", fo.Unscale(2.0))), "threshold is meant"),
        ((fo.Named("x", fo.adamw()), fo.sgd(0.1)), "two learning rates .*Named\\('x'"),
        (
            (fo.Named("x", fo.SkipNonfinite(fo.sgd(0.1))), fo.Observe("y")),
            r"the guard Named\('x', .* SkipNonfinite\(chain\(..., Observe\('y'\)\)\)",
        ),
        (
            (
                fo.Named("x", fo.Named("y", fo.SkipNonfinite(fo.sgd(0.1)))),
                fo.Identity(),
            ),
            "which must be last",
        ),
        (
            (fo.Named("x", fo.chain(fo.Identity(), fo.Trace(0.9))), fo.Accumulate(2)),
            "one gradient a window",
        ),
    ],
)
def test_orders_that_cannot_be_right(members, message: str) -> None:
    """Chain refuses exactly the listed orders and says the right one."""
    with pytest.raises(ValueError, match=message):
        fo.chain(*members)


@pytest.mark.parametrize(
    "inner",
    [
        fo.Accumulate(2),
        fo.chain(fo.Scale(1.0), fo.Accumulate(2)),
        fo.Masked(fo.Accumulate(2), "*"),
        fo.Named("window", fo.Accumulate(2)),
        fo.Partition({"x": fo.chain(fo.Accumulate(2), fo.sgd(0.1))}, {"*": "x"}),
    ],
    ids=repr,
)
def test_accumulate_inside_a_guard(inner: fo.Transform) -> None:
    """A window inside a guard is refused at any depth."""
    with pytest.raises(ValueError, match="stands inside a guard"):
        fo.SkipNonfinite(inner)


@pytest.mark.parametrize(
    "members",
    [
        (fo.Unscale(2.0), fo.Accumulate(2), fo.ClipByGlobalNorm(1.0), fo.adamw(0.1)),
        (fo.Accumulate(2), fo.Unscale(2.0), fo.sgd(0.1)),
        (fo.adamw(0.1), fo.ClipByGlobalNorm(1.0), fo.MultiplyParamwise({"*": 2.0})),
        (fo.Trace(0.9), fo.ScaleByAdam(), fo.ClipByValue(1.0), fo.ClipByValue(2.0)),
        (fo.Accumulate(2), fo.Accumulate(3), fo.SkipNonfinite(fo.adamw(0.1))),
        (fo.Trace(0.9), fo.Unscale(2.0)),
        (fo.Named("w", fo.Accumulate(2)), fo.Observe("x"), fo.Named("y", fo.adamw())),
        (fo.Observe("x"), fo.Named("last", fo.SkipNonfinite(fo.adamw(0.1)))),
    ],
    ids=repr,
)
def test_other_orders_are_accepted(members) -> None:
    """Nothing else is refused."""
    assert len(fo.chain(*members)) >= len(members)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_clip_raises_on_nonfinite_norm_if_asked(number: float) -> None:
    """error_if_nonfinite says what the norm was, and how to go on."""
    clip = fo.ClipByGlobalNorm(1.0, error_if_nonfinite=True)
    bad = GRADS | {"a.bias": torch.tensor([number, 1.0])}
    message = f"of the updates is {number}; .*SkipNonfinite"
    with pytest.raises(RuntimeError, match=message):
        clip.update(bad, clip.init(PARAMS), PARAMS)
    clip.update(GRADS, clip.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (
            lambda u, p: u.sum(),
            ValueError,
            r"\(2, 3\) for 'a.weight', got \(\): it works number by number, and op",
        ),
        (lambda u, p: u.reshape(-1), ValueError, r"'a.weight', got \(6,\)"),
        (lambda u, p: 1.0, TypeError, "for 'a.weight', got 1.0"),
        (lambda u, p: u * 1j, TypeError, "for 'a.weight', got torch.complex64"),
    ],
)
def test_what_an_observer_must_return(fn, error, message: str) -> None:
    """A function that is not elementwise is refused where it shows."""
    observe = fo.Observe("x", fn)
    with pytest.raises(error, match=message):
        observe.update(GRADS, observe.init(PARAMS), PARAMS)


def test_reduce_refuses_what_it_cannot_join() -> None:
    """Partials are one value a tensor, and the operation is one of four."""
    with pytest.raises(ValueError, match=r"shape \(n,\), got shape \(\)"):
        fo.Context().reduce(torch.tensor(1.0), "sum")
    with pytest.raises(ValueError, match="op must be 'sum', 'max', 'all' or Norm"):
        fo.Context().reduce(torch.ones(1), "mean")


def test_empty_maps_and_chains_are_defined() -> None:
    """No parameters, no updates, no members: nothing happens."""
    for pipeline in (fo.chain(), PIPELINE, fo.chain(fo.SkipNonfinite(fo.sgd(0.1)))):
        state = pipeline.init({})
        assert pipeline.update({}, state, {})[0] == {}
    assert fo.apply_updates({}, {}) == {}
    assert fo.apply_updates(PARAMS, {}) == PARAMS
    assert repr(fo.chain()) == "chain()"
    assert len(fo.chain()) == 0


def test_zero_size_tensors_are_defined() -> None:
    """A tensor without elements has norm 0 and disturbs nothing."""
    params = {"empty": torch.zeros(0, 3), "w": torch.tensor([3.0, 4.0])}
    for p in (2.0, math.inf):
        clip = fo.ClipByGlobalNorm(1.0, norm_type=p)
        clipped, state = clip.update(params, clip.init(params), params)
        assert clipped["empty"].shape == (0, 3)
        assert state.norm == (5.0 if p == 2.0 else 4.0)
        alone, _ = fo.ClipByNorm(1.0, norm_type=p).update(params, (), params)
        assert alone["empty"].shape == (0, 3)
        assert torch.equal(alone["w"], clipped["w"])
    nothing = {"a": torch.zeros(0, 3), "b": torch.zeros(3, 0, 2)}
    centred, _ = fo.Centralize().update(nothing, (), nothing)
    assert_same(nothing, centred, "centred")
    only = {"empty": torch.zeros(0)}
    pipeline = fo.chain(fo.SkipNonfinite(fo.chain(fo.ClipByGlobalNorm(1.0), fo.adam())))
    updates, state = pipeline.update(only, pipeline.init(only), only)
    assert updates["empty"].shape == (0,)
    assert state[0].skipped == 0


def test_callers_dicts_stay_their_own() -> None:
    """Changing what was passed to a constructor afterwards changes nothing."""
    factors, rules, labels = {"a": 1.0}, {"*.bias": 2.0}, {"*": "x"}
    inner, mask = {"x": fo.Identity()}, ["*.bias"]
    made = [
        fo.Scale(factors),
        fo.MultiplyParamwise(rules),
        fo.Partition(inner, labels),
        fo.Masked(fo.Identity(), mask),
    ]
    before = copy.deepcopy(made)
    factors["a"] = rules["*.bias"] = 9.0
    labels["b"] = "x"
    inner["y"] = fo.Scale(2.0)
    mask.append("*")
    assert made == before

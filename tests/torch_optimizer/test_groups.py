"""What param_groups show, and what writing into them means."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from comparison import assert_same
from training import everything, parameters, set_gradients, train, values

import functional_optim as fo
from functional_optim.torch_optimizer._group_keys import OPTIONS
from functional_optim.transforms import Scheduled

LABELS = {"*.bias": "slow", "*": "fast"}


def make(transform: fo.Transform, groups: Any = None) -> Any:
    """Return parameters and an optimizer over them, in groups of names if given."""
    params = parameters()
    given: Any = params.items()
    if groups is not None:
        given = [
            {"params": [(n, params[n]) for n in names], **options}
            for names, options in groups
        ]
    return params, fo.TransformOptimizer(given, transform)


def names(optimizer: Any) -> list[list[str]]:
    """Return the names of the parameters in each group."""
    return [group["param_names"] for group in optimizer.param_groups]


def ends(transform: fo.Transform, steps: int = 3, groups: Any = None) -> Any:
    """Return weights after some steps with a transform that nobody wrote to."""
    params, optimizer = make(transform, groups)
    train(optimizer, params, range(steps))
    return values(params)


# -- what is there -------------------------------------------------------------------


def test_groups_are_those_of_the_user_times_labels() -> None:
    """Groups of the user stay in order, each cut by labels in the order they come."""
    both = fo.Partition({"slow": fo.sgd(0.1), "fast": fo.adamw(0.2)}, LABELS)
    _, optimizer = make(
        both, [(["scale", "a.bias"], {"lr": 0.5}), (["a.weight", "b.weight"], {})]
    )
    assert names(optimizer) == [["scale"], ["a.bias"], ["a.weight", "b.weight"]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.2]


@pytest.mark.parametrize(
    "transform",
    [
        fo.adamw(0.1),
        fo.sgd(0.1),
        fo.Identity(),
        fo.Partition({"slow": fo.sgd(0.1, 0.9), "fast": fo.adamw(0.2)}, LABELS),
        fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(fo.schedules.constant(0.1))),
    ],
    ids=repr,
)
def test_every_group_has_every_key(transform: fo.Transform) -> None:
    """A group has what another has, and `defaults` has all of it, and the transform."""
    _, optimizer = make(transform)
    own = {"params", "param_names", "transform_state"}
    for group in optimizer.param_groups:
        assert set(group) - own == set(optimizer.defaults) - OPTIONS


def test_the_keys_are_those_of_torch() -> None:
    """Presets show what torch's optimizers show, where they have it."""
    for ours, theirs in [
        (fo.adamw(0.1, amsgrad=True), torch.optim.AdamW),
        (fo.sgd(0.1, 0.9, 0.5, 0.01), torch.optim.SGD),
    ]:
        _, optimizer = make(ours)
        shown = optimizer.param_groups[0]
        group = theirs(parameters().values(), lr=0.1).param_groups[0]
        assert set(group) - set(shown) <= {
            "foreach",
            "capturable",
            "fused",
            "decoupled_weight_decay",
            "differentiable",
        }
        assert type(shown["lr"]) is float


def test_max_norm_is_no_key() -> None:
    """One clip sees all groups: its max_norm stands in none, and cannot be given."""
    clipped = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.1))
    _, optimizer = make(clipped)
    assert "max_norm" not in optimizer.param_groups[0]
    with pytest.raises(ValueError, match="'max_norm'.* set it in the transform"):
        make(clipped, [(["scale"], {"max_norm": 2.0})])


def test_a_clip_sees_all_groups() -> None:
    """Groups, labels and rates of their own do not cut the norm of a clip."""
    params, optimizer = make(
        fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(1.0)),
        [(["scale", "a.bias"], {"lr": 0.5}), (["a.weight", "b.weight"], {})],
    )
    set_gradients(params, 0)
    before = values(params)
    grads = [param.grad for param in params.values()]
    norm = torch.nn.utils.get_total_norm(grads).item()
    assert norm > 1.0
    optimizer.step()
    for name, param in params.items():
        rate = 0.5 if name in {"scale", "a.bias"} else 1.0
        expected = before[name] - rate * param.grad / (norm + 1e-6)
        # Four roundings of numbers around 1.
        torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=1e-15)


def test_two_values_under_one_name_are_refused() -> None:
    """Two decays on one path need a name, and then have a key each."""
    l2, decay = fo.AddDecayedWeights(0.1), fo.AddDecayedWeights(0.2)

    def build(first: fo.Transform) -> Any:
        rest = (fo.ScaleByAdam(), decay, fo.ScaleByLearningRate(0.1))
        return make(fo.chain(first, *rest))

    with pytest.raises(
        ValueError,
        match=r"weight_decay has two values on one path, in AddDecayedWeights\(0\.1\) "
        r'and in AddDecayedWeights\(0\.2\); .*Named\("l2"',
    ):
        build(l2)
    params, optimizer = build(fo.Named("l2", l2))
    group = optimizer.param_groups[0]
    assert (group["l2.weight_decay"], group["weight_decay"]) == (0.1, 0.2)
    group["l2.weight_decay"], group["weight_decay"] = 0.3, 0.0
    train(optimizer, params, range(3))
    expected = ends(fo.adam(0.1, weight_decay=0.3))
    # A decay of 0 adds an exact zero.
    assert_same(expected, values(params), "weights")


def test_a_named_value_is_not_one_of_two_values() -> None:
    """The message has the two that collide, and not the one that has a name."""
    decays = [fo.AddDecayedWeights(rate) for rate in (0.1, 0.2, 0.3)]
    pipeline = fo.chain(fo.Named("l2", decays[0]), *decays[1:], fo.sgd(0.1))
    with pytest.raises(ValueError, match=r"in AddDecayedWeights\(0\.2\) and in "):
        make(pipeline)


@dataclasses.dataclass(frozen=True)
class UserRule:
    """A user's u <- -lr u, where lr may be a schedule."""

    lr: Any
    counts: bool = True
    scope = fo.Scope.ELEMENTWISE
    hyperparameters = ("lr",)

    def init(self, params: Any) -> Any:
        """Return a count, if it counts."""
        del params
        return (
            Scheduled((), torch.zeros((), dtype=torch.float64)) if self.counts else ()
        )

    def update(self, updates: Any, state: Any, params: Any, *, context: Any) -> Any:
        """Scale by the rate at this step."""
        del params, context
        lr = self.lr(state.num_updates) if callable(self.lr) else self.lr
        new = Scheduled((), state.num_updates + 1)
        return {name: -lr * u for name, u in updates.items()}, new


@pytest.mark.parametrize("named", [False, True])
def test_a_schedule_of_a_users_rule_is_in_the_groups(named: bool) -> None:
    """As one of ours: by its value at the next step, also below other names."""
    rule: fo.Transform = UserRule(lambda step: 0.5**step)
    params, optimizer = make(fo.Named("mine", rule) if named else rule)
    assert optimizer.param_groups[0]["lr"] == 1.0
    train(optimizer, params, range(2))
    assert optimizer.param_groups[0]["lr"] == 0.25
    expected = ends(fo.sgd(lambda step: 0.5**step), steps=2)
    assert_same(expected, values(params), "weights")


def test_a_schedule_without_a_count_is_refused() -> None:
    """Nothing says at which step a group would have its value."""
    with pytest.raises(ValueError, match=r"lr is the schedule .* counts no updates"):
        make(UserRule(lambda step: 0.5**step, counts=False))


def test_equal_values_under_one_name_are_one_key() -> None:
    """What is written under a shared name goes to all that have it."""
    l2, decay = fo.AddDecayedWeights(0.1), fo.AddDecayedWeights(0.1)
    params, optimizer = make(fo.chain(l2, decay, fo.sgd(0.1)))
    optimizer.param_groups[0]["weight_decay"] = 0.3
    train(optimizer, params, range(3))
    twice = fo.AddDecayedWeights(0.3)
    assert_same(ends(fo.chain(twice, twice, fo.sgd(0.1))), values(params), "weights")


# -- what is written -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "writes", "as_built"),
    [
        (fo.adamw(0.1), {"lr": 0.3}, fo.adamw(0.3)),
        (fo.adamw(0.1), {"lr": torch.tensor(0.3)}, fo.adamw(torch.tensor(0.3))),
        (fo.adamw(0.1), {"lr": 0}, fo.adamw(0.0)),
        (fo.adamw(0.1), {"betas": (0.5, 0.6)}, fo.adamw(0.1, (0.5, 0.6))),
        (fo.adamw(0.1), {"betas": [0.5, 0.6]}, fo.adamw(0.1, (0.5, 0.6))),
        (fo.adamw(0.1), {"eps": 0.5}, fo.adamw(0.1, eps=0.5)),
        (fo.adamw(0.1), {"weight_decay": 0.7}, fo.adamw(0.1, weight_decay=0.7)),
        (fo.sgd(0.1, 0.9), {"momentum": 0.2}, fo.sgd(0.1, 0.2)),
        (fo.sgd(0.1, 0.9, 0.5), {"dampening": 0.1}, fo.sgd(0.1, 0.9, 0.1)),
        (fo.Scale(-0.1), {"factor": -0.3}, fo.Scale(-0.3)),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("how", ["in a group", "written"])
def test_what_is_written_counts(
    start: fo.Transform, writes: dict[str, Any], as_built: fo.Transform, how: str
) -> None:
    """A value given with a group or written into it is as if built with it."""
    params = parameters()
    if how == "written":
        optimizer = fo.TransformOptimizer(params.items(), start)
        optimizer.param_groups[0].update(writes)
    else:
        group = {"params": list(params.items()), **writes}
        optimizer = fo.TransformOptimizer([group], start)
    train(optimizer, params, range(3))
    assert_same(ends(as_built), values(params), "weights")


@pytest.mark.parametrize("inside", [False, True], ids=["number", "tensor in place"])
def test_every_write_counts_from_the_next_step(inside: bool) -> None:
    """A rate that changes before every step gives what torch gives."""
    rate = torch.tensor(0.1, dtype=torch.float64) if inside else 0.1
    params, optimizer = make(fo.adamw(rate))
    theirs = parameters()
    reference = torch.optim.AdamW(theirs.values(), 0.1)
    for step in range(6):
        now = 0.1 * (step + 1)
        if inside:
            optimizer.param_groups[0]["lr"].fill_(now)
        else:
            optimizer.param_groups[0]["lr"] = now
        reference.param_groups[0]["lr"] = now
        train(optimizer, params, [step])
        train(reference, theirs, [step])
    # A few roundings in each of 6 steps.
    assert_same(values(theirs), values(params), "weights", rtol=1e-13)


def test_a_list_that_is_written_into_counts() -> None:
    """Betas written as a list, and changed in the list later, count."""
    params, optimizer = make(fo.adamw(0.1))
    group = optimizer.param_groups[0]
    other, reference = make(fo.adamw(0.1))
    for step in range(4):
        if step == 1:
            group["betas"] = [0.9, 0.999]
        if step == 2:
            group["betas"][0] = 0.1
            reference.param_groups[0]["betas"] = (0.1, 0.999)
        train(optimizer, params, [step])
        train(reference, other, [step])
    assert_same(values(other), values(params), "weights")


def test_groups_that_part_and_meet_again_stay_right() -> None:
    """Rates that differ for some steps only leave every group its own numbers."""
    cut: Any = [(["a.weight", "a.bias"], {}), (["b.weight", "scale"], {})]
    params, optimizer = make(fo.adamw(0.1), cut)
    theirs = parameters()
    first, second = list(theirs.values())[:2], list(theirs.values())[2:]
    reference = torch.optim.AdamW([{"params": first}, {"params": second}], 0.1)
    for step, (a, b) in enumerate([(0.1, 0.1), (0.2, 0.1), (0.1, 0.3), (0.2, 0.2)]):
        for each in (optimizer, reference):
            each.param_groups[0]["lr"], each.param_groups[1]["lr"] = a, b
        train(optimizer, params, [step])
        train(reference, theirs, [step])
    # A few roundings in each of 4 steps.
    assert_same(values(theirs), values(params), "weights", rtol=1e-13)


def test_the_transform_of_the_user_does_not_change() -> None:
    """Writing numbers into a group leaves the transform alone."""
    transform = fo.adamw(0.1)
    params, optimizer = make(transform)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.param_groups[0]["weight_decay"] = 0.5
    train(optimizer, params, range(2))
    assert transform == fo.adamw(0.1)
    again = fo.TransformOptimizer(parameters().items(), transform)
    assert again.param_groups[0]["lr"] == pytest.approx(0.1)


# -- what is read-only ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "key", "shown"),
    [
        (fo.adamw(0.1), "amsgrad", False),
        (fo.adamw(0.1, amsgrad=True), "amsgrad", True),
        (fo.adamw(0.1), "maximize", False),
        (fo.adamw(0.1, maximize=True), "maximize", True),
        (fo.sgd(0.1, 0.9), "nesterov", False),
        (fo.sgd(0.1, 0.9, nesterov=True), "nesterov", True),
    ],
    ids=str,
)
def test_structural_options_are_read_only(
    transform: fo.Transform, key: str, shown: bool
) -> None:
    """They are shown, the same value may be written, another is refused."""
    params, optimizer = make(transform)
    group = optimizer.param_groups[0]
    assert group[key] is shown
    group[key] = bool(shown)
    train(optimizer, params, range(1))
    before = everything(optimizer, params)
    group[key] = not shown
    with pytest.raises(ValueError, match=f"^{key} is {shown} in the transform"):
        optimizer.step()
    assert_same(before, everything(optimizer, params), "after the error")
    group[key] = shown
    optimizer.step()
    given = [(["scale"], {key: not shown})]
    with pytest.raises(ValueError, match=f"{key} is {shown} in the transform"):
        make(transform, given)


def test_a_schedule_is_shown_as_its_value() -> None:
    """A group shows what the next step will use, and a tuple shows each part."""
    rate, beta = fo.schedules.cosine_decay(0.1, 5), fo.schedules.linear(0.5, 0.9, 4)
    params, optimizer = make(fo.adamw(rate, (beta, 0.99)))
    group = optimizer.param_groups[0]
    for step in range(6):
        assert float(group["lr"]) == float(rate(step))
        assert [float(b) for b in group["betas"]] == [float(beta(step)), 0.99]
        train(optimizer, params, [step])


@pytest.mark.parametrize("how", ["replaced", "in place", "in a group"])
def test_nobody_else_writes_a_schedule(how: str) -> None:
    """A value for what a schedule decides is refused, and nothing changes."""
    transform = fo.adamw(fo.schedules.cosine_decay(0.1, 5))
    if how == "in a group":
        with pytest.raises(ValueError, match="^lr has two owners"):
            make(transform, [(["scale"], {"lr": 0.3})])
        return
    params, optimizer = make(transform)
    set_gradients(params, 0)
    before = everything(optimizer, params)
    if how == "replaced":
        optimizer.param_groups[0]["lr"] = 0.3
    else:
        optimizer.param_groups[0]["lr"].fill_(0.3)
    with pytest.raises(ValueError, match="^lr has two owners"):
        optimizer.step()
    # The state that is there is read without a step.
    assert_same(before, everything(optimizer, params), "after the error")


def test_keys_that_ask_for_nothing_may_stand_in_a_group() -> None:
    """Trainers write weight_decay=0.0 for all: zero is what a chain without it does."""
    params, optimizer = make(fo.adamw(0.1, weight_decay=0.0))
    optimizer.param_groups[0].update(weight_decay=0.0, nesterov=False)
    before = values(params)
    train(optimizer, params, [0])
    assert not torch.equal(before["scale"], params["scale"])
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="'weight_decay', which no transform here has"):
        train(optimizer, params, [1])

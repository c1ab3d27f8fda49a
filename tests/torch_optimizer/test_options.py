"""Groups as users write them: generators, keys of their own rules, slips, labels."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from training import parameters, train, values

import functional_optim as fo
from functional_optim import schedules


def _model() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))


@pytest.mark.parametrize("named", [False, True])
def test_generators_in_groups(named: bool) -> None:
    """A group takes what torch's groups take, also what can be read only once."""
    model = _model()
    how = "named_parameters" if named else "parameters"
    options = [{"prefix": str(i)} if named else {} for i in range(2)]
    groups = [{"params": getattr(model[i], how)(**options[i])} for i in range(2)]
    optimizer = fo.TransformOptimizer(groups, fo.adamw(0.1))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    more = torch.nn.Linear(2, 2)
    given = more.named_parameters(prefix="more") if named else more.parameters()
    optimizer.add_param_group({"params": given})
    assert len(optimizer.param_groups[2]["params"]) == 2


@dataclasses.dataclass(frozen=True)
class SignDescent:
    """A user's rule with a hyperparameter of its own."""

    lr: float = 0.1
    scope: ClassVar[fo.Scope] = fo.Scope.ELEMENTWISE
    hyperparameters: ClassVar[tuple[str, ...]] = ("lr",)

    def init(self, params: fo.TensorMap) -> tuple[()]:
        """Return the empty state."""
        return ()

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return -lr * sign(u)."""
        return {name: -self.lr * u.sign() for name, u in updates.items()}, state


def test_hyperparameters_of_users_rules() -> None:
    """What a dataclass calls hyperparameters are keys of groups, for schedulers too."""
    params = list(parameters().values())
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    optimizer = fo.TransformOptimizer(groups, SignDescent())
    before = [param.detach().clone() for param in params]
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    moved = [float((b - p.detach()).max()) for b, p in zip(before, params, strict=True)]
    assert moved == pytest.approx([0.1, 0.5, 0.5, 0.5])


LABELS = {"*.weight": "decayed", "*": "plain"}


def _labelled() -> fo.TransformOptimizer:
    rules = {"decayed": fo.adamw(0.1, weight_decay=0.1), "plain": fo.sgd(0.1, 0.9)}
    return fo.TransformOptimizer(parameters().items(), fo.Partition(rules, LABELS))


def test_what_means_nothing_in_a_group_is_zero_there() -> None:
    """A group shows no decay of others, and refuses one that nobody would apply."""
    optimizer = _labelled()
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert (decayed["momentum"], plain["momentum"]) == (0.0, 0.9)
    decayed["momentum"] = 0.5  # Schedulers cycle it everywhere.
    params = {name: param for param, name in optimizer._groups.names.items()}
    train(optimizer, params, range(1))
    plain["weight_decay"] = 5.0
    with pytest.raises(ValueError, match=r"\[1\] has weight_decay=5.0, which no trans"):
        optimizer.step()


@pytest.mark.parametrize("scheduler", [False, True])
def test_labels_with_other_rates_can_be_told(scheduler: bool) -> None:
    """A plan is explained, and transform tells the numbers, when groups part."""
    optimizer = fo.TransformOptimizer(
        parameters().items(),
        fo.Partition({"decayed": fo.adamw(0.1), "plain": fo.adamw(0.1)}, LABELS),
    )
    if scheduler:
        torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 1.0, lambda t: 0.5])
    else:
        optimizer.param_groups[1]["lr"] = 0.05
    assert "plan" in fo.explain(optimizer)
    rate = optimizer.transform[0].inner["plain"][-1].lr
    assert rate == 0.05 if isinstance(rate, float) else set(rate.values()) == {0.05}


def test_one_schedule_in_two_places() -> None:
    """A transform may stand twice in another: each has a count of its own."""
    base = fo.sgd(schedules.linear(0.1, 0.0, 10))
    optimizer = fo.TransformOptimizer(
        parameters().items(), fo.Partition({"decayed": base, "plain": base}, LABELS)
    )
    params = dict(parameters())
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.1, 0.1]
    twice = fo.Scale(schedules.linear(1.0, 0.5, 10))
    double = fo.TransformOptimizer(params.items(), fo.chain(twice, twice, fo.sgd(0.1)))
    train(double, params, range(2))
    assert float(double.param_groups[0]["factor"]) == pytest.approx(0.9)


def test_flags_that_differ_have_names() -> None:
    """Structural options of two named parts are told apart like numbers."""
    named = fo.chain(
        fo.Named("a", fo.Trace(0.9, nesterov=True)), fo.Named("b", fo.Trace(0.9))
    )
    [group] = fo.TransformOptimizer(parameters().items(), named).param_groups
    assert (group["a.nesterov"], group["b.nesterov"]) == (True, False)


@pytest.mark.parametrize(
    ("transform", "key", "value", "message"),
    [
        (fo.adamw(0.1), "lr", schedules.constant(0.1), "put a schedule into the trans"),
        (fo.sgd(0.1, 0.9), "dampening", 0.5, r"\[0\]: dampening is 0.0 in the transf"),
        (fo.adamw(0.1), "learning_rate", 0.5, "did you mean 'lr'"),
        (fo.adamw(0.1), "wd", 0.5, "did you mean 'weight_decay'"),
        (fo.adamw(0.1), "lrr", 0.5, "did you mean 'lr'"),
    ],
)
def test_slips_are_told(
    transform: fo.Transform, key: str, value: Any, message: str
) -> None:
    """What is written into a group and can have no effect is refused, with a remedy."""
    optimizer = fo.TransformOptimizer(parameters().items(), transform)
    optimizer.param_groups[0][key] = value
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.step()


def test_from_the_pure_way_and_back() -> None:
    """A state of the pure way goes into an optimizer, and out of it."""
    params = parameters()
    pipeline = fo.chain(fo.Accumulate(2), fo.ClipByGlobalNorm(1.0), fo.adamw(0.1))
    start = {name: param.detach().clone() for name, param in params.items()}
    state = pipeline.init(start)
    optimizer = fo.TransformOptimizer(params.items(), pipeline)
    reference_params = parameters()
    reference = fo.TransformOptimizer(reference_params.items(), pipeline)
    for step in range(7):
        train(reference, reference_params, [step])
        if step < 3:
            grads = {n: p.grad.clone() for n, p in reference_params.items()}
            moved, state = pipeline.update(grads, state, start)
            start = fo.apply_updates(start, moved)
    for name, param in params.items():
        param.data.copy_(start[name])
    optimizer.load_transform_state(state)
    train(optimizer, params, range(3, 7))
    for name, param in params.items():
        expected = reference_params[name]
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "other", [fo.sgd(0.1, 0.9), fo.adamw(0.1, amsgrad=True), fo.chain()]
)
def test_states_of_other_transforms(other: fo.Transform) -> None:
    """A state that does not fit is refused, and nothing is changed."""
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), fo.adamw(0.1))
    train(optimizer, params, range(2))
    before = str(optimizer.state_dict())
    for names in (params, {"w": torch.zeros(2)}):
        with pytest.raises(ValueError, match="state"):
            optimizer.load_transform_state(fo.chain(other).init(dict(names)))
    state = fo.chain(fo.adamw(0.1)).init({"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="state of"):
        optimizer.load_transform_state(state)
    assert str(optimizer.state_dict()) == before


class Sum:
    """A rule that forgets the shapes."""

    scope = fo.Scope.ELEMENTWISE
    init = staticmethod(lambda params: ())

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return sums."""
        return {name: u.sum() for name, u in updates.items()}, state


class Grows(Sum):
    """A rule whose state gets another structure."""

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return a larger state."""
        return {name: 2 * u for name, u in updates.items()}, (torch.zeros(()),)


class CountsInPython(Grows):
    """A rule with a number in its state."""

    init = staticmethod(lambda params: (0,))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Sum(), "has shape .. where .* was given; a transform must keep the shapes"),
        (Grows(), "returned a state of 1 fields for .*, init one of 0"),
        (CountsInPython(), "the state of CountsInPython has 0"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_rules_of_users_that_are_wrong(rule: Any, message: str) -> None:
    """What no update may return is refused before it is written."""
    params = parameters()
    before = values(params)
    with pytest.raises((ValueError, TypeError), match=message):
        train(fo.TransformOptimizer(params.items(), rule), params, range(1))
    assert all(torch.equal(before[name], params[name]) for name in params)


def test_words_in_a_state() -> None:
    """A tuple of words on the host is no list of parameters."""

    class Moody(Sum):
        """A rule with words in its state."""

        init = staticmethod(lambda params: fo.Static(("warm", "cool")))

        def update(self, updates, state, params, *, context=None) -> Any:
            """Return the updates doubled."""
            return {name: 2 * u for name, u in updates.items()}, state

    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), Moody())
    train(optimizer, params, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.transform_state()[0].value == ("warm", "cool")


def test_names_with_module_inside() -> None:
    """Only what wrappers put before names is left out when names are compared."""
    from functional_optim.torch_optimizer._params import strip_wrapper_prefix

    assert strip_wrapper_prefix("module.my_submodule.weight") == "my_submodule.weight"
    assert strip_wrapper_prefix("_orig_mod.a.module.weight") == "a.weight"

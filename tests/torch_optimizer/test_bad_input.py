"""What users give an optimizer by mistake: an error with a name, and no harm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparison import assert_same
from training import everything, parameters, set_gradients, train, values

import functional_optim as fo

W = torch.nn.Parameter(torch.ones(3))
_LAYER = torch.nn.Linear(1, 1)


def _tied() -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model.named_parameters(remove_duplicate=False)


def _shared() -> Any:
    memory = torch.zeros(6)
    return [(n, torch.nn.Parameter(memory[i : i + 4])) for n, i in (("a", 0), ("b", 2))]


BAD: dict[str, tuple[Any, str]] = {
    "nothing": ([], "empty parameter list"),
    "one tensor": (W, "should be an iterable"),
    "twice": ([("a", W), ("b", W)], "'b' comes twice, also as 'a'"),
    "tied": (_tied(), "'1.weight' comes twice, also as '0.weight'; model.named_par"),
    "two groups": ([{"params": [W]}, {"params": [W]}], "'1' comes twice, also as '0'"),
    "one name": ([("a", W), ("a", torch.ones(2))], "two parameters have the name 'a'"),
    "one memory": (_shared(), "'a' and 'b' lie in the same memory.* pass one"),
    "expanded": (
        [("a", torch.zeros(1).expand(3))],
        r"'a' overlaps itself.* pass param\.clone",
    ),
    "no leaf": ([("a", W * 2)], "parameter 'a' is the result of an operation; pass"),
    "integer": ([("a", torch.ones(2).long())], r"'a' has dtype torch\.int64.*\.float"),
    "complex": ([("a", torch.ones(2).cfloat())], "'a' has dtype.*view_as_real"),
    "sparse": ([("a", torch.ones(2).to_sparse())], "'a' is sparse"),
    "devices": (
        [("a", W), ("b", torch.ones(2, device="meta"))],
        "several devices: 'a' on cpu, 'b' on meta; move them",
    ),
    "no tensor": ([("a", 3.0)], "only optimize Tensors.* a float at position 0; pass"),
    "a set": ([{"params": {W}}], "params are a set; pass a list"),
    "a name": ([{"params": "weight"}], "params are 'weight'; pass the parameters them"),
    "a dict": ([{"params": {"a": W}}], "params are a dict; pass the parameters them"),
    "a number": ([{"params": 5}], "params are a.? int; pass the parameters themselves"),
    "a module": ([{"params": _LAYER}], "params are a Linear; pass the parameters them"),
    "a list": ([W, [torch.ones(2)]], "a list at position 1; put its parameters there"),
    "no group": ([{"params": [W]}, W], "group must be a dict, but got a Parameter"),
    "some names": ([("a", W), torch.ones(2)], "some have a name|have a name and some"),
    "few names": (
        [{"params": [W, torch.ones(2)], "param_names": ["a"]}],
        "a group has 2 parameters and 1 param_names; give each",
    ),
    "no params": ([{"lr": 0.1}], "must have 'params'"),
    "unknown key": ([{"params": [W], "momentum": 0.9}], "'momentum', which no trans"),
    "misspelt": ([{"params": [W], "weight_deacy": 0.9}], "mean 'weight_decay'"),
    "negative": ([{"params": [W], "lr": -1.0}], "lr must be finite and >= 0, got -1"),
    "a string": ([{"params": [W], "lr": "1e-3"}], "lr must be a number.* got '1e-3'"),
    "a mapping": (
        {"a": W},
        r"'a' at position 0; pass the parameters .*model.named_parameters\(\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_parameters_that_are_refused(case: str) -> None:
    """Construction says which parameter or key is wrong, and what to do."""
    params, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        fo.TransformOptimizer(params, fo.adamw(0.1))


@pytest.mark.parametrize("transform", [None, 0.1, torch.optim.AdamW, [fo.adamw(0.1)]])
def test_no_transform(transform: object) -> None:
    """What is no transform is named."""
    with pytest.raises(TypeError, match="transform"):
        fo.TransformOptimizer([W], transform)


CLIP, WINDOW = fo.ClipByValue(1.0), fo.Accumulate(2)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            fo.chain(CLIP, WINDOW),
            r"Value\(1\.0\) comes before Accumulate\(2\); move",
        ),
        (
            fo.chain(fo.Named("x", fo.chain(CLIP)), fo.Named("y", WINDOW)),
            "comes before .* behind Accumulate, or, .* micro-batch, use the pure way",
        ),
        (fo.chain(WINDOW, CLIP, fo.Accumulate(3)), r"Accumulate\(3\); keep one"),
        (
            fo.Masked(WINDOW, "*"),
            r"Masked\(Accumulate\(2\), '\*'\) has one inside",
        ),
        (fo.Partition({"x": fo.chain(WINDOW)}, {"*": "x"}), "has one inside; take it"),
        (fo.chain(WINDOW, fo.Masked(WINDOW, "*")), "has one inside; take it out"),
    ],
    ids=str,
)
def test_accumulate_is_first_in_place(transform: Any, message: str) -> None:
    """What must move, and where it would work, is said when an optimizer is made."""
    with pytest.raises(ValueError, match=f"first member of the chain: .*{message}"):
        fo.TransformOptimizer(parameters().items(), transform)


def test_rules_by_name_need_names() -> None:
    """A mask that matches nothing says that the parameters have no names."""
    masked = fo.Masked(fo.sgd(0.1), "*.bias")
    with pytest.raises(ValueError, match=r"model\.named_parameters\(\) instead of"):
        fo.TransformOptimizer(parameters().values(), masked)
    labelled = fo.Partition({"x": fo.sgd(0.1)}, {"*.bias": "x"})
    with pytest.raises(ValueError, match="'0'"):
        fo.TransformOptimizer(parameters().values(), labelled)


def _refused(optimizer: Any, params: Any, message: str, kind: Any = ValueError) -> None:
    """Assert that a step fails, and that nothing has changed."""
    before = everything(optimizer, params)
    with pytest.raises(kind, match=message):
        optimizer.step()
    assert_same(before, everything(optimizer, params), "after the error")


def _make(transform: fo.Transform | None = None) -> Any:
    """Return an optimizer that took two steps and has the gradients of a third."""
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), transform or fo.adamw(0.1))
    train(optimizer, params, range(2))
    set_gradients(params, 2)
    return params, optimizer


TWICE = fo.Partition(
    {"slow": fo.sgd(0.1), "fast": fo.adamw(0.1)}, {"*.bias": "slow", "*": "fast"}
)


@pytest.mark.parametrize("transform", [fo.adamw(0.1), TWICE], ids=["one", "two"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", math.nan, "lr must be finite and >= 0, got nan"),
        ("lr", math.inf, "lr must be finite and >= 0, got inf"),
        ("lr", -0.1, r"lr must be finite and >= 0, got -0\.1"),
        ("lr", "0.1", "lr must be a number.* got '0.1'"),
        ("lr", None, "lr must be a number.* got None"),
        ("lr", True, "lr must be a number.* got True"),
        ("lr", [0.1], r"lr must be a number.* got \[0\.1\]"),
        (
            "lr",
            torch.tensor(-0.5),
            r"lr must be finite and >= 0, got -0\.5 in a tensor",
        ),
        ("lr", torch.ones(2), r"lr must be a 0-dim tensor, got shape \(2,\)"),
        ("betas", (0.9, 1.0), r"betas\[1\] must be finite and >= 0 and < 1, got 1"),
        ("betas", 0.9, "betas must be a pair"),
        ("betas", (0.9,), "betas must be a pair"),
        ("eps", -1.0, "eps must be finite and >= 0"),
        ("weight_decay", "no", "weight_decay must be a number"),
        ("momentum", 0.5, "'momentum', which no transform"),
        ("max_norm", 1.0, "'max_norm'.* set it in the transform"),
        ("weight_deacy", 0.1, "did you mean 'weight_decay'"),
        ("LR", 0.1, "did you mean 'lr'"),
    ],
    ids=str,
)
def test_values_written_into_a_group_are_checked(
    transform: fo.Transform, key: str, value: Any, message: str
) -> None:
    """Step names the group and the key, and changes nothing."""
    if transform is TWICE and key == "momentum":
        pytest.skip("the transform of another group might have it")
    params, optimizer = _make(transform)
    index = next(
        i
        for i, g in enumerate(optimizer.param_groups)
        if "a.weight" in g["param_names"]
    )
    group = optimizer.param_groups[index]
    saved = dict(group)
    group[key] = value
    _refused(
        optimizer,
        params,
        rf"param_groups\[{index}\].*{message}",
        (ValueError, TypeError),
    )
    group.clear()
    group.update(saved)
    optimizer.step()
    other, reference = _make(transform)
    reference.step()
    assert_same(everything(reference, other), everything(optimizer, params), "after")


def test_a_key_that_is_taken_out_is_named() -> None:
    """A group without a key that it must have says which."""
    params, optimizer = _make()
    del optimizer.param_groups[0]["lr"]
    _refused(optimizer, params, r"param_groups\[0\].*'lr'", (ValueError, KeyError))


def test_notes_in_a_group_are_left_alone() -> None:
    """Keys that mean nothing here may stand in a group, as with torch."""
    params, optimizer = _make()
    optimizer.param_groups[0].update({"name": "body", "initial_lr": 0.1, "lr_scale": 1})
    before = values(params)
    optimizer.step()
    assert not torch.equal(before["scale"], params["scale"])
    assert optimizer.state_dict()["param_groups"][0]["name"] == "body"


def test_a_parameter_without_a_name_is_told() -> None:
    """One that is put beside named ones by hand says what to do."""
    params, optimizer = _make()
    new = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    optimizer.param_groups[0]["params"].append(new)
    _refused(optimizer, params, r"param_groups\[0\].*position 4.*add_param_group")


# -- gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("transform", [fo.adamw(0.1), TWICE], ids=["one", "two"])
def test_a_sparse_gradient_is_named(transform: fo.Transform) -> None:
    """An embedding with sparse=True is told what to do; nothing moves."""
    params, optimizer = _make(transform)
    params["b.weight"].grad = params["b.weight"].grad.to_sparse()
    _refused(optimizer, params, "'b.weight' is sparse.*sparse=False", TypeError)


def test_no_gradient_at_all_is_a_warning_once() -> None:
    """A step without any gradient does nothing, and says so the first time."""
    params, optimizer = _make()
    optimizer.zero_grad()
    before = everything(optimizer, params)
    with pytest.warns(UserWarning, match="no parameter of this opt") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    optimizer.step()
    assert_same(before, everything(optimizer, params), "after")


def test_nonfinite_gradients_are_passed_on() -> None:
    """A NaN makes the weights NaN that it belongs to, and no other."""
    params, optimizer = _make()
    params["a.bias"].grad[1] = math.nan
    optimizer.step()
    assert params["a.bias"].isnan().tolist() == [False, True, False]
    assert not any(params[n].isnan().any() for n in params if n != "a.bias")


def test_a_closure_that_fails_changes_nothing() -> None:
    """Its error comes out, and grad mode is as it was."""
    params, optimizer = _make()
    before = everything(optimizer, params)

    def closure() -> None:
        raise ZeroDivisionError

    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert_same(before, everything(optimizer, params), "after the error")

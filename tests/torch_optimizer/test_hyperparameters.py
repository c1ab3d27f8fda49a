"""Hyperparameters that a user keeps hold of: tensors, defaults, notes, cycles."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from comparison import assert_same
from torch.optim.lr_scheduler import OneCycleLR
from training import everything, parameters, set_gradients, train, values

import functional_optim as fo


def make(transform: fo.Transform, **options: Any) -> Any:
    """Return parameters and an optimizer over them."""
    params = parameters()
    return params, fo.TransformOptimizer(params.items(), transform, **options)


@pytest.mark.parametrize("several", [False, True], ids=["one group", "several groups"])
@pytest.mark.parametrize("where", ["own", "group"])
def test_a_tensor_of_the_user_is_followed(several: bool, where: str) -> None:
    """Writing into the tensor that was given as the rate counts, as with torch."""
    ends = []
    for kind in ("ours", "theirs"):
        rate = torch.tensor(0.1, dtype=torch.float64)
        params = parameters()
        everyone = list(params.values())
        parts = [everyone[:2], everyone[2:]] if several else [everyone]
        groups = [{"params": part} for part in parts]
        if kind == "ours":
            optimizer: Any = fo.TransformOptimizer(groups, fo.adamw(rate))
        else:
            optimizer = torch.optim.AdamW(groups, rate)
        train(optimizer, params, range(2))
        (rate if where == "own" else optimizer.param_groups[0]["lr"]).fill_(0.5)
        train(optimizer, params, range(2, 4))
        ends.append(values(params))
    # A few roundings in each of 4 steps.
    assert_same(ends[1], ends[0], "weights", rtol=1e-13)


@pytest.mark.parametrize("place", ["transform", "group", "written"])
def test_a_tensor_of_one_element_is_a_number(place: str) -> None:
    """torch takes a rate of shape (1,); what is written into it counts."""
    rate = torch.full((1,), 0.1, dtype=torch.float64)
    ends = []
    for kind in ("ours", "theirs"):
        own, params = rate.clone(), parameters()
        first: Any = own if place == "transform" else 0.3
        group: Any = {"params": list(params.values())}
        if place == "group":
            group["lr"] = own
        optimizer: Any = (
            fo.TransformOptimizer([group], fo.adamw(first))
            if kind == "ours"
            else torch.optim.AdamW([group], first)
        )
        if place == "written":
            optimizer.param_groups[0]["lr"] = own
        train(optimizer, params, range(2))
        own.fill_(0.05)
        train(optimizer, params, range(2, 4))
        ends.append(values(params))
    # A few roundings in each of 4 steps.
    assert_same(ends[1], ends[0], "weights", rtol=1e-13)


def test_defaults_that_are_changed_count_for_new_groups() -> None:
    """`optimizer.defaults["lr"] = 0.5` is the rate of what is added from then on."""
    _, optimizer = make(fo.adamw(0.1))
    optimizer.defaults["lr"] = 0.5
    for each in (optimizer, copy.deepcopy(optimizer)):
        new = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        each.add_param_group({"params": [("new", new)]})
        assert [g["lr"] for g in each.param_groups] == [0.1, 0.5]
        new.grad = torch.ones_like(new)
        each.step()
        # Adam's first step is the rate, beside a decay of 0.5 * 0.01.
        torch.testing.assert_close(new.detach(), torch.full_like(new, 1 - 0.505))


def test_defaults_that_are_not_legal_are_named() -> None:
    """What was written into the defaults is checked where it counts."""
    _, optimizer = make(fo.adamw(0.1))
    optimizer.defaults["lr"] = -1.0
    new = {"params": [("new", torch.nn.Parameter(torch.ones(2).double()))]}
    with pytest.raises(ValueError, match="lr must be finite and >= 0"):
        optimizer.add_param_group(new)
    assert len(optimizer.param_groups) == 1


def test_one_like_it_is_made_from_its_defaults() -> None:
    """`type(optimizer)(params, **optimizer.defaults)`, as trainers do it."""
    _, optimizer = make(fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(0.1)))
    optimizer.defaults["lr"] = 0.3
    params = parameters()
    defaults = {k: v for k, v in optimizer.defaults.items() if k != "differentiable"}
    assert pickle.loads(pickle.dumps(defaults)) == defaults, "plain data"
    again = type(optimizer)(params.items(), **defaults)
    assert again.param_groups[0]["lr"] == 0.3
    assert again.transform == fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(0.3))
    theirs = parameters()
    reference = fo.TransformOptimizer(theirs.items(), again.transform)
    train(again, params, range(3))
    train(reference, theirs, range(3))
    assert_same(everything(reference, theirs), everything(again, params), "made so")


def test_momentum_cycles_where_betas_do() -> None:
    """OneCycleLR over AdamW and SGD cycles the betas of one, the other's momentum."""
    labels = {"*.weight": "a", "*": "b"}
    both = fo.Partition({"a": fo.adamw(0.01), "b": fo.sgd(0.01, 0.9)}, labels)
    params = parameters()
    optimizer = fo.TransformOptimizer(params.items(), both)
    theirs = parameters()
    kinds = {True: torch.optim.AdamW, False: torch.optim.SGD}
    references = []
    for weights, kind in kinds.items():
        own = [p for n, p in theirs.items() if n.endswith("weight") == weights]
        options: Any = {} if weights else {"momentum": 0.9}
        references.append(kind(own, lr=0.01, **options))
    everyone = [optimizer, *references]
    schedulers = [OneCycleLR(each, 0.1, total_steps=8) for each in everyone]
    for step in range(8):
        set_gradients(params, step)
        set_gradients(theirs, step)
        for each in everyone:
            each.step()
        assert optimizer.param_groups[1]["momentum"] == pytest.approx(
            references[1].param_groups[0]["momentum"], abs=1e-15
        )
        if step == 4:  # What is loaded was cycled by nobody.
            optimizer.load_state_dict(optimizer.state_dict())
        if step < 7:
            for scheduler in schedulers:
                scheduler.step()
    # A few roundings in each of 8 steps.
    assert_same(values(theirs), values(params), "weights", rtol=1e-13)


NOTES = [
    "apply_weight_decay",
    "no_weight_decay",
    "weight_decay_mult",
    "base_weight_decay",
    "lr_scale",
]


@pytest.mark.parametrize("note", NOTES)
def test_notes_that_are_words_of_their_own_may_stand_in_a_group(note: str) -> None:
    """What is no slip of the pen is a note, as with torch."""
    params, optimizer = make(fo.adamw(0.1))
    optimizer.param_groups[0][note] = 2.0
    before = values(params)
    train(optimizer, params, [0])
    assert not torch.equal(before["scale"], params["scale"])
    new = torch.nn.Parameter(torch.ones(2).double())
    optimizer.add_param_group({"params": [("new", new)], note: 3.0})
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    for each in (optimizer, twin):
        assert [group[note] for group in each.param_groups] == [2.0, 3.0]


@pytest.mark.parametrize("note", ["beta", "lrs"])
def test_notes_that_look_like_slips_are_listed(note: str) -> None:
    """A key near a hyperparameter is refused, with the way to say that it is meant."""
    params, optimizer = make(fo.adamw(0.1))
    optimizer.param_groups[0][note] = 2.0
    set_gradients(params, 0)
    with pytest.raises(ValueError, match=rf"did you mean .*notes=\['{note}'\]"):
        optimizer.step()
    params, optimizer = make(fo.adamw(0.1), notes=[note])
    optimizer.param_groups[0][note] = 2.0
    loaded = copy.deepcopy(optimizer)
    loaded.load_state_dict(optimizer.state_dict())
    for each in (optimizer, copy.deepcopy(optimizer), loaded):
        new = torch.nn.Parameter(torch.ones(2).double())
        each.add_param_group({"params": [("new", new)], note: 3.0})
        new.grad = torch.ones_like(new)
        each.step()
        assert [group[note] for group in each.param_groups] == [2.0, 3.0]


def test_notes_that_are_no_keys_are_refused() -> None:
    """Keys are strings."""
    for notes in (5, [3]):
        with pytest.raises(TypeError, match=r'such as \["lrs"\], got '):
            make(fo.adamw(0.1), notes=notes)


def test_numbers_of_numpy_are_saved_as_those_of_python() -> None:
    """A rate that NumPy computed loads with weights_only=True."""
    params, optimizer = make(fo.adamw(0.1))
    group = optimizer.param_groups[0]
    group["lr"] = np.interp(3, [0, 10], [0.0, 0.01])
    group["betas"] = (np.float64(0.9), np.float64(0.99))
    group["note"] = [np.float32(0.5), {"deep": np.int64(3)}]
    train(optimizer, params, [0])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert saved["param_groups"][0]["note"] == [0.5, {"deep": 3}]
    _, again = make(fo.adamw(0.1))
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == pytest.approx(0.003)


def test_numbers_beside_the_transform_are_told_where_they_stand() -> None:
    """`TransformOptimizer(params, lr=...)` says that a transform has the numbers."""
    params = list(parameters().values())
    with pytest.raises(TypeError, match=r"needs a transform.*adamw\(lr=0\.001\)"):
        fo.TransformOptimizer(params, lr=1e-3)
    with pytest.raises(TypeError, match=r"'lr'; hyper.* stand in the transform.*adamw"):
        fo.TransformOptimizer(params, fo.adamw(), lr=1e-3)
    with pytest.raises(TypeError, match="no argument 'foreach'; leave it out"):
        fo.TransformOptimizer(params, fo.adamw(), foreach=True)


def test_each_optimizer_names_its_own_transform() -> None:
    """The text among the defaults finds the transform of this optimizer, or none."""

    def made_like(optimizer: Any) -> Any:
        return type(optimizer)(parameters().items(), **optimizer.defaults)

    transforms = [fo.sgd(lambda step, x=x: x + 0 * step) for x in (1.0, 2.0)]
    optimizers = [make(transform)[1] for transform in transforms]
    for number, optimizer in zip((1.0, 2.0), optimizers, strict=True):
        for each in (optimizer, copy.deepcopy(optimizer), made_like(optimizer)):
            assert made_like(each).param_groups[0]["lr"].item() == number
    again = made_like(optimizers[0])
    text = again.defaults["transform"]
    assert text == optimizers[0].defaults["transform"]
    del transforms, optimizers, optimizer, each
    gc.collect()
    assert made_like(again).param_groups[0]["lr"].item() == 1.0
    del again
    gc.collect()
    with pytest.raises(TypeError, match="names none that lives in this process; pass"):
        fo.TransformOptimizer(parameters().items(), text)

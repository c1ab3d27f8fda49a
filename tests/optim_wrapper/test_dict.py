"""Several wrappers by name: what each logs, and which states they load."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import functional_optim as fo

NORM = {"max_norm": 1.0}


def make(clip: Any = None, kind: Any = fo.OptimWrapper, **options: Any) -> Any:
    """Return a wrapper of a parameter."""
    param = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=1.0, momentum=0.5)
    return kind(optimizer=optimizer, clip_grad=copy.copy(clip), **options)


def step(wrapper: Any, grad: float) -> None:
    """Take a step with this gradient."""
    (param,) = wrapper.optimizer.param_groups[0]["params"]
    wrapper.update_params((param * grad).sum())


def logged(wrapper: Any) -> dict[str, float]:
    """Return what a wrapper logged."""
    scalars = wrapper.message_hub._scalars
    return {key: scalar.current() for key, scalar in scalars.items()}


@pytest.mark.parametrize("kind", [fo.OptimWrapper, fo.AmpOptimWrapper])
def test_several_clips_log_under_the_names_of_their_wrappers(kind: Any) -> None:
    """Two norms do not get into one history; copies and later dicts keep the names."""
    wrappers = fo.OptimWrapperDict(gen=make(NORM, kind), disc=make(NORM, kind))
    wrappers = copy.deepcopy(wrappers)
    wrappers = fo.OptimWrapperDict(**dict(wrappers.items()))
    step(wrappers["gen"], 3.0)
    step(wrappers["disc"], 4.0)
    assert logged(wrappers["gen"]) == {"train/gen.grad_norm": 3.0}
    assert logged(wrappers["disc"]) == {"train/disc.grad_norm": 4.0}


def test_names_of_norms_stay_when_a_limit_changes() -> None:
    """Whatever is written into `clip_grad_kwargs`."""
    wrappers = fo.OptimWrapperDict(gen=make(NORM), disc=make(NORM))
    for kwargs in ({"max_norm": 2.0}, {"clip_value": 0.5}, {"max_norm": 1.0}):
        wrappers["gen"].clip_grad_kwargs = kwargs
        step(wrappers["gen"], 3.0)
    assert logged(wrappers["gen"]) == {"train/gen.grad_norm": 3.0}


def test_a_transform_and_a_clip_are_told_apart() -> None:
    """The norm of a transform has the name of its wrapper, too."""
    transform = fo.chain(fo.Scale(2.0), fo.ClipByGlobalNorm(1.0))
    wrappers = fo.OptimWrapperDict(gen=make(transform=transform), disc=make(NORM))
    step(wrappers["gen"], 3.0)
    step(wrappers["disc"], 4.0)
    assert logged(wrappers["gen"]) == {"train/gen.grad_norm": 6.0}
    assert logged(wrappers["disc"]) == {"train/disc.grad_norm": 4.0}


def test_a_clip_of_ones_own_has_the_name() -> None:
    """`grad_name` has it, which overrides of `_clip_grad` log under."""

    class Own(fo.OptimWrapper):
        def _clip_grad(self) -> None:
            self.message_hub.update_scalar(f"train/{self.grad_name}", 7.0)

    wrappers = fo.OptimWrapperDict(gen=make(NORM, Own), disc=make(NORM))
    step(wrappers["gen"], 3.0)
    assert logged(wrappers["gen"]) == {"train/gen.grad_norm": 7.0}


@pytest.mark.parametrize("other", [None, {"type": "value", "clip_value": 1.0}])
def test_a_single_norm_stays_where_it_is(other: Any) -> None:
    """As in MMEngine, where one wrapper logs and the others do not."""
    wrappers = fo.OptimWrapperDict(gen=make(other), disc=make(NORM))
    step(wrappers["gen"], 3.0)
    step(wrappers["disc"], 4.0)
    assert logged(wrappers["gen"]) == {}
    assert logged(wrappers["disc"]) == {"train/grad_norm": 4.0}
    alone = make(NORM)
    step(alone, 2.0)
    assert logged(alone) == {"train/grad_norm": 2.0}


def test_a_clip_that_comes_later_is_told_apart() -> None:
    """Who clips is looked at when a norm is logged, not when the dict is made."""
    first, second = make(), make(NORM)
    wrappers = fo.OptimWrapperDict(gen=first, disc=second)
    step(second, 4.0)
    first.clip_grad_kwargs = {"max_norm": 1.0}
    step(first, 3.0)
    step(second, 5.0)
    assert logged(first) == {"train/gen.grad_norm": 3.0}
    assert logged(second) == {"train/grad_norm": 4.0, "train/disc.grad_norm": 5.0}
    first.clip_grad_kwargs = None
    step(second, 6.0)
    assert logged(wrappers["disc"])["train/grad_norm"] == 6.0


def test_the_latest_dict_names_the_norms() -> None:
    """A wrapper that is put into another dict logs under its name there."""
    first, second = make(NORM), make(NORM)
    before = fo.OptimWrapperDict(gen=first, disc=second)
    after = fo.OptimWrapperDict(G=first, D=second)
    step(first, 3.0)
    step(second, 4.0)
    assert logged(first) == {"train/G.grad_norm": 3.0}
    assert logged(second) == {"train/D.grad_norm": 4.0}
    assert before["gen"] is after["G"]


def test_a_copy_of_one_wrapper_is_in_no_dict() -> None:
    """It logs as a wrapper alone, and does not hold what the others hold."""
    wrappers = fo.OptimWrapperDict(gen=make(NORM), disc=make(NORM))
    alone = copy.deepcopy(wrappers["gen"])
    step(alone, 3.0)
    assert logged(alone) == {"train/grad_norm": 3.0}
    again = pickle.loads(pickle.dumps(wrappers))
    step(again["gen"], 3.0)
    assert logged(again["gen"]) == {"train/gen.grad_norm": 3.0}


@pytest.mark.parametrize("clip", [NORM, {"type": "value", "clip_value": 1.0}, None])
def test_a_name_of_ones_own_stays(clip: Any) -> None:
    """Whatever clips now, and with the name of the wrapper in front in a dict."""
    wrapper = make(clip)
    wrapper.grad_name = "disc"
    wrapper.clip_grad_kwargs = {"max_norm": 1.0}
    step(wrapper, 3.0)
    assert logged(wrapper) == {"train/disc": 3.0}
    wrappers = fo.OptimWrapperDict(gen=make(NORM), disc=wrapper)
    step(wrappers["disc"], 4.0)
    assert logged(wrapper) == {"train/disc": 3.0, "train/disc.disc": 4.0}


def test_a_refused_wrapper_leaves_the_others_alone() -> None:
    """No name is given before all wrappers are looked at."""
    first, second = make(NORM), make(NORM)
    with pytest.raises(TypeError, match="only accept OptimWrapper instance"):
        fo.OptimWrapperDict(a=first, b=second, c=second.optimizer)
    assert first.grad_name == second.grad_name == "grad_norm"


# -- states ----------------------------------------------------------------------------


def trained() -> fo.OptimWrapperDict:
    """Return two wrappers that took a step each."""
    wrappers = fo.OptimWrapperDict(gen=make(), disc=make())
    for wrapper in wrappers.values():
        step(wrapper, 3.0)
    return wrappers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("disc"), "it lacks 'disc', the wrappers are gen, disc"),
        (lambda s: s.clear(), "it lacks 'gen', 'disc', the wrappers are gen, disc"),
        (lambda s: s.update(ema=s["gen"]), "it has 'ema', the wrappers are gen, disc"),
        (
            lambda s: s.update(critic=s.pop("disc")),
            "it has 'critic', the wrappers are gen, disc; build those that were saved",
        ),
    ],
)
def test_a_state_has_all_wrappers_and_no_other(change: Any, message: str) -> None:
    """Else one of them would start anew, unnoticed; nothing changes then."""
    state, wrappers = (
        trained().state_dict(),
        fo.OptimWrapperDict(gen=make(), disc=make()),
    )
    change(state)
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match=f"Mismatched `state_dict`.*{message}"):
            wrappers.load_state_dict(state)
    assert all(not wrapper.optimizer.state for wrapper in wrappers.values())
    assert [wrapper.inner_count for wrapper in wrappers.values()] == [0, 0]


class Averaging(fo.OptimWrapper):
    """A wrapper that saves and loads something of its own."""

    average = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the state with an average."""
        return {**super().state_dict(), "average": self.average}

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a state with an average."""
        own = dict(state_dict)
        self.average = own.pop("average")
        super().load_state_dict(own)


def test_a_wrapper_that_loads_in_its_own_way_does_so() -> None:
    """An overridden `load_state_dict` is called, as an overridden `state_dict` is."""
    source = fo.OptimWrapperDict(gen=make(kind=Averaging), disc=make())
    for wrapper in source.values():
        step(wrapper, 3.0)
    source["gen"].average = 5.0
    target = fo.OptimWrapperDict(gen=make(kind=Averaging), disc=make())
    target.load_state_dict(source.state_dict())
    assert target["gen"].average == 5.0
    assert [wrapper.inner_count for wrapper in target.values()] == [1, 1]
    assert all(wrapper.optimizer.state for wrapper in target.values())


def test_a_load_that_fails_on_its_own_way_changes_nothing_of_the_others() -> None:
    """What was loaded before is taken back."""
    target = fo.OptimWrapperDict(gen=make(kind=Averaging), disc=make())
    with pytest.raises(KeyError, match="average"):
        target.load_state_dict(trained().state_dict())
    assert all(not wrapper.optimizer.state for wrapper in target.values())
    assert [wrapper.inner_count for wrapper in target.values()] == [0, 0]

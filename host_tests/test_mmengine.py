"""MMEngine's Runner trains with our wrappers as with its own, bit for bit."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import mmengine
import mmengine_runs
import pytest
import torch
import twins
from mmengine_runs import (
    BATCHES,
    OURS,
    THEIRS,
    assert_same,
    train,
)

import functional_optim as fo
from functional_optim.integrations import _history_buffer as _deferred_history
from functional_optim.integrations.mmengine import register

if TYPE_CHECKING:
    import pathlib

# Both round differently in the last bits of each update: 16 updates of at most lr,
# each off by some units of 6e-8 of it, where Adam's quotient is about 1.
FLOAT32 = 1e-5
SGD = {"type": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"type": "AdamW", "lr": 0.01, "weight_decay": 0.1}
RULES = {
    "norm_decay_mult": 0.0,
    "bias_lr_mult": 2.0,
    "custom_keys": {"head": {"lr_mult": 0.5, "decay_mult": 0.1}},
}
WARMUP = {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 3}
STEPS = {"type": "MultiStepLR", "milestones": [1], "by_epoch": True}
COSINE = {"type": "CosineAnnealingLR", "by_epoch": False, "T_max": 2 * BATCHES}
MOMENTUM = {
    "type": "LinearMomentum",
    "start_factor": 0.5,
    "by_epoch": False,
    "end": BATCHES,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"optimizer": {"type": "SGD", "lr": 0.05}},
    "norm": {"optimizer": SGD, "clip_grad": {"max_norm": 0.5}},
    "inf norm": {
        "optimizer": ADAMW,
        "clip_grad": {"max_norm": 0.1, "norm_type": "inf"},
    },
    "value": {"optimizer": SGD, "clip_grad": {"type": "value", "clip_value": 0.1}},
    # 16 batches: the last window has one.
    "windows": {
        "optimizer": ADAMW,
        "accumulative_counts": 3,
        "clip_grad": {"max_norm": 0.5},
    },
    "rules": {"optimizer": SGD, "paramwise_cfg": RULES, "schedulers": [WARMUP, STEPS]},
    "all": {
        "optimizer": ADAMW,
        "accumulative_counts": 3,
        "clip_grad": {"max_norm": 0.5},
        "paramwise_cfg": RULES,
        "schedulers": [COSINE, MOMENTUM],
    },
    "momentum": {
        "optimizer": SGD,
        "paramwise_cfg": RULES,
        "schedulers": [WARMUP, COSINE, MOMENTUM],
    },
}


def run(case: str, side: str, folder: pathlib.Path, **options: Any) -> Any:
    """Train as a case says, with MMEngine's wrapper or ours."""
    config = dict(CASES[case])
    given = {"schedulers": config.pop("schedulers", None), **options}
    wrapper = {"type": f"{side}OptimWrapper", **config}
    return train(folder / (side or "theirs"), wrapper, **given)


@pytest.mark.parametrize("case", CASES)
def test_trains(case: str, tmp_path: pathlib.Path) -> None:
    """Weights, rates, momenta, norms and the log are those of MMEngine's wrapper."""
    reference, got = run(case, THEIRS, tmp_path), run(case, OURS, tmp_path)
    assert type(got.runner.optim_wrapper).__module__.startswith("functional_optim.")
    assert_same(got.weights, reference.weights)
    assert got.settings == reference.settings
    assert ("base_lr" in got.settings[0]) == ("paramwise_cfg" in CASES[case])
    assert got.norms == reference.norms
    assert got.log == reference.log
    assert len(got.log) >= BATCHES
    clips = CASES[case].get("clip_grad", {})
    assert ("grad_norm" in got.log[-1]) == ("max_norm" in clips)


def test_schedulers_have_an_effect(tmp_path: pathlib.Path) -> None:
    """What the test above compares would differ without the schedulers."""
    reference = run("momentum", OURS, tmp_path)
    other = run("momentum", OURS, tmp_path / "other", schedulers=[WARMUP, COSINE])
    assert len({str(s["base_lr"]) for s in reference.settings}) > BATCHES
    assert len({str(s["momentum"]) for s in reference.settings}) == BATCHES
    assert not torch.equal(
        reference.weights["head.weight"], other.weights["head.weight"]
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sides", [(OURS, THEIRS), (THEIRS, OURS), (OURS, OURS)])
def test_resumes(case: str, sides: tuple[str, str], tmp_path: pathlib.Path) -> None:
    """Checkpoints go from one to the other; training ends with the same bits."""
    straight = run(case, THEIRS, tmp_path / "straight", by_epoch=False)
    every = 3 * CASES[case].get("accumulative_counts", 1)
    first = run(case, sides[0], tmp_path, by_epoch=False, every=every)
    checkpoint = tmp_path / (sides[0] or "theirs") / f"iter_{every}.pth"
    resumed = run(
        case, sides[1], tmp_path / "resumed", by_epoch=False, resume=checkpoint
    )
    assert_same(first.weights, straight.weights)
    assert_same(resumed.weights, straight.weights)
    assert resumed.settings == straight.settings[every:]
    assert resumed.norms == straight.norms
    assert resumed.log[-1] == straight.log[-1]
    history = torch.load(checkpoint, weights_only=False)["message_hub"]["log_scalars"]
    assert {type(h).__name__ for h in history.values()} == {"HistoryBuffer"}


@pytest.mark.parametrize("saved", [4, 5, 14])
def test_resumes_inside_a_window(saved: int, tmp_path: pathlib.Path) -> None:
    """With ours the gradients of a window that a checkpoint cuts are not lost."""

    def ends_alike(side: str) -> bool:
        straight = run("all", side, tmp_path, by_epoch=False, every=saved)
        checkpoint = tmp_path / (side or "theirs") / f"iter_{saved}.pth"
        again = tmp_path / "resumed"
        resumed = run("all", side, again, by_epoch=False, resume=checkpoint)
        same = [
            torch.equal(straight.weights[name], resumed.weights[name])
            for name in straight.weights
        ]
        return all(same)

    assert ends_alike(OURS)
    assert not ends_alike(THEIRS)


# -- other ways to build ---------------------------------------------------------------


def _norm_config(kind: Any, **more: Any) -> dict[str, Any]:
    return {"type": kind, "optimizer": SGD, "clip_grad": {"max_norm": 0.5}, **more}


@pytest.mark.parametrize("constructor", [None, "DefaultOptimWrapperConstructor"])
def test_constructors_are_interchangeable(
    constructor: str | None, tmp_path: pathlib.Path
) -> None:
    """Our constructor in the Runner gives the groups and the log of MMEngine's."""
    more: dict[str, Any] = {"paramwise_cfg": RULES}
    reference = train(tmp_path / "a", _norm_config("OptimWrapper", **more))
    if constructor is not None:
        more["constructor"] = OURS + constructor
    got = train(tmp_path / "b", _norm_config(f"{OURS}OptimWrapper", **more))
    assert_same(got.weights, reference.weights)
    assert got.settings == reference.settings
    lines = [line for line in reference.log if line.startswith("paramwise")]
    assert len(lines) >= 8
    # As the guide shows it, ours has a line for biases that no rule changes, too.
    assert set(lines) <= set(got.log)
    assert got.log[-1] == reference.log[-1]


@pytest.mark.parametrize("way", ["class", "config", "optimizer", "instance"])
def test_other_ways_to_say_it(way: str, tmp_path: pathlib.Path) -> None:
    """A class, a Config, a built optimizer, an instance built before the Runner."""
    reference = train(tmp_path / "a", _norm_config("OptimWrapper"))
    model = mmengine_runs.Regression()
    optimizer = torch.optim.SGD(
        model.parameters(), **{k: v for k, v in SGD.items() if k != "type"}
    )
    clip = {"max_norm": 0.5}
    named = _norm_config(f"{OURS}OptimWrapper")
    wrapper: Any = {
        "class": _norm_config(fo.OptimWrapper),
        "config": mmengine.Config({"optim_wrapper": named}).optim_wrapper,
        "optimizer": {**named, "optimizer": optimizer},
        "instance": fo.OptimWrapper(optimizer, clip_grad=clip),
    }[way]
    got = train(tmp_path / "b", wrapper, model=lambda: model)
    assert isinstance(got.runner.optim_wrapper, fo.OptimWrapper)
    assert_same(got.weights, reference.weights)
    assert got.log == reference.log
    assert got.norms == reference.norms


def test_norm_of_an_instance_reaches_its_runner(tmp_path: pathlib.Path) -> None:
    """Also if it was built before; MMEngine's tells the hub of that time."""

    def logs_norm(kind: Any, folder: str) -> bool:
        model = mmengine_runs.Regression()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapper = kind(optimizer, clip_grad={"max_norm": 0.5})
        got = train(tmp_path / folder, wrapper, model=lambda: model)
        return "grad_norm" in got.log[-1]

    assert logs_norm(fo.OptimWrapper, "a")
    assert not logs_norm(mmengine.optim.OptimWrapper, "b")


def test_registries_know_each_other() -> None:
    """Names of ours behind a scope, later ones too; names of MMEngine's in ours."""
    for name in ("functional_optim.AdamW", "AdamW"):
        assert mmengine.registry.OPTIMIZERS.get(name) is torch.optim.AdamW
    preset = mmengine.registry.OPTIMIZERS.get("fo.adamw")
    assert preset is mmengine.registry.OPTIMIZERS.get("functional_optim.adamw")
    assert preset is fo.OPTIMIZERS.get("fo.adamw")
    assert mmengine.registry.OPTIM_WRAPPERS.get("OptimWrapper") is not fo.OptimWrapper
    with pytest.raises(KeyError, match="Wrappr"):
        mmengine.registry.OPTIM_WRAPPERS.build({"type": "functional_optim.Wrappr"})

    class Late(fo.OptimWrapper):
        pass

    class Descent(torch.optim.SGD):
        pass

    fo.OPTIM_WRAPPERS.register_module(module=Late)
    mmengine.registry.OPTIMIZERS.register_module(module=Descent)
    try:
        assert mmengine.registry.OPTIM_WRAPPERS.get("functional_optim.Late") is Late
        config = {"type": "Late", "optimizer": {"type": "Descent", "lr": 0.1}}
        wrapper = fo.build_optim_wrapper(mmengine_runs.Regression(), config)
        assert (type(wrapper), type(wrapper.optimizer)) == (Late, Descent)
        with pytest.raises(ValueError, match="'Descend' is not in the optimizer reg"):
            fo.OPTIMIZERS.build({"type": "Descend"})
    finally:
        del fo.OPTIM_WRAPPERS.module_dict["Late"]
        del mmengine.registry.OPTIMIZERS.module_dict["Descent"]


# -- mixed precision, our optimizers, several optimizers ------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float16", "loss_scale": {"init_scale": 2.0**20}},
        {"dtype": "float16", "loss_scale": 512},
    ],
    ids=str,
)
def test_mixed_precision(options: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """On the CPU, where MMEngine's refuses; resumed inside a window, too."""

    def run(folder: str, side: str = OURS, **more: Any) -> Any:
        wrapper = _norm_config(f"{side}AmpOptimWrapper", accumulative_counts=3)
        given = {"by_epoch": False, "schedulers": [COSINE], **more}
        return train(tmp_path / folder, {**wrapper, **options}, **given)

    straight = run("a")
    resumed = run("b", resume=tmp_path / "a" / "iter_4.pth")
    assert_same(resumed.weights, straight.weights)
    assert isinstance(straight.runner.optim_wrapper, mmengine.optim.AmpOptimWrapper)
    saved = torch.load(tmp_path / "a" / "iter_16.pth", weights_only=False)["optimizer"]
    if options["dtype"] == "bfloat16":
        assert "loss_scaler" not in saved
    elif options["loss_scale"] == 512:
        assert saved["loss_scaler"]["scale"] == 512
    else:  # Some steps overflowed and were skipped.
        assert saved["loss_scaler"]["scale"] < 2.0**20
    assert "grad_norm" in straight.log[-1]
    plain = train(
        tmp_path / "c",
        _norm_config(f"{OURS}OptimWrapper", accumulative_counts=3),
        by_epoch=False,
        schedulers=[COSINE],
    )
    assert not torch.equal(
        plain.weights["head.weight"], straight.weights["head.weight"]
    )
    with pytest.raises(AssertionError, match="only available training"):
        run("d", THEIRS)


@pytest.mark.parametrize("constructor", [None, "DefaultOptimWrapperConstructor"])
def test_our_optimizer(constructor: str | None, tmp_path: pathlib.Path) -> None:
    """`fo.adamw` follows rates, momenta and rules, and resumes with the same bits."""
    more: dict[str, Any] = {"paramwise_cfg": RULES, "accumulative_counts": 3}
    schedules = [WARMUP, COSINE, MOMENTUM]

    def run(folder: str, wrapper: Any, **options: Any) -> Any:
        given = {"by_epoch": False, "schedulers": schedules, **options}
        return train(tmp_path / folder, wrapper, **given)

    theirs = {**_norm_config("OptimWrapper", **more), "optimizer": ADAMW}
    ours = {**theirs, "optimizer": {**ADAMW, "type": "fo.adamw"}}
    ours["type"] = f"{OURS}OptimWrapper"
    if constructor is not None:
        ours["constructor"] = OURS + constructor
    reference, got = run("a", theirs), run("b", ours)
    assert type(got.runner.optim_wrapper.optimizer) is fo.TransformOptimizer
    assert twins.distance(got.weights, reference.weights) <= FLOAT32
    assert got.settings == reference.settings
    # The momentum has an effect.
    other = run("c", ours, schedulers=[WARMUP, COSINE])
    assert twins.distance(other.weights, got.weights) > 10 * FLOAT32
    resumed = run("d", ours, resume=tmp_path / "b" / "iter_4.pth")
    assert_same(resumed.weights, got.weights)


class Pair(mmengine_runs.Regression):
    """A model whose two parts are trained in turns, by wrappers of their own.

    Args:
        apart: Whether the gradients of a part are those of its own turn.
    """

    def __init__(self, *, apart: bool = True) -> None:
        super().__init__()
        self.apart = apart

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Any]:
        """Step the backbone, then the head."""
        logs = {}
        for name, other in (("backbone", self.head), ("head", self.backbone)):
            other.requires_grad_(not self.apart)
            wrapper = optim_wrapper[name]
            with wrapper.optim_context(self):
                loss = self(**data)["loss"]
            wrapper.update_params(loss)
            other.requires_grad_(True)
            logs[f"loss_{name}"] = loss
        return logs


class PairConstructor:
    """What the guide shows for several optimizers.

    Args:
        optim_wrapper_cfg: Configs by name of a part.
        paramwise_cfg: None.
        side: Whose the wrappers are.
    """

    def __init__(
        self, optim_wrapper_cfg: Any, paramwise_cfg: Any = None, *, side: str
    ) -> None:
        assert paramwise_cfg is None
        self.config = optim_wrapper_cfg
        self.module = fo if side == OURS else mmengine.optim

    def __call__(self, model: Any) -> Any:
        """Build a wrapper for each part."""
        parts = {
            name: self.module.build_optim_wrapper(getattr(model, name), config)
            for name, config in self.config.items()
        }
        return self.module.OptimWrapperDict(**parts)


def train_pair(
    side: str,
    folder: pathlib.Path,
    *,
    mixed: bool = False,
    apart: bool = True,
    **options: Any,
) -> Any:
    """Train a pair, with wrappers that a constructor builds."""
    config: Any = {
        "backbone": {"optimizer": SGD, "accumulative_counts": 2},
        "head": {"optimizer": ADAMW, "clip_grad": {"max_norm": 0.5}},
        "constructor": functools.partial(PairConstructor, side=side),
    }
    model = Pair(apart=apart)
    if mixed and side == OURS:
        config = dict(config.pop("constructor")(config)(model).items())
    return train(
        folder,
        config,
        model=lambda: model,
        by_epoch=False,
        every=1,
        schedulers={"backbone": [COSINE], "head": [WARMUP, MOMENTUM]},
        **options,
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_several_optimizers(mixed: bool, tmp_path: pathlib.Path) -> None:
    """Wrappers by name train, log, save and resume as MMEngine's do.

    Mixed: our wrappers in MMEngine's dict, as its Runner makes one of instances.
    """
    reference = train_pair(THEIRS, tmp_path / "a")
    got = train_pair(OURS, tmp_path / "b", mixed=mixed)
    kind = mmengine.optim.OptimWrapperDict
    assert isinstance(got.runner.optim_wrapper, kind)
    assert isinstance(got.runner.optim_wrapper, fo.OptimWrapperDict) != mixed
    assert_same(got.weights, reference.weights)
    assert got.settings == reference.settings
    assert got.norms == reference.norms
    assert got.log == reference.log
    for side, folder in ((OURS, "a"), (THEIRS, "b"), (OURS, "b")):
        checkpoint = tmp_path / folder / "iter_4.pth"
        resumed = train_pair(side, tmp_path / "c", mixed=mixed, resume=checkpoint)
        assert_same(resumed.weights, reference.weights)


def test_gradients_of_other_wrappers_are_saved(tmp_path: pathlib.Path) -> None:
    """What the head's backward left in the backbone is there after resuming."""
    straight = train_pair(OURS, tmp_path / "a", apart=False)
    assert_same(
        train_pair(THEIRS, tmp_path / "b", apart=False).weights, straight.weights
    )
    for saved in (4, 5):
        checkpoint = tmp_path / "a" / f"iter_{saved}.pth"
        resumed = train_pair(OURS, tmp_path / "c", apart=False, resume=checkpoint)
        assert_same(resumed.weights, straight.weights)


# -- the message hub, the logger, and what changes when ------------------------------


@pytest.fixture
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let numbers on the CPU wait for their reader as those on an accelerator do."""
    monkeypatch.setattr(_deferred_history, "_is_on_host", lambda _: False)


@pytest.mark.usefixtures("_as_on_a_device")
def test_norm_is_read_when_a_line_is_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """MMEngine reads the norm on the host in every step, ours for a line of the log."""
    reads = {"float": 0, "fetch": 0}
    read, fetch = torch.Tensor.__float__, _deferred_history.fetch

    def count(self: Any) -> float:
        reads["float"] += 1
        return read(self)

    def count_fetches(waiting: Any) -> Any:
        reads["fetch"] += bool(waiting)
        return fetch(waiting)

    monkeypatch.setattr(torch.Tensor, "__float__", count)
    monkeypatch.setattr(_deferred_history, "fetch", count_fetches)
    reference = train(tmp_path / "a", _norm_config("OptimWrapper"))
    assert reads == {"float": 2 * BATCHES, "fetch": 0}
    got = train(tmp_path / "b", _norm_config(f"{OURS}OptimWrapper"))
    # There is a line every other iteration.
    assert reads == {"float": 2 * BATCHES, "fetch": BATCHES}
    assert got.norms == reference.norms
    assert got.log == reference.log


@pytest.mark.parametrize("waits", [False, True])
def test_history_of_deferred_numbers(
    waits: bool, request: pytest.FixtureRequest
) -> None:
    """Numbers that wait are those that were noted; statistics and copies see them."""
    if waits:
        request.getfixturevalue("_as_on_a_device")
    name = f"waits: {waits}"
    hub = mmengine.logging.MessageHub.get_instance(name)
    ours = fo.OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1))
    live = torch.tensor(1.0, requires_grad=True)
    for value in (live, torch.tensor([2.0]), 3.0, 4, torch.tensor(5)):
        ours._hub.update_scalar("train/x", value, count=2)
        with torch.no_grad():
            live += 1.0
    history = hub.get_scalar("train/x")
    assert isinstance(history, mmengine.logging.HistoryBuffer)
    assert history is ours.message_hub.get_scalar("train/x")
    assert history.data[0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert (history.mean(2), history.max(), history.current()) == (9 / 4, 5.0, 5.0)
    for copied in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert type(copied) is mmengine.logging.HistoryBuffer
        assert copied.data[0].tolist() == history.data[0].tolist()
        assert copied.data[1].tolist() == [2] * 5
    with pytest.raises(TypeError, match="must be a number or a tensor"):
        history.update("5")
    history.max_length = 3
    for value in range(2000):
        history.update(torch.tensor(float(value)))
    assert history.data[0].tolist() == [1997.0, 1998.0, 1999.0]
    # What a subclass asks for is MMEngine's own hub.
    assert ours.message_hub is hub
    ours.message_hub.update_info("epoch", 7)
    assert ours.message_hub.get_info("epoch") == 7
    assert copy.deepcopy(ours).message_hub.get_info("epoch") == 7


def test_the_hub_is_mmengines_own() -> None:
    """Whichever is current, in wrappers that were built before as well."""
    get = mmengine.logging.MessageHub.get_instance
    first = get("the first hub")
    wrapper = fo.OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1))
    assert wrapper.message_hub is first
    second = get("the second hub")
    assert wrapper.message_hub is second
    wrapper.message_hub = first  # Who sets one keeps it.
    assert wrapper.message_hub is first
    wrapper.clip_grad_kwargs = {"max_norm": 1.0}
    wrapper.optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    wrapper.step()
    assert first.get_scalar("train/grad_norm").current() == 1.0
    assert "train/grad_norm" not in second.log_scalars


def test_registers_once() -> None:
    """Registering again changes nothing."""
    logger = logging.getLogger("functional_optim")
    before = list(logger.handlers)
    register()
    assert logger.handlers == before


UNREGISTERED = """
import logging, sys, warnings
warnings.simplefilter("ignore")
import functional_optim as fo
from functional_optim.integrations.mmengine import register
assert "mmengine" not in sys.modules
sys.modules["mmengine"] = None
try:
    register()
except ImportError as error:
    assert "pip install" in str(error), error
else:
    raise AssertionError
del sys.modules["mmengine"]
import mmengine.optim
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
logger = logging.getLogger("functional_optim")
def state():
    return (
        issubclass(fo.OptimWrapper, mmengine.optim.OptimWrapper),
        issubclass(fo.OptimWrapperDict, mmengine.optim.BaseOptimWrapper),
        "functional_optim" in OPTIM_WRAPPERS.children,
        "fo" in OPTIMIZERS.children,
        not logger.propagate,
        logger.level == logging.INFO,
    )
assert not any(state()), state()
register()
assert all(state()), state()
"""


def test_changes_nothing_before() -> None:
    """MMEngine is as it was until `register` is called, and need not be there."""
    subprocess.run([sys.executable, "-c", UNREGISTERED], check=True)

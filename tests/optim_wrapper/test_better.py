"""Where wrappers do better than MMEngine's, one test each.

Every test here fails on MMEngine 0.10.7: `host_tests/test_better_than_mmengine.py` runs
them on its classes and looks at how. The README's table names them.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import functional_optim as fo
from functional_optim import (
    AmpOptimWrapper,
    OptimWrapper,
    OptimWrapperDict,
    build_optim_wrapper,
)


class Model(nn.Module):
    """A layer, a norm, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one number for each row."""
        return self.head(self.norm(self.first(x)).relu())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sgd(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})


def loss_of(model: nn.Module, *, numbers: float = 1.0) -> Tensor:
    return (model(torch.full((2, 3), numbers)) - 2).square().mean()


def same(first: Any, second: Any) -> bool:
    """Tell whether two models have the same weights, bit for bit."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------ the caller's things


def test_clip_grad_can_be_used_again() -> None:
    """Two wrappers take the same `clip_grad`, which does not change."""
    clip = {"type": "value", "clip_value": 0.5}
    wrappers = [OptimWrapper(sgd(Model()), clip_grad=clip) for _ in range(2)]
    assert [wrapper.grad_name for wrapper in wrappers] == ["grad_value"] * 2
    assert clip == {"type": "value", "clip_value": 0.5}


def test_loaded_dict_is_left_alone() -> None:
    """A state dict can be loaded twice."""
    model = Model()
    groups = [{"params": [p]} for p in model.parameters()]
    wrapper = OptimWrapper(torch.optim.SGD(groups, lr=0.1))
    saved = wrapper.state_dict()
    assert "base_param_settings" in saved
    for _ in range(2):
        before = set(saved)
        wrapper.load_state_dict(saved)
        assert set(saved) == before


def test_failed_load_changes_nothing() -> None:
    """A dict whose second wrapper does not fit loads nothing into the first."""
    gen, disc = Model(), Model()
    wrappers = OptimWrapperDict(
        gen=OptimWrapper(sgd(gen)), disc=OptimWrapper(sgd(disc))
    )
    saved = copy.deepcopy(wrappers.state_dict())
    saved["gen"]["param_groups"][0]["lr"] = 5.0
    saved["disc"]["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameter"):
        wrappers.load_state_dict(saved)
    assert wrappers.get_lr() == {"gen.lr": [0.1], "disc.lr": [0.1]}


def test_state_of_another_model_is_refused_when_loaded() -> None:
    """A momentum of another shape is refused by `load_state_dict`, not by a step."""
    wide, narrow = nn.Linear(3, 2), nn.Linear(2, 2)
    trained = OptimWrapper(sgd(wide, momentum=0.9))
    trained.update_params(wide(torch.ones(1, 3)).sum())
    wrapper = OptimWrapper(sgd(narrow, momentum=0.9))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        wrapper.load_state_dict(trained.state_dict())
    wrapper.update_params(narrow(torch.ones(1, 2)).sum())


# ------------------------------------------------------------------------------ windows


def test_training_may_go_on_past_the_end() -> None:
    """Micro-batches after `max_counts` make windows of their own."""
    model = Model()
    wrapper = OptimWrapper(sgd(model), accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 4)
    for _ in range(4):
        wrapper.update_params(loss_of(model))
    after_the_end = copy.deepcopy(model)
    for _ in range(2):
        wrapper.update_params(loss_of(model))
    assert wrapper.inner_count == 6
    assert not same(model, after_the_end)


def test_resume_within_a_window_is_exact() -> None:
    """A run that is saved and loaded between two micro-batches of a window goes on."""

    def batch(i: int) -> float:
        return 1.0 + i

    model = Model()
    wrapper = OptimWrapper(sgd(model), accumulative_counts=3)
    for i in range(4):
        wrapper.update_params(loss_of(model, numbers=batch(i)))
    saved = copy.deepcopy(wrapper.state_dict())
    resumed = Model()
    resumed.load_state_dict(model.state_dict())
    other = OptimWrapper(sgd(resumed), accumulative_counts=3)
    other.load_state_dict(saved)
    for i in range(4, 7):
        wrapper.update_params(loss_of(model, numbers=batch(i)))
        other.update_params(loss_of(resumed, numbers=batch(i)))
    assert same(model, resumed)


def test_counts_are_saved() -> None:
    """A fresh wrapper that loads a state knows how many micro-batches there were."""
    model = Model()
    wrapper = OptimWrapper(sgd(model))
    for _ in range(3):
        wrapper.update_params(loss_of(model))
    fresh = OptimWrapper(sgd(model))
    fresh.load_state_dict(wrapper.state_dict())
    assert fresh.inner_count == 3


# ---------------------------------------------------------------------- mixed precision


def test_mixed_precision_on_the_cpu() -> None:
    """The forward runs in float16 and the loss is scaled, also without a GPU."""
    model = Model()
    before = copy.deepcopy(model)
    wrapper = AmpOptimWrapper(64.0, optimizer=sgd(model), dtype="float16")
    with wrapper.optim_context(model):
        output = model(torch.ones(2, 3))
    assert output.dtype is torch.float16
    wrapper.update_params(output.float().mean())
    assert wrapper.state_dict()["loss_scaler"]["scale"] == 64.0
    assert not same(model, before)


def test_loss_scale_may_be_an_int() -> None:
    """`loss_scale=128` is a static scale, as 128.0 is."""
    model = Model()
    wrapper = AmpOptimWrapper(loss_scale=128, optimizer=sgd(model))
    wrapper.update_params(loss_of(model))
    assert wrapper.loss_scaler.get_scale() == 128.0


def test_bfloat16_needs_no_loss_scale() -> None:
    """An explicit bfloat16 with the default `loss_scale` saves no loss scaler."""
    model = Model()
    wrapper = AmpOptimWrapper(dtype="bfloat16", optimizer=sgd(model))
    with wrapper.optim_context(model):
        loss = loss_of(model)
    wrapper.update_params(loss)
    assert "loss_scaler" not in wrapper.state_dict()


def test_no_gradients_are_no_error() -> None:
    """A step in which no parameter of an optimizer has a gradient goes through."""
    model, idle = Model(), Model()
    before = copy.deepcopy(idle)
    wrapper = AmpOptimWrapper(optimizer=sgd(idle), loss_scale=4.0)
    wrapper.update_params(loss_of(model))
    assert same(idle, before)
    assert wrapper.inner_count == 1


def test_shared_scale_is_halved_once() -> None:
    """Two wrappers that share a scaler and both overflow halve the scale once."""
    gen, disc = Model(), Model()
    wrappers = [AmpOptimWrapper(optimizer=sgd(model)) for model in (gen, disc)]
    wrappers[1].loss_scaler = wrappers[0].loss_scaler
    for wrapper, model in zip(wrappers, (gen, disc), strict=True):
        wrapper.backward(loss_of(model) * float("inf"))
    for wrapper in wrappers:
        wrapper.step()
    assert wrappers[0].loss_scaler.get_scale() == 32768.0


def test_skipped_step_can_be_told() -> None:
    """`skipped` says whether the last step was skipped because of an infinity."""
    model = Model()
    wrapper = AmpOptimWrapper(optimizer=sgd(model), loss_scale=4.0)
    told = []
    for factor in (1.0, float("inf"), 1.0):
        wrapper.update_params(loss_of(model) * factor)
        told.append(wrapper.skipped)
    assert told == [False, True, False]


# ------------------------------------------------------------ between backward and step


def test_norm_stays_on_the_device() -> None:
    """A step that clips reads no number on the host; whoever asks for the norm does."""

    class Reads(TorchDispatchMode):
        """Counts how often a number is read on the host."""

        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
            """Count a call of what stands behind `item`."""
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model = Model()
    wrapper = OptimWrapper(sgd(model), clip_grad={"max_norm": 0.01})
    with Reads() as reads:
        for _ in range(3):
            wrapper.update_params(loss_of(model))
    assert reads.count == 0
    with reads:
        assert wrapper.message_hub.get_scalar("train/grad_norm").current() > 0.01
    assert reads.count == 1


def test_transform_stands_in_the_place_of_clip() -> None:
    """Any transform runs between backward and step; its state is saved."""
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    wrapper = OptimWrapper(
        sgd(model), transform=fo.chain(fo.ZeroNans(), fo.ClipByNorm(0.1))
    )
    wrapper.update_params(loss_of(model))
    optimizer = sgd(plain)
    loss_of(plain).backward()
    for param in plain.parameters():
        nn.utils.clip_grad_norm_([param], 0.1)
    optimizer.step()
    assert same(model, plain)
    assert "transform" in wrapper.state_dict()


@pytest.mark.parametrize(
    "clip", [{}, {"max_norm": 1.0, "norm": 2}, {"clip_value": 1.0}, {"max_norm": "one"}]
)
def test_wrong_clip_grad_is_refused_at_once(clip: dict[str, Any]) -> None:
    """A `clip_grad` that cannot work is refused when the wrapper is made."""
    with pytest.raises((ValueError, TypeError), match="If `clip_grad` is not None"):
        OptimWrapper(sgd(Model()), clip_grad=clip)


def test_mistakes_are_value_errors() -> None:
    """A user's mistake is a ValueError, and still the AssertionError it was before."""
    for expected in (ValueError, AssertionError):
        with pytest.raises(expected, match="at least 1, got 0"):
            OptimWrapper(sgd(Model()), accumulative_counts=0)


def test_step_returns_what_the_optimizer_returns() -> None:
    """`step(closure=...)` hands the loss on."""
    model = Model()
    wrapper = OptimWrapper(sgd(model))
    loss_of(model).backward()
    assert wrapper.step(closure=lambda: 1.5) == 1.5


def test_equal_groups_step_as_one() -> None:
    """Of 6 groups with 2 settings the optimizer sees 2, and the bits are the same."""
    seen: list[int] = []

    class Watched(torch.optim.SGD):
        """Notes how many groups there are in a step."""

        def step(self, *args: Any, **kwargs: Any) -> Any:
            """Note it."""
            seen.append(len(self.param_groups))
            return super().step(*args, **kwargs)

    Watched.__module__ = torch.optim.SGD.__module__  # As if it were torch's own.
    rules = {"norm_decay_mult": 0.0}
    cfg = {"type": Watched, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    first, second = Model(), Model()
    second.load_state_dict(first.state_dict())
    merged = build_optim_wrapper(first, {"optimizer": cfg, "paramwise_cfg": rules})
    apart = build_optim_wrapper(second, {"optimizer": cfg, "paramwise_cfg": rules})
    apart.merge_groups = False
    for _ in range(3):
        merged.update_params(loss_of(first))
        apart.update_params(loss_of(second))
    assert seen == [2, 6] * 3
    assert len(merged.optimizer.param_groups) == 6
    assert same(first, second)


# -------------------------------------------------------------- several, and built ones


def test_zero_grad_of_several_passes_arguments_on() -> None:
    """`OptimWrapperDict.zero_grad(set_to_none=False)` leaves zeros, not None."""
    gen, disc = Model(), Model()
    wrappers = OptimWrapperDict(
        gen=OptimWrapper(sgd(gen)), disc=OptimWrapper(sgd(disc))
    )
    (loss_of(gen) + loss_of(disc)).backward()
    wrappers.zero_grad(set_to_none=False)
    for param in (*gen.parameters(), *disc.parameters()):
        assert param.grad is not None
        assert not param.grad.any()


def built(rules: dict[str, Any], model: nn.Module | None = None) -> Any:
    optimizer = {"type": "SGD", "lr": 0.1, "weight_decay": 0.01}
    cfg = {"optimizer": optimizer, "paramwise_cfg": rules}
    return build_optim_wrapper(Model() if model is None else model, cfg)


def settings(wrapper: Any, key: str) -> list[float]:
    return [group[key] for group in wrapper.optimizer.param_groups]


def test_rules_for_all_parameters() -> None:
    """`lr_mult` and `decay_mult` multiply those of all parameters."""
    wrapper = built({"lr_mult": 0.5, "decay_mult": 0.0, "bias_lr_mult": 2.0})
    # Biases of linear layers are the second and the sixth.
    assert settings(wrapper, "lr") == pytest.approx([0.05, 0.1, 0.05, 0.05, 0.05, 0.1])
    assert settings(wrapper, "weight_decay") == [0.0] * 6


def test_rule_without_effect_warns(caplog: pytest.LogCaptureFixture) -> None:
    """A custom key that no name contains is named in a warning."""
    with caplog.at_level(logging.WARNING):
        built({"custom_keys": {"bakcbone": {"lr_mult": 0.1}}})
    assert "custom_keys['bakcbone'] matches no parameter" in caplog.text


def test_misspelt_rule_is_refused() -> None:
    """A rule that does not exist is refused, with the one that was meant."""
    with pytest.raises(ValueError, match="norm_decay_mult"):
        built({"norm_decay_mul": 0.0})


def test_rms_norm_is_a_norm() -> None:
    """`norm_decay_mult` reaches RMSNorm."""
    wrapper = built({"norm_decay_mult": 0.0}, nn.Sequential(nn.RMSNorm(2)))
    assert settings(wrapper, "weight_decay") == [0.0]


@pytest.mark.parametrize("rules", [{}, {"norm_decay_mult": 0.0}])
def test_child_called_module_is_no_parallel_wrapper(rules: dict[str, Any]) -> None:
    """A model with a child called `module` is trained as a whole."""
    model = nn.ModuleDict({"module": nn.LayerNorm(2), "head": nn.Linear(2, 1)})
    params = [
        p for g in built(rules, model).optimizer.param_groups for p in g["params"]
    ]
    assert {id(p) for p in params} == {id(p) for p in model.parameters()}


def test_rules_can_compose() -> None:
    """With `compose` rules multiply instead of replacing each other."""
    keys = {"head": {"lr_mult": 0.5}, "head.bias": {"lr_mult": 0.1}}
    rules = {"compose": True, "custom_keys": keys, "bias_lr_mult": 4.0}
    assert settings(built(rules), "lr")[-2:] == pytest.approx([0.05, 0.02])


def test_summary_shows_the_whole_assignment() -> None:
    """`summary()` prints each parameter with its settings and the rule behind them."""
    lines: list[str] = []
    built({"norm_decay_mult": 0.0}).summary(lines.append)
    (row,) = [line for line in lines[0].splitlines() if line.startswith("norm.weight")]
    assert row.split() == ["norm.weight", "(4,)", "0.1", "0.0", "norm_decay_mult"]

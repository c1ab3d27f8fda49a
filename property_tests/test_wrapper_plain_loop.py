"""A wrapper is the plain loop, bit for bit after every micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_loops import Batch, PlainLoop, Setup, batches, bits_of, overflowing, setups

import functional_optim as fo


def _trained(
    wrapper: Any, model: torch.nn.Module, setup: Setup, given: list[Batch]
) -> Iterator[Batch]:
    """Train as users do; yield each micro-batch after its update."""
    if setup.end > 0:
        wrapper.initialize_count_status(model, 0, setup.end)
    for batch in given:
        with wrapper.optim_context(model):
            loss = batch.loss(model, setup.loss, setup.dtype)
        wrapper.update_params(loss)
        yield batch


def _same_after(
    plain: PlainLoop,
    batch: Batch,
    wrapper: fo.OptimWrapper,
    model: torch.nn.Module,
    schedulers: list[Any],
) -> bool:
    """Let the plain loop follow, bit for bit; tell whether there was a step."""
    stepped = plain.update(batch)
    assert stepped == wrapper.should_update()
    if stepped:
        for scheduler in [*plain.schedulers, *schedulers]:
            scheduler.step()
    ours = bits_of(model, wrapper.optimizer)
    assert ours == bits_of(plain.model, plain.optimizer)
    return stepped


@given(setup=setups, micro_batches=st.lists(batches, min_size=1, max_size=9))
def test_wrapper_is_the_plain_loop(setup: Setup, micro_batches: list[Batch]) -> None:
    """Accumulation, clipping, remainders, groups and schedules change no bit."""
    plain, model = PlainLoop(setup), setup.model()
    optimizer = setup.optimizer_for(model)
    schedulers = setup.schedulers_for(optimizer)
    kept = None if setup.clip is None else dict(setup.clip)
    wrapper = fo.OptimWrapper(optimizer, setup.every, setup.clip)
    for batch in _trained(wrapper, model, setup, micro_batches):
        stepped = _same_after(plain, batch, wrapper, model, schedulers)
    if plain.norm is not None and stepped:
        logged = wrapper.message_hub.get_scalar("train/grad_norm").current()
        assert logged == float(plain.norm) or plain.norm.isnan()
    assert setup.clip == kept


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", None])
@given(
    setup=setups.filter(lambda setup: setup.dtype is torch.float32),
    scale=st.sampled_from([2.0, 1024.0, 65536.0]),
    interval=st.integers(1, 4),
    scales=st.sampled_from(["options", "static", "default"]),
    micro_batches=st.lists(overflowing, min_size=1, max_size=9),
)
def test_mixed_precision_is_the_plain_loop(
    dtype: str | None,
    setup: Setup,
    scale: float,
    interval: int,
    scales: str,
    micro_batches: list[Batch],
) -> None:
    """With overflows, and with a scale that falls and grows."""
    loss_scale: Any = {
        "options": {"init_scale": scale, "growth_interval": interval},
        "static": scale,
        "default": "dynamic",
    }[scales]
    scaler = None
    if scales == "options":
        scaler = torch.amp.GradScaler("cpu", **loss_scale)
    elif scales == "static":
        scaler = torch.amp.GradScaler("cpu", scale)
    elif dtype != "bfloat16":
        scaler = torch.amp.GradScaler("cpu")
    autocast = getattr(torch, dtype or "bfloat16")
    static = scale if scales == "static" else None
    plain = PlainLoop(setup, scaler, autocast, static)
    model = setup.model()
    optimizer = setup.optimizer_for(model)
    schedulers = setup.schedulers_for(optimizer)
    wrapper = fo.AmpOptimWrapper(
        loss_scale,
        dtype,
        optimizer=optimizer,
        accumulative_counts=setup.every,
        clip_grad=setup.clip,
    )
    for batch in _trained(wrapper, model, setup, micro_batches):
        _same_after(plain, batch, wrapper, model, schedulers)
        assert ("loss_scaler" in wrapper.state_dict()) == (scaler is not None)
        if scaler is not None:
            assert wrapper.loss_scaler.state_dict() == scaler.state_dict()


# Rules, and what they multiply learning rate and decay by, by name; else 1.
RULES: list[tuple[dict[str, Any], dict[str, tuple[float, float]]]] = [
    (
        {"bias_lr_mult": 2.0, "bias_decay_mult": 0.5},
        {"first.bias": (2.0, 0.5), "second.bias": (2.0, 0.5)},
    ),
    (
        {"custom_keys": {"first": {"lr_mult": 0.1}, "first.bias": {"decay_mult": 0.0}}},
        {"first.weight": (0.1, 1.0), "first.bias": (1.0, 0.0)},
    ),
    (
        {"lr_mult": 0.5, "flat_decay_mult": 0.0, "custom_keys": {"second.w": {}}},
        {
            "first.weight": (0.5, 1.0),
            "first.bias": (0.5, 0.0),
            "second.bias": (0.5, 0.0),
        },
    ),
]


@given(
    setup=setups,
    decay=st.floats(0.0, 0.5),
    rules=st.sampled_from(RULES),
    merge=st.booleans(),
    micro_batches=st.lists(batches, min_size=1, max_size=9),
)
def test_rules_from_a_config_are_groups_by_hand(
    setup: Setup,
    decay: float,
    rules: tuple[dict[str, Any], dict[str, tuple[float, float]]],
    merge: bool,
    micro_batches: list[Batch],
) -> None:
    """Each parameter has its own rate and decay; groups that are equal step as one."""
    (kind, options), (paramwise, multipliers) = setup.optimizer, rules
    options = {**options, "lr": setup.lr, "weight_decay": decay}
    plain, model = PlainLoop(setup), setup.model()
    groups = []
    for name, param in plain.model.named_parameters():
        lr, wd = multipliers.get(name, (1.0, 1.0))
        own = {"lr": setup.lr * lr, "weight_decay": decay * wd}
        groups.append({"params": [param], **own})
    plain.optimizer = kind(groups, **options)
    plain.schedulers = setup.schedulers_for(plain.optimizer)
    config = {
        "optimizer": {"type": kind.__name__, **options},
        "paramwise_cfg": paramwise,
        "accumulative_counts": setup.every,
        "clip_grad": setup.clip,
        "merge_groups": merge,
    }
    wrapper = fo.build_optim_wrapper(model, config)
    schedulers = setup.schedulers_for(wrapper.optimizer)
    for batch in _trained(wrapper, model, setup, micro_batches):
        _same_after(plain, batch, wrapper, model, schedulers)

"""What hooks, mocks and loops of others do to a wrapper."""

from __future__ import annotations

import io
import logging
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import nn

import functional_optim as fo

ADAMW = {"lr": 0.01, "betas": (0.9, 0.99)}


def saved_and_loaded(state: Any) -> Any:
    """Return what `torch.load(weights_only=True)` makes of a saved state."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("kind", ["AdamW", "fo.adamw"])
@pytest.mark.parametrize("wrapper_kind", ["OptimWrapper", "AmpOptimWrapper"])
def test_numbers_of_numpy_are_saved_as_pythons(kind: str, wrapper_kind: str) -> None:
    """A hook writes what `np.interp` returns; the checkpoint loads everywhere."""
    model = nn.Linear(1, 1)
    config: dict[str, Any] = {
        "type": wrapper_kind,
        "optimizer": {"type": kind, **ADAMW, "weight_decay": 0.1},
        "paramwise_cfg": {"bias_lr_mult": 2.0},
        "accumulative_counts": 2,
    }
    if wrapper_kind == "AmpOptimWrapper":
        config["loss_scale"] = {"init_scale": np.float64(8.0)}
    wrapper = fo.build_optim_wrapper(model, config)
    wrapper.initialize_count_status(model, np.int64(1), np.int64(9))
    for group in wrapper.param_groups:
        group["lr"] = np.interp(3, [0, 10], [0.0, 0.01])
        group["betas"] = (np.float64(0.8), 0.99)
    wrapper.update_params(model(torch.ones(1, 1)).sum())
    wrapper.update_params(model(torch.ones(1, 1)).sum())
    loaded = saved_and_loaded(wrapper.state_dict())
    assert type(loaded["param_groups"][0]["lr"]) is float
    wrapper.load_state_dict(loaded)
    assert wrapper.get_lr() == {"base_lr": [0.003], "lr": [0.003, 0.003]}
    assert wrapper.get_momentum() == {"momentum": [0.8, 0.8]}
    assert wrapper.inner_count == 3


def test_numbers_of_numpy_in_several_wrappers_are_saved_as_pythons() -> None:
    """The same in an `OptimWrapperDict`."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=np.float64(0.5))
    wrappers = fo.OptimWrapperDict(gen=fo.OptimWrapper(optimizer))
    loaded = saved_and_loaded(wrappers.state_dict())
    assert loaded["gen"]["param_groups"][0]["lr"] == 0.5


def test_a_mocked_optimizer_is_called() -> None:
    """As in MMEngine's own tests: its only group is empty."""
    optimizer = MagicMock(spec=torch.optim.Optimizer)
    optimizer.defaults, optimizer.param_groups = {}, [{}]
    wrapper = fo.OptimWrapper(optimizer, clip_grad={"max_norm": 1.0})
    wrapper.step(closure=None)
    optimizer.step.assert_called_with(closure=None)
    wrapper.zero_grad(set_to_none=True)
    optimizer.zero_grad.assert_called_with(set_to_none=True)
    wrapper.summary(lambda _: None)
    loss = MagicMock(spec=torch.Tensor)
    wrapper.backward(loss, retain_graph=True)
    loss.backward.assert_called_with(retain_graph=True)
    amp = fo.AmpOptimWrapper(optimizer=optimizer)
    amp.step()
    assert optimizer.step.call_count == 2


def test_counting_anew_in_each_iteration_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """GANs tell the counts before every step; each warning comes once a wrapper."""
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))

    def make() -> fo.OptimWrapper:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return fo.OptimWrapper(optimizer, accumulative_counts=2)

    with caplog.at_level(logging.WARNING, "functional_optim"):
        wrapper = make()
        for count in (0, 1, 3):
            wrapper.initialize_count_status(model, count, 4)
    told = [record.getMessage().split()[0] for record in caplog.records]
    assert told == ["Gradient", "Resumed"]
    with caplog.at_level(logging.WARNING, "functional_optim"):
        make().initialize_count_status(model, 0, 4)
    assert len(caplog.records) == 3

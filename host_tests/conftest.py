"""Hosts without a network: nothing here downloads, reports or asks a hub."""

from __future__ import annotations

import os
import pathlib
import socket
import sys
from typing import TYPE_CHECKING, Any

# Before any host is imported: they read these when they are.
os.environ.update(
    {
        "CUDA_VISIBLE_DEVICES": "",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parent))

torch.set_num_threads(1)
torch.use_deterministic_algorithms(mode=True)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family in {socket.AF_INET, socket.AF_INET6}:
            msg = f"a host wants to connect to {address}"
            raise AssertionError(msg)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Forget the precision that Accelerate keeps for the whole process."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()

"""A plugin of pytest: tests run on MMEngine's classes instead of ours."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

import torch

with warnings.catch_warnings():
    # What it imports says at once what will be gone in later versions.
    warnings.simplefilter("ignore")
    import mmengine.optim
    from mmengine.optim.optimizer import amp_optimizer_wrapper as amp

if TYPE_CHECKING:
    import pytest

NAMES = ("OptimWrapper", "AmpOptimWrapper", "OptimWrapperDict", "build_optim_wrapper")

# It refuses mixed precision on the CPU. Here it may, to show what comes after that.
amp.is_cuda_available = lambda: True
amp.GradScaler = functools.partial(torch.amp.GradScaler, "cpu")


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Put MMEngine's classes in the place of ours."""
    for module in {item.module for item in items}:
        for name in NAMES:
            setattr(module, name, getattr(mmengine.optim, name))

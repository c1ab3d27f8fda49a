"""Hypothesis profiles, in one place: HYPOTHESIS_PROFILE chooses dev, ci or thorough."""

import os
import pathlib
import sys

import torch
from hypothesis import HealthCheck, settings

# The laws and the table of cases are shared with tests/.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

SLOW = [HealthCheck.too_slow]
settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile(
    "ci",
    max_examples=50,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=SLOW,
)
settings.register_profile(
    "thorough", max_examples=2000, deadline=None, suppress_health_check=SLOW
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)

"""Hypothesis profiles, in one place: HYPOTHESIS_PROFILE chooses dev, ci or thorough."""

import os
import pathlib
import sys

import torch
from hypothesis import HealthCheck, Phase, settings

# The table of cases is shared with tests/.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

SLOW = [HealthCheck.too_slow]
settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=SLOW,
)
# For tests/mutate.py: what fails once is enough, and need not be made small.
settings.register_profile(
    "mutants",
    settings.get_profile("ci"),
    phases=[Phase.explicit, Phase.generate],
)
settings.register_profile(
    "thorough", max_examples=2000, deadline=None, suppress_health_check=SLOW
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)


def pytest_addoption(parser) -> None:
    """Add the option that writes docs/laws.md."""
    parser.addoption("--write-laws-table", action="store_true")


def pytest_sessionfinish(session, exitstatus: int) -> None:
    """Write the table if asked, and if every law held."""
    if (
        session.config.getoption("--write-laws-table", default=False)
        and exitstatus == 0
    ):
        import laws_table

        laws_table.write()

"""The README's code runs, block after block, as a reader would type it."""

from __future__ import annotations

import pathlib
import re
import textwrap

import pytest
import torch

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_every_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """All Python blocks run in order in one namespace."""
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)
    names: dict[str, object] = {
        "model": torch.nn.Sequential(*layers),
        "loss_fn": torch.nn.functional.mse_loss,
        "data": [(torch.randn(4, 8), torch.randn(4, 1)) for _ in range(12)],
    }
    for block in blocks:
        # No name of a file: torch.compile would look there for the source.
        exec(compile(block, "<README>", "exec"), names)
    printed = capsys.readouterr().out
    assert "gradient norm" in printed
    # The table in the text is the one that its code prints.
    table = printed[printed.index("stage  ") :].rstrip()
    assert textwrap.indent(table, "    ") in README.read_text()


def test_tests_that_are_named_exist() -> None:
    """Every test and file of tests that the README names is there."""
    text = README.read_text()
    files = re.findall(r"`(\w*tests/[\w/]+\.py)`", text)
    assert len(files) > 6
    for file in files:
        assert (README.parent / file).is_file(), file
    defined = (README.parent / "tests" / "optim_wrapper" / "test_better.py").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named == set(re.findall(r"^def (test_\w+)", defined, re.MULTILINE))


def test_no_figure_is_missing() -> None:
    """The table of speed holds measured numbers, and the picture exists."""
    text = README.read_text()
    assert not re.findall(r"(?:FUSED|PURE|TO)_[RS]", text)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (README.parent / picture).is_file()

"""The pages in docs/ say what the code does."""

from __future__ import annotations

import pathlib
import re
import sys
import types

import pytest

import functional_optim as fo
from functional_optim.testing import (
    BrokenLawError,
    NotEquivalentError,
    check_equivalent,
    check_transform,
)

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def test_tutorial_runs_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block runs in order, and the reports are those that are shown."""
    text = (DOCS / "write_a_transform.md").read_text()
    page = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", page)
    names = vars(page)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "<page>", "exec"), names)
    wrong = text[text.index("def plain") : text.index("check_equivalent(fo.chain")]
    exec(wrong.replace("0.9 *", "0.0 *"), names)
    rule = fo.chain(names["Signum"](), fo.ScaleByLearningRate(0.01))
    with pytest.raises(NotEquivalentError, match="is not plain: they part first after"):
        check_equivalent(rule, names["plain"])
    reports = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    for name, shown in zip(["InPlaceSignum", "ScaledSignum"], reports, strict=True):
        with pytest.raises(BrokenLawError) as broken:
            check_transform(names[name]())
        assert str(broken.value).startswith(shown.rstrip())


def test_links_lead_somewhere() -> None:
    """What a page links to is there."""
    pages = [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([\w./:-]+\.\w+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"

"""docs/laws.md: the table of transforms and laws, written from a run of the tests."""

from __future__ import annotations

import pathlib
import re

from functional_optim.testing import Law

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "laws.md"
HEAD = """# The laws

Every transform obeys them, and `check_transform` tries them on yours.
[Writing a transform](write_a_transform.md) shows how.

"""
EXPLANATION = """
## The library under its own laws

Each number says on how many examples the law held in the run that wrote this page
(`make laws`). Three are fixed, hypothesis draws the others, NaN, infinities,
subnormals and missing names included; `plain_data` and `compiled` run on the fixed
ones only, for each kind of hyperparameter. `-`: it has no derivative somewhere, so that
`differentiable` says nothing.

"""

_tried: dict[tuple[str, str], int] = {}
_statements: dict[str, str] = {}


def record(row: str, law: Law, examples: int, *, add: bool = False) -> None:
    """Note on how many examples, or on how many more, a law held for a row."""
    _tried[row, law.name] = examples + (_tried.get((row, law.name), 0) if add else 0)
    _statements[law.name] = law.statement


def write() -> None:
    """Write the page from what was recorded."""
    rows = list(dict.fromkeys(row for row, _ in _tried))
    laws = list(_statements)
    lines = [f"- **{name}**: {_statements[name]}" for name in laws]
    table = [f"| | {' | '.join(laws)} |", "|---" * (len(laws) + 1) + "|"]
    for row in rows:
        cells = [str(_tried[row, law] or "-") for law in laws]
        table.append(f"| `{row}` | {' | '.join(cells)} |")
    text = HEAD + "\n".join(lines) + "\n" + EXPLANATION + "\n".join(table) + "\n"
    PAGE.write_text(text)


def written() -> tuple[list[str], list[str]]:
    """Return the rows and columns that the page has."""
    text = PAGE.read_text()
    head = re.search(r"^\| \| (.*) \|$", text, re.MULTILINE)
    rows = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    return rows, head[1].split(" | ") if head else []

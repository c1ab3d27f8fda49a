"""docs/laws.md: the table of transforms and laws, written from a run of the tests."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from functional_optim.testing import Law, laws

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
ones only, for each kind of hyperparameter. `-`: it has kinks at
ordinary numbers, where no derivative can be compared.

"""

_tried: dict[tuple[str, str], int] = {}


def record(row: str, law: Law, examples: int, *, add: bool = False) -> None:
    """Note on how many examples, or on how many more, a law held for a row."""
    _tried[row, law.name] = examples + (_tried.get((row, law.name), 0) if add else 0)


def text(tried: dict[tuple[str, str], int], laws: Sequence[Law]) -> str:
    """Return the page."""
    rows = list(dict.fromkeys(row for row, _ in tried))
    lines = [f"- **{law.name}**: {law.statement}" for law in laws]
    names = [law.name for law in laws]
    table = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [str(tried[row, name] or "-") for name in names]
        table.append(f"| `{row}` | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n" + EXPLANATION + "\n".join(table) + "\n"


def write() -> None:
    """Write the page from what was recorded."""
    PAGE.write_text(text(_tried, laws.ALL))

"""The mutations that `python tests/mutate.py` tries fit the code as it is now."""

from __future__ import annotations

import pathlib

import mutations
import pytest
from mutations import MUTATIONS, Mutation


def test_every_line_is_read() -> None:
    """No line of the table is lost to a slip in its format."""
    lines = mutations.TABLE.read_text().splitlines()
    marked = [line for line in lines if line.startswith(("- ", "+ "))]
    read = [f"{m.old}\n{m.new}".count("\n") + 1 for m in MUTATIONS]
    assert sum(read) == len(marked)
    assert all(
        line.startswith(("#", "==")) for line in lines if line not in [*marked, ""]
    )
    assert len(MUTATIONS) == len(set(MUTATIONS)) >= 30


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_current(mutation: Mutation) -> None:
    """What it breaks stands once in its file, and what it makes of it compiles."""
    path = mutation.source()
    broken = mutation.applied(path.read_text())
    if path.suffix == ".py":
        compile(broken, str(path), "exec")


@pytest.mark.parametrize("room", ["transforms", "schedules", "optimizers"])
def test_every_formula_has_a_mutation(room: str) -> None:
    """A new transform, schedule or preset comes with a mutation that tests kill."""
    folder = mutations.ROOT / mutations.PACKAGE / room
    files = {f"{room}/{path.name}" for path in folder.glob("*.py")}
    broken = {mutation.file for mutation in MUTATIONS}
    assert files - {f"{room}/__init__.py"} <= broken


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 2", "exactly once in the file, found 0 times; bring mutations.txt up"),
        ("x = 1; x = 1", "found 2 times; .*: _a.py: x = 1 -> x = 3"),
    ],
)
def test_stale_mutations_are_refused(text: str, message: str) -> None:
    """A mutation that would break nothing, or something else, does not run."""
    with pytest.raises(ValueError, match=message):
        Mutation("_a.py", "x = 1", "x = 3").applied(text)


def test_every_test_is_tried_or_left_out() -> None:
    """What `mutate.py` runs and leaves out are files that exist."""
    import mutate

    for name in (*mutate.FIRST, *mutate.LAST, *mutate.LEFT_OUT):
        assert pathlib.Path(mutations.ROOT, name.partition("::")[0]).is_file()

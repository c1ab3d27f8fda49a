"""The mutations of mutations.txt: formulas that the tests must not let pass."""

from __future__ import annotations

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
TABLE = ROOT / "tests" / "mutations.txt"
PACKAGE = "functional_optim"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One formula and what it is broken into."""

    file: str
    """Path in the package."""
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old} -> {new}"

    def source(self, root: pathlib.Path = ROOT) -> pathlib.Path:
        """Return the file that it breaks, in a checkout or in a copy of one."""
        return root / PACKAGE / self.file

    def applied(self, text: str) -> str:
        """Return the broken text of the file.

        Raises:
            ValueError: the old text is not there exactly once, or is the new one.
        """
        times = text.count(self.old)
        if times != 1:
            msg = (
                f"the old text must stand exactly once in the file, found {times} "
                f"times; bring {TABLE.name} up to date: {self}"
            )
            raise ValueError(msg)
        if self.old == self.new:
            msg = f"the old and the new text are the same: {self}"
            raise ValueError(msg)
        return text.replace(self.old, self.new)


def read(table: str) -> list[Mutation]:
    """Read mutations in the format that the head of mutations.txt explains."""
    found = []
    for section in re.split(r"^== ", table, flags=re.MULTILINE)[1:]:
        file, _, body = section.partition("\n")
        for old, new in re.findall(
            r"((?:^- .*\n)+)((?:^\+ .*\n)+)", body, re.MULTILINE
        ):
            found.append(Mutation(file, _text(old), _text(new)))
    return found


def _text(lines: str) -> str:
    """Take the marks away."""
    return "\n".join(line[2:] for line in lines.splitlines())


MUTATIONS = read(TABLE.read_text())

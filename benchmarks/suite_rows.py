"""Rows of results, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from interleaved_timing import quartiles, ratio

Row = dict[str, Any]


def rows_of(times: dict[str, list[float]], base: str, free: str | None) -> list[Row]:
    """Return medians, quartiles, and median ratios by round.

    Args:
        times: Milliseconds by name and round.
        base: Whose time stands above in ratios.
        free: Who does all but what is compared; that is taken off in "beyond".
    """
    rows: list[Row] = []
    for name, values in times.items():
        row: Row = {"name": name, **quartiles(values)}
        row["base_over_this"] = ratio(times[base], values)
        if free is not None and name != free:
            beyond = _less(values, times[free])
            base_beyond = statistics.median(_less(times[base], times[free]))
            row["beyond_ms"] = statistics.median(beyond)
            row["base_over_this_beyond"] = base_beyond / row["beyond_ms"]
        rows.append(row)
    return rows


def _less(some: list[float], others: list[float]) -> list[float]:
    return [a - b for a, b in zip(some, others, strict=True)]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *map(list, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def times_table(rows: list[Row], base: str) -> str:
    """Return rows of times as a table in Markdown."""
    has_beyond = any("beyond_ms" in row for row in rows)
    head = ["", "ms", "quartiles", f"{base} / this"]
    head += ["ms beyond", f"{base} / this, beyond"] if has_beyond else []
    lines = []
    for row in rows:
        if "note" in row:
            lines.append([row["name"], row["note"], *[""] * (len(head) - 2)])
            continue
        cells = [row["name"], number(row["ms"])]
        cells.append(f"{number(row['q25'])} - {number(row['q75'])}")
        cells.append(f"{row['base_over_this']:.2f}")
        if "beyond_ms" in row:
            cells.append(number(row["beyond_ms"]))
            cells.append(f"{row['base_over_this_beyond']:.2f}")
        lines.append(cells + [""] * (len(head) - len(cells)))
    return table(head, lines)


def number(value: float) -> str:
    """Return a number with three digits or more."""
    magnitude = abs(value)
    digits = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2
    return f"{value:.{digits}f}"

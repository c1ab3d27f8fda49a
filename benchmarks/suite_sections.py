"""The sections of the suite: what stands in front of their results, and the tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from suite_contestants import FREE, FUSED
from suite_rows import number, table, times_table


class Section(NamedTuple):
    """A part of the suite.

    Attributes:
        title: Its heading.
        about: What is measured.
        table: Returns a result as Markdown.
    """

    title: str
    about: str
    table: Callable[[dict[str, Any]], str]


def _sized(case: dict[str, Any]) -> str:
    size = f"{case['tensors']} tensors, {case['elements']:,} elements"
    return f"**{case['title']}** ({size})"


def step_table(case: dict[str, Any]) -> str:
    """Return a case of the step as Markdown."""
    parts = [_sized(case), times_table(case["rows"], FUSED)]
    if found := case.get("bandwidth"):
        parts += _floors(found)
    counts = {name: n for name, n in case["syncs"].items() if n is not None}
    if counts:
        told = ", ".join(f"{name} {n}" for name, n in counts.items())
        parts.append(f"Waits for the GPU in a step: {told}.")
    return "\n\n".join(parts)


def _floors(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            f"floor by the rate of {one['by']}, {one['gb_per_s']:.1f} GB/s",
            number(one["floor_ms"]),
            *(f"{ratio:.2f}" for ratio in one["step_over_floor"].values()),
        ]
        for one in found
    ]
    names = [f"{name} / floor" for name in found[0]["step_over_floor"]]
    about = (
        f"A step moves at least {found[0]['words']} words an element. How long that "
        "takes at rates of the same rounds, two words an element counted; a copy may "
        "move three, as what it overwrites is fetched first, so below 1 is possible:"
    )
    return [about, table(["", "ms", *names], rows)]


def end_to_end_table(case: dict[str, Any]) -> str:
    """Return a training as Markdown."""
    return f"{_sized(case)}\n\n{times_table(case['rows'], FUSED)}"


def first_step_table(case: dict[str, Any]) -> str:
    """Return first steps as Markdown."""
    rows = []
    for state in ("empty", "warm"):
        found = case[state]
        seconds, then = f"{found['first_s']:.2f}", number(found["second_ms"])
        rows.append([f"{state} cache", seconds, then])
    text = f"**{case['model']}, {case['variant']}**\n\n"
    text += table(["", "first step, s", "second step, ms"], rows)
    if counts := case.get("schedule"):
        text += (
            f"\n\n{counts['steps']} steps with a rate that falls to "
            f"{counts['last_rate']:g}: {counts['compiled_in_first']} graphs compiled "
            f"in the first step, {counts['compiled_after']} after it."
        )
    return text


def memory_table(case: dict[str, Any]) -> str:
    """Return memory as Markdown."""
    rows = [
        [
            row["name"],
            f"{row['extra_mib']:.2f}",
            f"{row['extra_percent']:.1f} %",
            f"{row['held_mib']:.2f}",
            f"{row['held_percent']:.1f} %",
        ]
        for row in case["rows"]
    ]
    head = ["", "extra MiB", "of parameters", "held MiB", "of parameters"]
    title = f"**{case['title']}** (parameters of {case['mib']:.1f} MiB)"
    return f"{title}\n\n{table(head, rows)}"


def accuracy_table(case: dict[str, Any]) -> str:
    """Return norms as Markdown."""
    rows = [
        [row["name"], f"{row['norm']:.9g}", f"{row['relative_error']:+.1e}"]
        for row in case["rows"]
    ]
    title = f"**{case['title']}** ({case['elements']:,} elements)"
    return f"{title}\n\n{table(['', 'norm', 'relative error'], rows)}"


SECTIONS = {
    "step": Section(
        "A step",
        "Gradients are set to None, a backward that costs little makes new ones, then "
        "the step is timed: clip and update. Contestants take turns in random order; "
        f"the ratio is the median over rounds of ({FUSED} / this), so higher is "
        "better. torch.compile, optax and HeavyBall run in processes of their own, "
        "each in turns with a torch fused there, to which their ratio is. Before "
        "anything is timed all take three steps and must agree. With accumulation the "
        "four backwards are part of the time (torch sums in `.grad`, and divides the "
        'loss by four); "beyond" is what goes beyond the four backwards alone '
        f'("{FREE}").',
        step_table,
    ),
    "end_to_end": Section(
        "End to end",
        "zero_grad(set_to_none=True), forward, backward, clip and AdamW, all timed. "
        f'"{FREE}" leaves out the last two: no optimizer can be faster. "Beyond" is '
        "what goes beyond that.",
        end_to_end_table,
    ),
    "first_step": Section(
        "The first step",
        "Building the optimizer and taking the first step, clip and AdamW, in a fresh "
        "process: with an empty cache of the compiler, and in another process with the "
        "cache that the first one left. Importing torch and this library is not in it, "
        "importing the compiler is.",
        first_step_table,
    ),
    "memory": Section(
        "Memory",
        '"Extra" is what one step allocates at its peak. "Held" is what building the '
        "optimizer and its first step allocate for good beyond AdamW's two moments.",
        memory_table,
    ),
    "accuracy": Section(
        "Accuracy of the global norm",
        "What clipping takes for the norm of a float32 gradient, against float64.",
        accuracy_table,
    ),
}

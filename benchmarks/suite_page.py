"""Write docs/benchmarks.md and its plot from what the suite measured.

python benchmarks/suite_page.py [--results benchmarks/results] [--docs docs]
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from suite_contestants import FUSED
from suite_sections import SECTIONS, Section

PAGE, PLOT = "benchmarks.md", "benchmarks.png"
LIMITS = pathlib.Path(__file__).with_name("limits.md")
"""What the figures do not say by themselves, written by hand."""
RETIRED = ["ours, flat", "ours, compiled, flat"]
"""Measured with `layout="flat"`, which is gone."""
OURS, OTHERS, BASE = "#1f6fb4", "#b8b8b8", "#555555"
ABOUT = (
    "Made by `make bench` (`benchmarks/suite.py`, then `benchmarks/suite_page.py`) "
    "from the JSON in `benchmarks/results/`; do not edit."
)
ABSENT = """\
- Pure functions (ours, TorchOpt) take no part on GPT-2, which would take too much
  memory, and torch.compile none on ViT-B/16 and GPT-2.
- Other libraries take part in clip + AdamW in float32.
- HeavyBall's AdamW divides by the larger of sqrt(v) and eps where torch takes the sum.
  It must agree within 2 % of the way, others within 0.02 %."""


def page(found: dict[str, dict[str, Any]]) -> str:
    """Return the page."""
    parts = ["# Benchmarks", ABOUT]
    if "step" in found:
        parts.append(f"![Speed of a step in relation to {FUSED}]({PLOT})")
    for name, result in found.items():
        section = SECTIONS[name]
        parts += [f"## {section.title}", section.about, conditions(name, result)]
        if name == "step":
            parts.append(ABSENT)
        parts += tables(section, result)
    parts.append(LIMITS.read_text().rstrip())
    return "\n\n".join(parts) + "\n"


def tables(section: Section, result: dict[str, Any]) -> list[str]:
    """Return the tables of a section."""
    return [section.table(case) for case in result["cases"]]


def conditions(name: str, result: dict[str, Any]) -> str:
    """Return by what command, where, and on what load something was measured."""
    versions = ", ".join(
        f"{library} {version}"
        for library, version in result["versions"].items()
        if version is not None
    )
    load = ""
    if "load" in result:
        before, after = result["load"], result["load_after"]
        load = f", load {before:.1f} before and {after:.1f} after"
    text = (
        f"`python benchmarks/suite.py --only {name} --rounds {result['rounds']} "
        f"--threads {result['threads']}` on {result['device']} ({result['cpus']} CPUs"
        f"{load}), Python {result['python']}, torch {result['torch']}, {versions}."
    )
    return f"{text} {result['digits']}" if "digits" in result else text


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draw the ratios of clip and AdamW, model by model."""
    cases = [case for case in result["cases"] if case["is_main"]]
    if not cases:
        return
    mpl.use("Agg")
    figure, all_axes = plt.subplots(
        1, len(cases), figsize=(3.6 * len(cases) + 1.4, 4.2), sharey=True, squeeze=False
    )
    names = list(dict.fromkeys(row["name"] for case in cases for row in case["rows"]))
    for case, axes in zip(cases, all_axes[0], strict=True):
        _bars(axes, case, names)
    all_axes[0][0].set_yticks(range(len(names)), names)
    all_axes[0][0].invert_yaxis()
    figure.suptitle(
        f"Clip + AdamW, float32: speed in relation to {FUSED} (higher is better)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axes: Axes, case: dict[str, Any], names: list[str]) -> None:
    rows = {row["name"]: row for row in case["rows"]}
    ratios = [rows.get(name, {}).get("base_over_this", 0.0) for name in names]
    colors = [OURS if name.startswith("ours") else OTHERS for name in names]
    axes.barh(range(len(names)), ratios, color=colors)
    axes.axvline(1.0, color=BASE, linewidth=1.0, linestyle="--")
    for place, (name, value) in enumerate(zip(names, ratios, strict=True)):
        label = f"{value:.2f}" if value else _short(rows.get(name, {}).get("note"))
        axes.text(value, place, f" {label}", va="center", fontsize=9)
    axes.set_xlim(0, 1.25 * max(*ratios, 1.0))
    axes.set_title(case["title"].split(",")[0])
    axes.spines[["top", "right"]].set_visible(False)


def _without_retired(result: Any) -> Any:
    """Return a result without the contestants that exist no more."""
    if isinstance(result, dict):
        kept = {key: _without_retired(value) for key, value in result.items()}
        return {key: value for key, value in kept.items() if key not in RETIRED}
    if isinstance(result, list):
        names = [
            r.get("name", r.get("variant")) if isinstance(r, dict) else r
            for r in result
        ]
        pairs = zip(result, names, strict=True)
        return [_without_retired(r) for r, name in pairs if name not in RETIRED]
    return result


def _short(note: str | None) -> str:
    return "not run" if note is None else note.split(":")[0]


def main() -> None:
    """Read the JSON and write page and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = pathlib.Path(__file__).parent
    parser.add_argument("--results", type=pathlib.Path, default=here / "results")
    parser.add_argument("--docs", type=pathlib.Path, default=here.parent / "docs")
    options = parser.parse_args()
    found = {
        name: _without_retired(json.loads(path.read_text()))
        for name in SECTIONS
        if (path := options.results / f"suite_{name}.json").exists()
    }
    if "step" in found:
        plot(found["step"], options.docs / PLOT)
    (options.docs / PAGE).write_text(page(found))
    print(f"written to {options.docs / PAGE}")


if __name__ == "__main__":
    main()

"""Run the benchmark suite: what a step costs, here and elsewhere.

    python benchmarks/suite.py [--rounds 30] [--only step memory] [--shapes small gpt2]
        [--out benchmarks/results]
    python benchmarks/suite_page.py

step        a step alone, on gradients fresh from a backward, and its memory traffic
end_to_end  whole training steps of real models
first_step  the first step with compile=True, and what is compiled after it
memory      what a step allocates
accuracy    the global norm against float64

Each section is written to `suite_SECTION.json`; the second command makes the page
docs/benchmarks.md and its plot from these. Runs on the GPU if there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import suite_accuracy
import suite_end_to_end
import suite_first_step
import suite_memory
import suite_step
import torch
from interleaved_timing import argument_parser, write_json
from suite_device import settings
from suite_sections import SECTIONS


def runs(
    shapes: list[str], rounds: int, threads: int
) -> dict[str, Callable[[], Iterable[dict[str, Any]]]]:
    """Return what measures each section."""
    return {
        "step": functools.partial(suite_step.results, shapes, rounds, threads),
        "end_to_end": functools.partial(suite_end_to_end.results, shapes, rounds),
        "first_step": functools.partial(suite_first_step.results, shapes, threads),
        "memory": functools.partial(suite_memory.results, shapes),
        "accuracy": suite_accuracy.results,
    }


def check_compilations(cases: list[dict[str, Any]]) -> None:
    """Refuse code that is made anew while numbers change.

    Raises:
        RuntimeError: something was compiled after the first step.
    """
    for case in cases:
        if "schedule" in case and case["schedule"]["compiled_after"]:
            msg = (
                f"{case['variant']} compiled {case['schedule']['compiled_after']} "
                "graphs after the first step; there must be none"
            )
            raise RuntimeError(msg)


def main() -> None:
    """Measure, print the tables, and write them as JSON if asked to."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    models = list(suite_step.MODELS)
    parser.add_argument("--shapes", nargs="+", choices=models, default=models)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.only:
        result = settings(options.rounds)
        cases: list[dict[str, Any]] = []
        for case in runs(options.shapes, options.rounds, options.threads)[name]():
            cases.append(case)
            print(f"\n{SECTIONS[name].table(case)}", flush=True)
        result["cases"] = cases
        result["load_after"] = settings(0)["load"]
        write_json(result, options.out, f"suite_{name}")
        check_compilations(cases)


if __name__ == "__main__":
    main()

"""Time contestants round by round in one process, so that noise hits all of them."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pathlib
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

import torch

Step: TypeAlias = Callable[[], object]
T = TypeVar("T")


def timed(step: Step, repeats: int = 1) -> float:
    """Return the milliseconds one step takes, as the mean of some in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return 1e3 * (time.perf_counter() - start) / repeats


def page_faults(step: Step) -> float:
    """Return how many pages the system has to supply while one step runs.

    Each costs time, and whether freed memory is kept or given back depends on what else
    lies on the heap: a step that allocates is fast in one process and slow in another.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def keep_heap() -> None:
    """Let glibc keep what is freed, where it can, and not give it back."""
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL("libc.so.6")
    if not (
        libc.mallopt(trim_threshold, 2**31 - 1) and libc.mallopt(mmap_threshold, 2**25)
    ):
        msg = "mallopt refused the thresholds; run without --keep-heap"
        raise RuntimeError(msg)


def interleaved(
    steps: Mapping[str, Step], rounds: int, measured: Callable[[Step], float] = timed
) -> dict[str, list[float]]:
    """Run all steps in turns and return what is measured, by round."""
    return in_turns(steps, rounds, measured)


def in_turns(
    contestants: Mapping[str, T], rounds: int, measured: Callable[[T], float]
) -> dict[str, list[float]]:
    """Measure all contestants in turns and return what is measured, by round."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for index in range(rounds):
        # In random order: nobody always inherits the same cache.
        for name in random.Random(index).sample(names, len(names)):
            found[name].append(measured(contestants[name]))
    return found


def quartiles(times: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of milliseconds."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "q25": low, "q75": high}


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median of the ratios by round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=30, help="at least 2")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON result")
    return parser


def settings(rounds: int) -> dict[str, object]:
    """Return what the times depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "rounds": rounds,
    }


def write_json(
    results: Mapping[str, object], folder: pathlib.Path | None, name: str
) -> None:
    """Write results to `folder/name.json`, if there is a folder to write to."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(f"\nwritten to {path}")

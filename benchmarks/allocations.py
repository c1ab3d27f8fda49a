"""Count the memory that a call allocates, as torch's profiler sees it."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

_CPU = 0


class Allocations(NamedTuple):
    """Bytes that a call allocated on the CPU.

    Attributes:
        peak: The most that was there at once, beyond what was there before.
        kept: What was still there at the end.
    """

    peak: int
    kept: int


def allocations(call: Callable[[], object]) -> Allocations:
    """Run a call under the profiler and count.

    The profiler does not see when memory from before the call is freed, so whoever
    replaces old memory by new has the new counted in full.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = [event for event in events if event.get("name") == "[memory]"]
    sizes = [
        int(event["args"]["Bytes"])
        for event in sorted(found, key=lambda event: float(event["ts"]))
        if event["args"]["Device Type"] == _CPU
    ]
    peak = total = 0
    for size in sizes:
        total += size
        peak = max(peak, total)
    return Allocations(peak, total)

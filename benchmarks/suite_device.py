"""What the suite asks of the device: time, memory, waits, a name. The GPU if any."""

from __future__ import annotations

import importlib.metadata
import pathlib
import warnings
from typing import Any

import interleaved_timing
import torch
from allocations import allocations
from interleaved_timing import Step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIB = 2**20
LIBRARIES = "optax", "jax", "heavyball", "torchopt"


def timed(step: Step) -> float:
    """Return the milliseconds that a step takes until the device is done with it."""
    if DEVICE.type == "cpu":
        return interleaved_timing.timed(step)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def extra_bytes(step: Step) -> int:
    """Return how much more memory is there at the peak of a step than before it."""
    if DEVICE.type == "cpu":
        return allocations(step).peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def kept_bytes(call: Step) -> int:
    """Return how much memory a call allocates for good."""
    if DEVICE.type == "cpu":
        return allocations(call).kept
    before = torch.cuda.memory_allocated()
    call()
    return int(torch.cuda.memory_allocated() - before)


def syncs(step: Step) -> int | None:
    """Return how often a step waits for the GPU; None on the CPU."""
    if DEVICE.type == "cpu":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def settings(rounds: int) -> dict[str, Any]:
    """Return what results depend on: machine and versions, too."""
    return {
        **interleaved_timing.settings(rounds),
        "device": _device_name(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else "CPU"


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None

"""Functions run in several processes that talk by gloo."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function: Callable[[int], Any], size: int = 2) -> list[Any]:
    """Run a function of the rank in `size` processes, and return what each returned.

    Args:
        function: A function at the top of a module.
        size: Number of processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (function, size, folder), nprocs=size, join=True)
        files = [pathlib.Path(folder, f"{rank}.pt") for rank in range(size)]
        return [torch.load(file, weights_only=False) for file in files]


def _process(rank: int, function: Callable[[int], Any], size: int, folder: str) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size
    )
    try:
        torch.save(function(rank), f"{folder}/{rank}.pt")
        dist.barrier()  # Nobody leaves while another still talks.
    finally:
        dist.destroy_process_group()
    # Groups of a device mesh leave threads behind, which now and then abort an exit.
    os._exit(0)

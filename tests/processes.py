"""Real processes for the tests: a function of the test file run on each rank of a gloo group, its results collected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(fn: Callable[[], Any], size: int, folder: Path) -> list[Any]:
    """``fn()`` on every rank of a gloo group of ``size`` processes; what they returned (tensors and the like), by rank.

    They find each other through a file in ``folder``: no port that another test may hold.
    """
    mp.start_processes(_member, (fn, size, str(folder)), size, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _member(rank: int, fn: Callable[[], Any], size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        torch.save(fn(), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()

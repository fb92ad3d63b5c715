"""The static table of tiles: for each architecture and class of problem, what a first call runs without any tuning.

A tile is (BLOCK_M, BLOCK_N, BLOCK_K) of the implicit GEMM, with its warps and pipeline stages. Choosing one looks at
sizes and dtype only, so results do not depend on the machine's load. Shipped configurations are those in ``TABLE``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One configuration of a conv kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8  # tiles of gemm_m that share a column of gemm_n before the next: L2 reuse


class Machine(NamedTuple):
    """Tiles of one architecture: by op, by the bytes of an element, by the width of gemm_n; and its multiprocessors."""

    gemm: dict[tuple[int, int], Tile]  # (element bytes, largest gemm_n or 0 for any) -> tile of fprop
    dgrad: dict[tuple[int, int], Tile]
    wgrad: dict[tuple[int, int], Tile]  # gemm_n here: columns (taps * channels) of the weight
    programs: int  # what fills the GPU: wgrad splits its sum until there are as many


_SM80 = Machine(
    gemm={
        (2, 32): Tile(128, 32, 32, 4, 4),
        (2, 64): Tile(128, 64, 32, 4, 4),
        (2, 0): Tile(128, 128, 32, 8, 3),
        (4, 32): Tile(64, 32, 32, 4, 3),
        (4, 0): Tile(64, 64, 32, 4, 3),
    },
    dgrad={
        (2, 32): Tile(128, 32, 32, 4, 3),
        (2, 64): Tile(128, 64, 32, 4, 3),
        (2, 0): Tile(128, 128, 32, 8, 3),
        (4, 32): Tile(64, 32, 32, 4, 2),
        (4, 0): Tile(64, 64, 32, 4, 2),
    },
    wgrad={
        (2, 32): Tile(64, 32, 64, 4, 3),
        (2, 0): Tile(64, 64, 64, 4, 3),
        (4, 32): Tile(64, 32, 32, 4, 2),
        (4, 0): Tile(64, 64, 32, 4, 2),
    },
    programs=432,
)

TABLE: dict[str, Machine] = {
    "sm80": _SM80,
    "sm86": _SM80,
    "sm90": _SM80,
    "sm100": _SM80,
    # Small tiles, so that tests on small tensors have several of them and ragged ones.
    "interpreter": Machine(
        gemm={(2, 0): Tile(32, 32, 16, 4, 1, 2), (4, 0): Tile(32, 16, 16, 4, 1, 2)},
        dgrad={(2, 0): Tile(32, 16, 16, 4, 1, 2), (4, 0): Tile(32, 32, 16, 4, 1, 2)},
        wgrad={(2, 0): Tile(16, 32, 32, 4, 1, 2), (4, 0): Tile(32, 16, 32, 4, 1, 2)},
        programs=8,
    ),
}


def machine_name(major: int, minor: int) -> str:
    """The row of ``TABLE`` for a compute capability; an unknown one gets that of the nearest older."""
    if major >= 10:
        return "sm100"
    if major == 9:
        return "sm90"
    return "sm80" if (major, minor) <= (8, 0) else "sm86"


#: The machine whose table serves meta tensors.
_planned = "sm90"


@contextmanager
def planning(name: str) -> Iterator[None]:
    """Within this context meta tensors are treated as those of the machine ``name``."""
    global _planned
    before, _planned = _planned, name
    try:
        yield
    finally:
        _planned = before


@functools.cache
def _name_of_gpu(index: int) -> str:
    return machine_name(*torch.cuda.get_device_capability(index))


def machine(device: torch.device) -> Machine:
    """The table of the tensors' device; on the CPU that of the interpreter, on none that of ``planning``."""
    if device.type == "meta":
        return TABLE[_planned]
    if device.type != "cuda":
        return TABLE["interpreter"]
    return TABLE[_name_of_gpu(torch.cuda.current_device() if device.index is None else device.index)]


def choose(table: dict[tuple[int, int], Tile], element_size: int, gemm_n: int) -> Tile:
    """The first tile of the dtype whose width holds ``gemm_n``, or the widest."""
    widths = sorted(width for size, width in table if size == element_size and width >= gemm_n)
    return table[element_size, widths[0] if widths else 0]

"""The static table of tiles: for each architecture and class of problem, what a first call runs without any tuning.

A tile is (BLOCK_M, BLOCK_N, BLOCK_K) of the implicit GEMM, with its warps and pipeline stages. Choosing one looks at
sizes and dtype only, so results do not depend on the machine's load. Shipped configurations are those in ``TABLE``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
    descriptors: bool = False  # tensor descriptors where ``conv_descriptor.serves`` a call, else pointers as ever
    programs: int = 0  # with descriptors: for each multiprocessor, taking tiles in turn (persistent); 0: one a tile

    def __str__(self) -> str:
        size = f"{self.block_m}x{self.block_n}x{self.block_k}, {self.num_warps} warps, {self.num_stages} stages"
        access = ", descriptors" if self.descriptors else ""
        return size + access + (f", {self.programs} persistent" if self.programs else "")


#: The width under which a table holds the tile for operands that are read number by number: channels that are no
#: multiple of 16, or taps and channels as one axis. Their addresses cost registers, so the tile is small.
GATHER = -1

#: (bytes of an element, largest width of gemm_n, 0 for any, or GATHER) -> tile
Table = dict[tuple[int, int], Tile]


#: The tables' programs for each multiprocessor.
_PROGRAMS = 4


class Machine(NamedTuple):
    """The tables of one architecture, how many programs fill it, and its tiles with descriptors."""

    fprop: Table
    dgrad: Table
    wgrad: Table
    programs: int  # wgrad splits its sum over pixels until there are as many
    descriptors: tuple[Tile, ...] = ()  # candidates, for half dtypes; none where the hardware has no such copies
    swaps_boxes: bool = False  # Triton has wgmma read boxes from shared memory as second operand only: weights first


def _described(tile: Tile, *programs: int) -> tuple[Tile, ...]:
    """``tile`` with descriptors, for each number of programs."""
    return tuple(tile._replace(descriptors=True, programs=count) for count in programs)


_GATHER_FPROP: Table = {(2, GATHER): Tile(64, 64, 32, 4, 2), (4, GATHER): Tile(64, 32, 32, 4, 2)}
_GATHER_DGRAD: Table = {(2, GATHER): Tile(64, 32, 32, 4, 2), (4, GATHER): Tile(32, 32, 32, 4, 2)}
_GATHER_WGRAD: Table = {(2, GATHER): Tile(64, 64, 32, 4, 2), (4, GATHER): Tile(32, 64, 32, 4, 2)}

_FLOAT32_FPROP: Table = {(4, 32): Tile(64, 32, 32, 4, 3), (4, 0): Tile(64, 64, 32, 4, 3)}
_FLOAT32_DGRAD: Table = {(4, 0): Tile(64, 64, 32, 4, 3)}  # narrower ones spill a few registers
_FLOAT32_WGRAD: Table = {(4, 32): Tile(64, 32, 32, 4, 2), (4, 0): Tile(64, 64, 32, 4, 2)}

_FPROP: Table = _GATHER_FPROP | _FLOAT32_FPROP
_DGRAD: Table = _GATHER_DGRAD | _FLOAT32_DGRAD
_WGRAD: Table = _GATHER_WGRAD | _FLOAT32_WGRAD

_SM80 = Machine(
    fprop={
        (2, 32): Tile(64, 32, 32, 4, 4),
        (2, 64): Tile(128, 64, 32, 4, 4),
        (2, 0): Tile(128, 128, 32, 8, 3),
        **_FPROP,
    },
    dgrad={
        (2, 32): Tile(64, 32, 32, 4, 3),
        (2, 64): Tile(128, 64, 32, 4, 3),
        (2, 0): Tile(128, 128, 32, 8, 3),
        **_DGRAD,
    },
    wgrad={(2, 32): Tile(64, 32, 64, 4, 3), (2, 0): Tile(64, 64, 32, 4, 4), **_WGRAD},
    programs=432,
)

#: Measured on an H200 (docs/gpu.md): 64 channels deep, as wgmma and its swizzle like best.
_SM90 = Machine(
    fprop={
        **_FPROP,
        (2, 32): Tile(128, 32, 32, 4, 4),
        (2, 64): Tile(128, 64, 64, 4, 3),
        (2, 0): Tile(128, 128, 64, 8, 3),
    },
    dgrad={
        **_DGRAD,
        (2, 32): Tile(128, 32, 32, 4, 3),
        (2, 0): Tile(128, 64, 32, 4, 4),
    },
    wgrad={
        **_WGRAD,
        (2, 32): Tile(64, 32, 64, 4, 3),
        (2, 64): Tile(64, 64, 64, 4, 3),
        (2, 0): Tile(128, 128, 64, 8, 3),
    },
    programs=528,
    descriptors=(
        *_described(Tile(64, 64, 64, 4, 4), 0),
        *_described(Tile(128, 64, 64, 4, 3), 0, 2),
        *_described(Tile(64, 128, 64, 4, 3), 0, 2),
        *_described(Tile(128, 128, 64, 8, 3), 0, 1),
        *_described(Tile(128, 256, 64, 8, 3), 0),
        *_described(Tile(256, 128, 64, 8, 3), 0),
    ),
    swaps_boxes=True,
)

#: As sm_90, with smaller tiles or fewer stages where the compiler would spill.
_SM100 = Machine(
    fprop={**_SM90.fprop, (2, 32): Tile(128, 32, 32, 4, 3)},
    dgrad={
        (2, 32): Tile(128, 32, 32, 4, 3),
        (2, 64): Tile(64, 64, 32, 4, 3),
        (2, 0): Tile(128, 128, 32, 8, 2),
        **_DGRAD,
    },
    wgrad=_SM90.wgrad,
    programs=592,
    descriptors=_SM90.descriptors[:-2],
)

TABLE: dict[str, Machine] = {
    "sm80": _SM80,
    # 99 KiB of shared memory for a block, and mma.sync: the tiles of sm_80, which take 64 KiB at most, fit these too.
    "sm86": _SM80._replace(programs=336),
    "sm89": _SM80._replace(programs=568),
    "sm90": _SM90,
    "sm100": _SM100,
    "sm120": _SM80._replace(
        programs=680,
        descriptors=(
            *_described(Tile(64, 64, 64, 4, 4), 0),
            *_described(Tile(128, 64, 64, 4, 3), 0, 1),
            *_described(Tile(64, 128, 64, 4, 3), 0),
            *_described(Tile(128, 128, 64, 8, 3), 0),
        ),
    ),
    # Small tiles, so that tests on small tensors have several of them and ragged ones.
    "interpreter": Machine(
        fprop={(2, 0): Tile(32, 32, 16, 4, 1, 2), (4, 0): Tile(64, 16, 32, 4, 1, 2)},
        dgrad={(2, 0): Tile(32, 16, 32, 4, 1, 2), (4, 0): Tile(64, 32, 16, 4, 1, 2)},
        wgrad={(2, 0): Tile(16, 32, 32, 4, 1, 2), (4, 0): Tile(32, 16, 32, 4, 1, 2)},
        programs=8,
        descriptors=_described(Tile(32, 32, 16, 4, 1, 2), 0, 1),
    ),
}


def machine_name(major: int, minor: int) -> str:
    """The row of ``TABLE`` for a compute capability; an unknown one gets that of the nearest older."""
    rows = (("sm120", (12, 0)), ("sm100", (10, 0)), ("sm90", (9, 0)), ("sm89", (8, 9)), ("sm86", (8, 6)))
    return next((name for name, least in rows if (major, minor) >= least), "sm80")


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


@functools.cache
def _multiprocessors_of_gpu(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Those of the tensors' GPU; on the CPU or none those for which the table was made."""
    if device.type != "cuda":
        return machine(device).programs // _PROGRAMS
    return _multiprocessors_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


#: The tile that ``trying`` puts before the tables.
_tried: ContextVar[Tile | None] = ContextVar("fusedres_tried_tile", default=None)


@contextmanager
def trying(tile: Tile) -> Iterator[None]:
    """Within this context (this thread) every conv runs with ``tile``: to measure a table, or to follow a choice."""
    token = _tried.set(tile)
    try:
        yield
    finally:
        _tried.reset(token)


def choose(table: Table, element_size: int, gemm_n: int, gathers: bool) -> Tile:
    """The narrowest tile of the dtype that is as wide as ``gemm_n``, else the widest; or that for gathering."""
    tried = _tried.get()
    if tried is not None:
        return tried
    if gathers and (element_size, GATHER) in table:
        return table[element_size, GATHER]
    widths = [width for size, width in table if size == element_size and width >= max(gemm_n, 1)]
    return table[element_size, min(widths, default=0)]


_GEMM_TILES = (
    Tile(64, 32, 32, 4, 4),
    Tile(128, 32, 64, 4, 3),
    Tile(64, 64, 64, 4, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(128, 64, 32, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(128, 128, 32, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 4, 3),
    Tile(128, 256, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
)
_FLOAT32_TILES = (
    Tile(64, 32, 32, 4, 3),
    Tile(64, 64, 32, 4, 3),
    Tile(128, 64, 32, 4, 3),
    Tile(64, 128, 32, 4, 3),
    Tile(128, 128, 32, 8, 3),
)
_GATHER_TILES = (
    Tile(32, 32, 32, 4, 2),
    Tile(64, 32, 32, 4, 2),
    Tile(64, 64, 32, 4, 2),
    Tile(128, 64, 32, 4, 2),
    Tile(64, 64, 64, 4, 3),
    Tile(128, 64, 64, 4, 3),
)


def candidates(element_size: int, gemm_n: int, gathers: bool) -> list[Tile]:
    """Tiles worth timing for a problem of the class that ``choose`` is told. What a GPU has no shared memory for fails
    to launch there."""
    tiles = _GATHER_TILES if gathers else _GEMM_TILES if element_size == 2 else _FLOAT32_TILES
    return worth_timing(tiles, gemm_n)


def worth_timing(tiles: Sequence[Tile], gemm_n: int) -> list[Tile]:
    """Those of ``tiles`` that are no wider than ``gemm_n`` needs, and at least half as wide as one that fits."""
    widest = max(32, min(256, 1 << max(gemm_n - 1, 0).bit_length()))
    return [tile for tile in tiles if min(widest, 128) // 2 <= tile.block_n <= widest]

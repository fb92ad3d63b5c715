"""The second step of every reduction: the parts that tiles wrote, merged in an order that follows from shapes alone.

No atomics: results do not depend on which program ran first, so two runs are equal bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.epilogue import merge_rows, merge_statistics
from fusedres.kernels.launch import cdiv, run
from fusedres.kernels.tile import cast
from fusedres.layout import STAT_ROWS

#: Parts that one program merges. More parts take several launches, each with enough programs to fill a GPU.
FAN = 1024
_ROWS, _CHANNELS = 128, 32
_SUM_ROWS, _SUM_COLUMNS = 8, 128


@triton.jit
def merge_statistics_kernel(parts, merged, count, channels, FAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``parts`` (count, 3, channels) float32 -> ``merged`` (ceil(count/FAN), 3, channels); FAN parts a program."""
    first = tl.program_id(0) * FAN
    end = tl.minimum(first + FAN, count)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    m2 = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (channel < channels)[None, :]
        at = parts + row.to(tl.int64)[:, None] * (3 * channels) + channel[None, :]
        row_count = tl.load(at, mask=mask, other=0.0)
        row_mean = tl.load(at + channels, mask=mask, other=0.0)
        row_m2 = tl.load(at + 2 * channels, mask=mask, other=0.0)
        more, more_mean, more_m2 = merge_rows(row_count, row_mean, row_m2)
        total, mean, m2 = merge_statistics(total, mean, m2, more, more_mean, more_m2)
    out = merged + tl.program_id(0).to(tl.int64) * (3 * channels) + channel
    tl.store(out, total, mask=channel < channels)
    tl.store(out + channels, mean, mask=channel < channels)
    tl.store(out + 2 * channels, m2, mask=channel < channels)


@triton.jit
def sum_kernel(parts, summed, count, size, fan, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``parts`` (count, size) float32 -> ``summed`` (ceil(count/fan), size) of any dtype; ``fan`` parts a program."""
    first = tl.program_id(0) * fan
    end = tl.minimum(first + fan, count)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (column < size)[None, :]
        acc += tl.load(parts + row.to(tl.int64)[:, None] * size + column[None, :], mask=mask, other=0.0)
    out = summed + tl.program_id(0).to(tl.int64) * size + column
    tl.store(out, cast(tl.sum(acc, 0), summed.dtype.element_ty), mask=column < size)


def merge_parts(parts: Tensor) -> Tensor:
    """Statistics (parts, 3, K) float32 of many tiles -> (3, K) of all of them. No part: count, mean and M2 are 0."""
    count, _, channels = parts.shape
    if count == 0:
        return parts.new_zeros(STAT_ROWS, channels)
    while count > 1:
        merged = parts.new_empty(cdiv(count, FAN), STAT_ROWS, channels)
        grid = (merged.shape[0], cdiv(channels, _CHANNELS))
        run(
            merge_statistics_kernel,
            grid,
            parts,
            merged,
            count,
            channels,
            FAN=FAN,
            ROWS=_ROWS,
            BLOCK=_CHANNELS,
            num_warps=4,
        )
        parts, count = merged, merged.shape[0]
    return parts[0]


def sum_parts(parts: Tensor, dtype: torch.dtype = torch.float32, fan: int = FAN) -> Tensor:
    """(parts, size) float32 -> (size,) of ``dtype``, summed in float32. No part: zeros."""
    count, size = parts.shape
    if count == 0:
        return parts.new_zeros(size, dtype=dtype)
    while True:
        remaining = cdiv(count, fan)
        summed = parts.new_empty(remaining, size, dtype=dtype if remaining == 1 else torch.float32)
        grid = (remaining, cdiv(size, _SUM_COLUMNS))
        run(sum_kernel, grid, parts, summed, count, size, fan, ROWS=_SUM_ROWS, BLOCK=_SUM_COLUMNS, num_warps=4)
        if remaining == 1:
            return summed[0]
        parts, count = summed, remaining

"""``channel_stats``: what BN wants to know of a tensor that somebody else's conv has stored. One read, no atomics.

x is an (m, c) matrix here: ``m = N*H*W`` pixels, dense, float32 | bfloat16 | float16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.launch import cdiv, run
from fusedres.kernels.reduce import merge_parts
from fusedres.kernels.sums import rows_each
from fusedres.kernels.tails import WARPS, sums_tile_shape, tile_of_matrix
from fusedres.layout import STAT_ROWS, acc_dtype, channels_last


@triton.jit
def channel_stats_kernel(x, parts, m, c, rows_each, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """(count, mean, M2) of ``rows_each`` rows of a block of channels -> ``parts`` (programs, 3, c).

    Both sums are taken around the first of the rows. It is one of the values, so M2 is at least the square of its
    distance to the mean over ``rows_each``: what the subtraction at the end cancels is bounded by that.
    """
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < c
    first = tl.program_id(0).to(tl.int64) * rows_each
    end = tl.minimum(first + rows_each, m)
    pivot = tl.load(x + first * c + channels, mask=channel_mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for row in range(first, end, BLOCK_M):
        start, offsets, mask = tile_of_matrix(row, end, c, channels, BLOCK_M)
        value = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, value - pivot[None, :], 0.0)
        total += deviation
        squares += deviation * deviation
    count = (end - first).to(tl.float32)
    shift = tl.sum(total, 0) / count
    m2 = tl.sum(squares, 0) - count * shift * shift
    part = parts + tl.program_id(0).to(tl.int64) * 3 * c + channels
    tl.store(part, tl.zeros((BLOCK_C,), tl.float32) + count, mask=channel_mask)
    tl.store(part + c, pivot + shift, mask=channel_mask)
    tl.store(part + 2 * c, tl.where(m2 < 0, 0.0, m2), mask=channel_mask)


def channel_stats(x: Tensor) -> Tensor:
    """x (N, C, H, W) -> (3, C) float32: count, mean and M2, the sum of squared deviations, of every channel."""
    x = channels_last(x)
    c = x.shape[1]
    m = x.numel() // max(c, 1)
    block_m, block_c = sums_tile_shape(c, x.element_size())
    each = rows_each(m, c, block_m, block_c)
    parts = x.new_empty((cdiv(m, each) if m else 0, STAT_ROWS, c), dtype=acc_dtype(x.dtype))
    if x.numel():
        grid = (parts.shape[0], cdiv(c, block_c))
        warps = WARPS if x.element_size() < 4 else 2 * WARPS  # else a float32 tile and both sums spill on sm_100
        run(channel_stats_kernel, grid, x, parts, m, c, each, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=warps)
    return merge_parts(parts)

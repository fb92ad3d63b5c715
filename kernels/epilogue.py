"""Work on the accumulator: statistics of a tile as stored, their merge, and ReLU backward with the sums BN needs.

Nothing here depends on the order in which programs run: each tile writes its own part, ``kernels.reduce`` merges them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedres.kernels.prologue import activate


@triton.jit
def tile_statistics(y, row_mask):
    """(count (), mean (BLOCK_N,), M2 (BLOCK_N,)) of a tile's columns, two passes over ``y`` (BLOCK_M, BLOCK_N) float32.

    ``y`` are the values AS STORED: rounded to the output's dtype. Rows off ``row_mask`` do not count.
    """
    count = tl.sum(row_mask.to(tl.float32), 0)
    total = tl.sum(tl.where(row_mask[:, None], y, 0.0), 0)
    mean = total / tl.maximum(count, 1.0)
    deviation = tl.where(row_mask[:, None], y - mean[None, :], 0.0)
    return count, mean, tl.sum(deviation * deviation, 0)


@triton.jit
def store_statistics(parts, tile_m, y, row_mask, k, K, k_mask):
    """The statistics of a tile (``tile_statistics``) to its part of ``parts`` (tiles, 3, K), at channels ``k``."""
    count, mean, m2 = tile_statistics(y, row_mask)
    out = parts + tile_m.to(tl.int64) * (3 * K) + k
    tl.store(out, tl.zeros_like(mean) + count, mask=k_mask)
    tl.store(out + K, mean, mask=k_mask)
    tl.store(out + 2 * K, m2, mask=k_mask)


@triton.jit
def merge_statistics(count, mean, m2, other_count, other_mean, other_m2):
    """(count, mean, M2) of two sets together (Chan, Golub and LeVeque 1983); either may be empty."""
    total = count + other_count
    weight = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * weight, m2 + other_m2 + delta * delta * (count * weight)


@triton.jit
def merge_rows(count, mean, m2):
    """Statistics (rows, channels) of many sets -> (channels,) of all together: the same formula for many at once."""
    total = tl.sum(count, 0)
    safe = tl.maximum(total, 1.0)
    merged = tl.sum(count * mean, 0) / safe
    deviation = tl.where(count > 0, mean - merged[None, :], 0.0)
    # One more step around the merged mean takes out the rounding of the first sum.
    shift = tl.sum(count * deviation, 0) / safe
    merged_m2 = tl.sum(m2 + count * deviation * deviation, 0) - total * shift * shift
    return total, merged + shift, tl.where(merged_m2 < 0, 0.0, merged_m2)


@triton.jit
def drelu(g, z, scale, shift):
    """``g`` where the ReLU after a BN was open: its mask is recomputed from the BN's input ``z``. NaN is open."""
    return tl.where(activate(z, scale, shift) <= 0, 0.0, g)


@triton.jit
def tile_sums(g, z, mean, mask):
    """(sum(g), sum(g*(z - mean))) of a tile's columns. ``g`` float32 as stored; entries off ``mask`` do not count."""
    g = tl.where(mask, g, 0.0)
    deviation = tl.where(mask, z.to(tl.float32) - mean[None, :], 0.0)
    return tl.sum(g, 0), tl.sum(g * deviation, 0)

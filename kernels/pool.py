"""The stem's tail, ``maxpool(relu(bn(z)))``, and its backward. Nothing normalised, activated or unpooled is stored.

z, dz: (N, H, W, C) in memory, float32 | bfloat16 | float16          y, dy: (N, P, Q, C)          tap: like y, uint8
bn: (4, C) float32, rows mean, invstd, scale, shift

Tiles are (BLOCK_Q pixels of one row, BLOCK_C channels): a row has a 64-bit offset, pixels in it 32-bit ones. The
backward gathers: each pixel of z asks the windows that hold it which tap won, in the order of their rows and columns. A
pixel's gradient is formed twice, for the sums and for dz, and never stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.epilogue import drelu
from fusedres.kernels.launch import cdiv, run
from fusedres.kernels.prologue import bn_relu, bn_scale_shift, dbn, dbn_constant, dbn_factors
from fusedres.kernels.sums import PROGRAMS, ROWS, merge_sums, new_partials
from fusedres.kernels.tile import cast
from fusedres.layout import channels_last, new_activation
from fusedres.problem import out_size

WARPS = 4


def tile_shape(width: int, c: int) -> tuple[int, int]:
    """(BLOCK_Q, BLOCK_C) for rows of ``width`` pixels."""
    block_c = min(triton.next_power_of_2(c), 64)
    return min(triton.next_power_of_2(width), max(1024 // block_c, 1)), block_c


@triton.jit
def bn_relu_maxpool_kernel(
    z,
    bn,
    y,
    tap,
    H,
    W,
    C,
    P,
    Q,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    line = tl.program_id(0)
    image, p = line // P, line % P
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    scale, shift = bn_scale_shift(bn, channels, C, channel_mask)
    best = tl.full((BLOCK_Q, BLOCK_C), float("-inf"), tl.float32)
    best_tap = tl.zeros((BLOCK_Q, BLOCK_C), tl.int32)
    for r in tl.static_range(KERNEL):
        h = p * STRIDE - PADDING + r
        row = (tl.cast(image, tl.int64) * H + h) * W * C
        for s in tl.static_range(KERNEL):
            w = q * STRIDE - PADDING + s
            exists = (w >= 0) & (w < W) & (h >= 0) & (h < H)
            mask = exists[:, None] & channel_mask[None, :]
            loaded = tl.load(z + row + (w * C)[:, None] + channels[None, :], mask=mask, other=0.0)
            value = bn_relu(loaded, scale[None, :], shift[None, :]).to(tl.float32)
            # As ATen does: NaN wins over what came before it, else only the larger.
            wins = mask & ((value > best) | (value != value))
            best = tl.where(wins, value, best)
            best_tap = tl.where(wins, r * KERNEL + s, best_tap)
    mask = (q < Q)[:, None] & channel_mask[None, :]
    offsets = (q * C)[:, None] + channels[None, :]
    row = line.to(tl.int64) * Q * C
    tl.store(y + row + offsets, cast(best, y.dtype.element_ty), mask=mask)
    tl.store(tap + row + offsets, best_tap.to(tl.uint8), mask=mask)


def bn_relu_maxpool(z: Tensor, bn: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """As ``fusedres.ops.bn_relu_maxpool``."""
    z = channels_last(z)
    n, c, h, w = z.shape
    p, q = (out_size(size, kernel_size, stride, padding, 1) for size in (h, w))
    y = new_activation(z, (n, c, p, q))
    tap = new_activation(z, (n, c, p, q), torch.uint8)
    if y.numel():
        block_q, block_c = tile_shape(q, c)
        run(
            bn_relu_maxpool_kernel,
            (n * p, cdiv(q, block_q), cdiv(c, block_c)),
            z,
            bn,
            y,
            tap,
            h,
            w,
            c,
            p,
            q,
            KERNEL=kernel_size,
            STRIDE=stride,
            PADDING=padding,
            BLOCK_Q=block_q,
            BLOCK_C=block_c,
            num_warps=WARPS,
        )
    return y, tap


@triton.jit
def gather_gradient(
    dy,
    tap,
    image,
    h,
    w,
    channels,
    mask,
    C,
    P,
    Q,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What pixels (image, h, w) of the pool's input get from the windows that they won, float32."""
    WINDOWS: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE  # at most so many hold a pixel, along each axis
    g = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for i in tl.static_range(WINDOWS):
        p = (h + PADDING) // STRIDE - (WINDOWS - 1 - i)
        r = h + PADDING - p * STRIDE
        row = (tl.cast(image, tl.int64) * P + p) * Q * C
        for j in tl.static_range(WINDOWS):
            q = (w + PADDING) // STRIDE - (WINDOWS - 1 - j)
            s = w + PADDING - q * STRIDE
            exists = (q >= 0) & (q < Q) & (s < KERNEL) & (p >= 0) & (p < P) & (r < KERNEL)
            inside = mask & exists[:, None]
            offsets = (q * C)[:, None] + channels[None, :]
            winner = tl.load(tap + row + offsets, mask=inside, other=255).to(tl.int32)
            won = inside & (winner == (r * KERNEL + s)[:, None])
            g += tl.where(won, tl.load(dy + row + offsets, mask=inside, other=0.0).to(tl.float32), 0.0)
    return g


@triton.jit
def maxpool_sums_kernel(
    dy,
    tap,
    z,
    bn,
    partials,
    lines,
    lines_each,
    H,
    W,
    C,
    P,
    Q,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial sums of ``lines_each`` rows of the map, for a block of channels."""
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    scale, shift = bn_scale_shift(bn, channels, C, channel_mask)
    mean = tl.load(bn + channels, mask=channel_mask, other=0.0)
    dbeta = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    dgamma = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    first = tl.program_id(0) * lines_each
    for line in range(first, tl.minimum(first + lines_each, lines)):
        image, h = line // H, line % H
        row = z + tl.cast(line, tl.int64) * W * C
        for column in range(0, W, BLOCK_Q):
            w = column + tl.arange(0, BLOCK_Q)
            mask = (w < W)[:, None] & channel_mask[None, :]
            value = tl.load(row + (w * C)[:, None] + channels[None, :], mask=mask, other=0.0)
            g = gather_gradient(
                dy, tap, image, h, w, channels, mask, C, P, Q, KERNEL, STRIDE, PADDING, BLOCK_Q, BLOCK_C
            )
            g = drelu(g, value, scale[None, :], shift[None, :])
            dbeta += g
            dgamma += g * (value.to(tl.float32) - mean[None, :])
    part = partials + tl.program_id(0) * ROWS * C + channels
    tl.store(part, tl.sum(dbeta, 0), mask=channel_mask)
    tl.store(part + C, tl.sum(dgamma, 0), mask=channel_mask)


@triton.jit
def maxpool_dbn_kernel(
    dy,
    tap,
    z,
    bn,
    sums,
    dz,
    inv_count,
    H,
    W,
    C,
    P,
    Q,
    BATCH_STATS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    line = tl.program_id(0)
    w = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    mask = (w < W)[:, None] & channel_mask[None, :]
    row, offsets = line.to(tl.int64) * W * C, (w * C)[:, None] + channels[None, :]
    value = tl.load(z + row + offsets, mask=mask, other=0.0)
    g = gather_gradient(
        dy, tap, line // H, line % H, w, channels, mask, C, P, Q, KERNEL, STRIDE, PADDING, BLOCK_Q, BLOCK_C
    )
    scale, shift = bn_scale_shift(bn, channels, C, channel_mask)
    g = cast(drelu(g, value, scale[None, :], shift[None, :]), value.dtype)
    if BATCH_STATS:
        mean, a, b, c = dbn_factors(bn, sums, inv_count, channels, C, channel_mask)
        value = dbn(g, value, mean[None, :], a[None, :], b[None, :], c[None, :])
    else:
        value = dbn_constant(g, scale[None, :])
    tl.store(dz + row + offsets, value, mask=mask)


def bn_relu_maxpool_backward(
    dy: Tensor, tap: Tensor, z: Tensor, bn: Tensor, kernel_size: int, stride: int, padding: int, inv_count: float
) -> tuple[Tensor, Tensor]:
    """As ``fusedres.ops.bn_relu_maxpool_backward``."""
    dy, tap, z = channels_last(dy), channels_last(tap), channels_last(z)
    n, c, h, w = z.shape
    dz, (p, q), lines = new_activation(z, z.shape), dy.shape[2:], n * h
    pool = {"KERNEL": kernel_size, "STRIDE": stride, "PADDING": padding}
    (block_q, block_c), each = tile_shape(w, c), max(cdiv(lines, PROGRAMS), 1)
    tile = {"BLOCK_Q": block_q, "BLOCK_C": block_c, "num_warps": WARPS}
    column_blocks, channel_blocks = cdiv(w, block_q), cdiv(c, block_c)
    partials = new_partials(z, lines, c, each)
    if z.numel():
        run(
            maxpool_sums_kernel,
            (partials.shape[0], channel_blocks),
            dy,
            tap,
            z,
            bn,
            partials,
            lines,
            each,
            h,
            w,
            c,
            p,
            q,
            **pool,
            **tile,
        )
    sums, _ = merge_sums(partials, bn, None)
    if z.numel():
        run(
            maxpool_dbn_kernel,
            (lines, column_blocks, channel_blocks),
            dy,
            tap,
            z,
            bn,
            sums,
            dz,
            inv_count,
            h,
            w,
            c,
            p,
            q,
            BATCH_STATS=inv_count != 0,
            **pool,
            **tile,
        )
    return dz, sums

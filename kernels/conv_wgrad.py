"""``conv_wgrad``: a conv's weight gradient as an implicit GEMM, both operands with their prologues.

Here the long axis is summed: rows of the result are K output channels, columns are taps (R*S) times C/groups input
channels, and the sum runs over N*P*Q pixels. It is split into chunks that follow from shapes alone; each chunk writes
its part in float32 and a second launch adds the parts in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels import configs
from fusedres.kernels.groups import blocking, is_flat, tile_class
from fusedres.kernels.launch import (
    cdiv,
    check_operands,
    check_pixels,
    contiguous,
    geometry,
    is_wide,
    precision,
    run,
    tile_constants,
)
from fusedres.kernels.prologue import gradient_form, gradient_vectors, input_vectors, load_gradient, load_input
from fusedres.kernels.reduce import sum_parts
from fusedres.kernels.tile import cast, channels_of, divisor, dot, pixel_of, row_offset, tile_of
from fusedres.layout import BN_ROWS, SUM_ROWS, channels_last, new_activation
from fusedres.problem import ConvProblem

#: Steps of the loop below which a chunk's start and end cost more than its sum.
_MIN_STEPS = 8


@triton.jit(do_not_specialize=["q_div", "pq_div", "chunk"])
def conv_wgrad_kernel(
    g,  # (N, P, Q, K)
    z,  # (N, P, Q, K)
    bn,  # (4, K) float32
    sums,  # (2, K) float32
    inv_count,
    x,  # (N, H, W, C)
    in_bn,  # (4, C) float32
    dw,  # (chunks, K, R, S, C/groups), float32 unless there is one chunk
    H,
    W,
    C,
    K,
    Q,
    PQ,
    q_div,
    pq_div,
    gemm_k,  # N*P*Q
    chunk,  # pixels of a program, a multiple of BLOCK_K
    tiles_m,
    tiles_n,
    block_c,  # input and output channels of a (merged) group
    block_k,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    FLAT: tl.constexpr,  # one axis of taps and channels
    GROUPED: tl.constexpr,
    MERGE: tl.constexpr,
    GROUP_C: tl.constexpr,  # channels of one group, where the kernel divides by it; else 0
    GROUP_K: tl.constexpr,
    WIDE: tl.constexpr,
    FORM: tl.constexpr,
    ACTIVATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # tile_m counts output channels group by group; tile_n counts taps, within a tap blocks of input channels.
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    group, k_in, k, k_mask = channels_of(tile_m, block_k, K, GROUPED, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    if FLAT:
        at = tile_n * BLOCK_N + column
        tap = at // GROUP_C
        c_in = at % GROUP_C
        c_mask = tap < R * S
        r = tap // S
        s = tap % S
    else:
        blocks_c = tl.cdiv(block_c, BLOCK_N)
        tap = tile_n // blocks_c
        c_in = tile_n % blocks_c * BLOCK_N + column
        c_mask = (c_in < block_c) & (group * block_c + c_in < C)
        r = tap // S
        s = tap % S
    c = group * block_c + c_in

    mean, a, b, const = gradient_vectors(bn, sums, inv_count, k, K, k_mask, FORM)
    scale, shift = input_vectors(in_bn, c, C, c_mask, ACTIVATE)
    PLAIN_GEMM: tl.constexpr = R == 1 and S == 1 and STRIDE_H == 1 and STRIDE_W == 1 and PAD_H == 0 and PAD_W == 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    start = tl.program_id(1) * chunk
    end = tl.minimum(start + chunk, gemm_k)
    for first in range(start, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        row_mask = row < end
        g_offset = row_offset(row, K, WIDE)[:, None] + k[None, :]
        dz = load_gradient(g, z, g_offset, row_mask[:, None] & k_mask[None, :], mean, a, b, const, FORM)
        if PLAIN_GEMM:
            mask = row_mask[:, None] & c_mask[None, :]
            x_offset = row_offset(row, C, WIDE)[:, None] + c[None, :]
        else:
            n, p, q = pixel_of(row, Q, q_div, PQ, pq_div)
            h = p * STRIDE_H - PAD_H
            v = q * STRIDE_W - PAD_W
            if FLAT:
                h_tap = h[:, None] + (r * DIL_H)[None, :]
                v_tap = v[:, None] + (s * DIL_W)[None, :]
                mask = (h_tap >= 0) & (h_tap < H) & (v_tap >= 0) & (v_tap < W) & row_mask[:, None] & c_mask[None, :]
                x_offset = row_offset((n * H + h) * W + v, C, WIDE)[:, None]
                x_offset = x_offset + ((r * DIL_H * W + s * DIL_W) * C + c)[None, :]
            else:
                h = h + r * DIL_H
                v = v + s * DIL_W
                inside = (h >= 0) & (h < H) & (v >= 0) & (v < W) & row_mask
                mask = inside[:, None] & c_mask[None, :]
                x_offset = row_offset((n * H + h) * W + v, C, WIDE)[:, None] + c[None, :]
        p_x = load_input(x, x_offset, mask, scale, shift, ACTIVATE)
        acc = dot(tl.trans(dz), p_x, acc, PRECISION)

    mask = k_mask[:, None] & c_mask[None, :]
    size = R * S * block_c
    if FLAT:
        offsets = (k * size)[:, None] + at[None, :]
    elif MERGE > 1:
        # Off the diagonal blocks are products of channels of different groups: no weight connects them.
        size = R * S * GROUP_C
        mask = mask & ((k_in // GROUP_K)[:, None] == (c_in // GROUP_C)[None, :])
        offsets = (k * size)[:, None] + (tap * GROUP_C + c_in % GROUP_C)[None, :]
    else:
        offsets = (k * size)[:, None] + (tap * block_c + c_in)[None, :]
    out = dw + tl.program_id(1).to(tl.int64) * K * size + offsets
    tl.store(out, cast(acc, dw.dtype.element_ty), mask=mask)


def chunk_of(pixels: int, tiles: int, programs: int, block: int) -> int:
    """Pixels that one program sums: as many chunks as give ``programs`` programs, none shorter than ``_MIN_STEPS``."""
    chunks = max(1, min(programs // tiles, pixels // (block * _MIN_STEPS)))
    return cdiv(cdiv(pixels, chunks), block) * block


def conv_wgrad(
    g: Tensor,
    z: Tensor | None,
    bn: Tensor | None,
    sums: Tensor | None,
    inv_count: float,
    x: Tensor,
    in_bn: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """As ``fusedres.ops.conv_wgrad``, for float32, bfloat16 and float16."""
    size = (g.shape[1], x.shape[1] // groups, *kernel_size)
    problem = ConvProblem.of(x, torch.Size(size), stride, padding, dilation, groups)
    k = problem.K
    check_operands(
        x,
        g=(g, (problem.N, k, problem.P, problem.Q), x.dtype),
        z=(z, g.shape, x.dtype),
        bn=(bn, (BN_ROWS, k), torch.float32),
        sums=(sums, (SUM_ROWS, k), torch.float32),
        in_bn=(in_bn, (BN_ROWS, problem.C), torch.float32),
    )
    check_pixels(problem)
    dw = new_activation(x, size)
    if problem.gemm_m == 0:
        return dw.zero_()
    g, z, x = channels_last(g), None if z is None else channels_last(z), channels_last(x)
    blocks = blocking(problem)
    machine = configs.machine(x.device)
    taps = problem.R * problem.S
    flat = is_flat(problem)
    tile = configs.choose(machine.wgrad, x.element_size(), *tile_class("conv_wgrad", problem))
    tiles_m = blocks.count * cdiv(blocks.k, tile.block_m)
    tiles_n = cdiv(taps * blocks.c, tile.block_n) if flat else taps * cdiv(blocks.c, tile.block_n)
    chunk = chunk_of(problem.gemm_m, tiles_m * tiles_n, machine.programs, tile.block_k)
    chunks = cdiv(problem.gemm_m, chunk)
    parts = None if chunks == 1 else x.new_empty((chunks, dw.numel()), dtype=torch.float32)
    run(
        conv_wgrad_kernel,
        (tiles_m * tiles_n, chunks),
        g,
        z,
        contiguous(bn),
        contiguous(sums),
        inv_count,
        x,
        contiguous(in_bn),
        dw if parts is None else parts,
        problem.H,
        problem.W,
        problem.C,
        k,
        problem.Q,
        problem.P * problem.Q,
        divisor(problem.Q),
        divisor(problem.P * problem.Q),
        problem.gemm_m,
        chunk,
        tiles_m,
        tiles_n,
        blocks.c,
        blocks.k,
        **geometry(problem),
        **blocks.constants(divides=flat or blocks.merge > 1),
        FLAT=flat,
        WIDE=is_wide(x, g),
        FORM=gradient_form(bn, inv_count),
        ACTIVATE=in_bn is not None,
        PRECISION=precision(x.dtype),
        **tile_constants(tile),
    )
    if parts is None:
        return dw
    summed = sum_parts(parts, x.dtype, fan=chunks)
    return summed.view(k, *kernel_size, size[1]).permute(0, 3, 1, 2)

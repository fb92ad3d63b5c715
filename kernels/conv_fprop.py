"""``conv_fprop``: a convolution as an implicit GEMM, BN and ReLU of its input before, statistics of its output after.

gemm_m = N*P*Q output pixels, gemm_n = K output channels, gemm_k = taps (R*S) times C/groups channels.
One launch, and with genstats those of ``kernels.reduce``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels import configs, conv_descriptor
from fusedres.kernels.epilogue import store_statistics
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
from fusedres.kernels.prologue import input_vectors, load_input, relu
from fusedres.kernels.reduce import merge_parts
from fusedres.kernels.tile import cast, channels_of, divisor, dot, next_step, pixel_of, row_offset, tile_of
from fusedres.layout import BN_ROWS, STAT_ROWS, channels_last, new_activation
from fusedres.problem import ConvProblem


@triton.jit(do_not_specialize=["q_div", "pq_div"])
def conv_fprop_kernel(
    x,  # (N, H, W, C)
    w,  # (K, R, S, C/groups)
    bias,  # (K,)
    residual,  # (N, P, Q, K)
    in_bn,  # (4, C) float32
    y,  # (N, P, Q, K)
    parts,  # (tiles_m, 3, K) float32
    H,
    W,
    C,
    K,
    Q,
    PQ,
    q_div,
    pq_div,
    gemm_m,
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
    MERGE: tl.constexpr,  # groups in a merged group
    GROUP_C: tl.constexpr,  # channels of one group, where the kernel divides by it; else 0
    GROUP_K: tl.constexpr,
    EVEN_C: tl.constexpr,  # BLOCK_K divides block_c
    WIDE: tl.constexpr,
    ACTIVATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    GENSTATS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < gemm_m
    group, k_in, k, k_mask = channels_of(tile_n, block_k, K, GROUPED, BLOCK_N)
    first_c = group * block_c

    # The input pixel under the first tap; it may lie outside the map.
    if R == 1 and S == 1 and STRIDE_H == 1 and STRIDE_W == 1 and PAD_H == 0 and PAD_W == 0:
        pixel = row
        h = row
        v = row
    else:
        n, p, q = pixel_of(row, Q, q_div, PQ, pq_div)
        h = p * STRIDE_H - PAD_H
        v = q * STRIDE_W - PAD_W
        pixel = (n * H + h) * W + v
    x_row = row_offset(pixel, C, WIDE)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    if FLAT:
        w_row = k * (R * S * GROUP_C)
        for start in range(0, R * S * GROUP_C, BLOCK_K):
            at = start + offs_k
            tap = at // GROUP_C
            c = at % GROUP_C
            r = tap // S
            s = tap % S
            inside = at < R * S * GROUP_C
            h_tap = h[:, None] + (r * DIL_H)[None, :]
            v_tap = v[:, None] + (s * DIL_W)[None, :]
            mask = (h_tap >= 0) & (h_tap < H) & (v_tap >= 0) & (v_tap < W) & row_mask[:, None] & inside[None, :]
            offsets = x_row[:, None] + ((r * DIL_H * W + s * DIL_W) * C + c)[None, :]
            scale, shift = input_vectors(in_bn, c, C, inside, ACTIVATE)
            a = load_input(x, offsets, mask, scale, shift, ACTIVATE)
            b = tl.load(w + w_row[None, :] + at[:, None], mask=inside[:, None] & k_mask[None, :], other=0.0)
            acc = dot(a, b, acc, PRECISION)
    else:
        blocks_c = tl.cdiv(block_c, BLOCK_K)
        c0 = 0
        r = 0
        s = 0
        for _ in range(0, R * S * blocks_c):
            c0 = tl.multiple_of(c0, BLOCK_K)
            c_in = c0 + offs_k
            c = first_c + c_in
            c_mask = (c_in < block_c) & (c < C)
            mask = row_mask
            tap_offset = 0
            if R * S > 1 or PAD_H > 0 or PAD_W > 0:
                h_tap = h + r * DIL_H
                v_tap = v + s * DIL_W
                mask = (h_tap >= 0) & (h_tap < H) & (v_tap >= 0) & (v_tap < W) & row_mask
                tap_offset = row_offset(r * (DIL_H * W) + s * DIL_W, C, False)
            if EVEN_C:
                x_mask = mask[:, None] & tl.full([1, BLOCK_K], True, tl.int1)
                w_mask = k_mask[None, :] & tl.full([BLOCK_K, 1], True, tl.int1)
            else:
                x_mask = mask[:, None] & c_mask[None, :]
                w_mask = k_mask[None, :] & c_mask[:, None]
            scale, shift = input_vectors(in_bn, c, C, c_mask, ACTIVATE)
            a = load_input(x, x_row[:, None] + (tap_offset + c)[None, :], x_mask, scale, shift, ACTIVATE)
            if MERGE > 1:
                # Block-diagonal: a weight exists where input and output channel are of one group.
                w_mask = w_mask & ((c_in // GROUP_C)[:, None] == (k_in // GROUP_K)[None, :])
                w_offset = (k * (R * S * GROUP_C))[None, :] + ((r * S + s) * GROUP_C + c_in % GROUP_C)[:, None]
            else:
                w_offset = (k * (R * S * block_c))[None, :] + ((r * S + s) * block_c + c_in)[:, None]
            b = tl.load(w + w_offset, mask=w_mask, other=0.0)
            acc = dot(a, b, acc, PRECISION)

            c0 += BLOCK_K
            if R * S > 1:
                c0, r, s = next_step(c0, block_c, r, s, S)

    y_offset = row_offset(row, K, WIDE)[:, None] + k[None, :]
    y_mask = row_mask[:, None] & k_mask[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + y_offset, mask=y_mask, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    stored = cast(acc, y.dtype.element_ty)
    tl.store(y + y_offset, stored, mask=y_mask)
    if GENSTATS:
        store_statistics(parts, tile_m, stored.to(tl.float32), row_mask, k, K, k_mask)


def conv_fprop(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_bn: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    genstats: bool,
) -> tuple[Tensor, Tensor]:
    """As ``fusedres.ops.conv_fprop``, for float32, bfloat16 and float16."""
    problem = ConvProblem.of(x, w, stride, padding, dilation, groups)
    size = (problem.N, problem.K, problem.P, problem.Q)
    check_operands(
        x,
        w=(w, (problem.K, problem.C // groups, problem.R, problem.S), x.dtype),
        bias=(bias, (problem.K,), x.dtype),
        residual=(residual, size, x.dtype),
        in_bn=(in_bn, (BN_ROWS, problem.C), torch.float32),
    )
    if problem.P < 1 or problem.Q < 1:
        raise RuntimeError(f"a kernel larger than the padded map: {problem}")
    check_pixels(problem)
    tile = configs.choose(configs.machine(x.device).fprop, x.element_size(), *tile_class("conv_fprop", problem))
    by_descriptors = tile.descriptors and conv_descriptor.serves(problem, x, w, residual, in_bn)
    x, w = channels_last(x), channels_last(w)
    residual = None if residual is None else channels_last(residual)
    if by_descriptors:
        y, parts = conv_descriptor.convolve(x, w, bias, residual, problem, tile, relu=relu, genstats=genstats)
        return y, merge_parts(parts) if genstats else parts.view(0)
    y = new_activation(x, size)
    blocks = blocking(problem)
    flat = is_flat(problem)
    tiles_m = cdiv(problem.gemm_m, tile.block_m)
    tiles_n = blocks.count * cdiv(blocks.k, tile.block_n)
    parts = x.new_empty((tiles_m if genstats else 0, STAT_ROWS, problem.K), dtype=torch.float32)
    if tiles_m:
        run(
            conv_fprop_kernel,
            (tiles_m * tiles_n,),
            x,
            w,
            contiguous(bias),
            residual,
            contiguous(in_bn),
            y,
            parts,
            problem.H,
            problem.W,
            problem.C,
            problem.K,
            problem.Q,
            problem.P * problem.Q,
            divisor(problem.Q),
            divisor(problem.P * problem.Q),
            problem.gemm_m,
            tiles_m,
            tiles_n,
            blocks.c,
            blocks.k,
            **geometry(problem),
            **blocks.constants(divides=flat or blocks.merge > 1),
            FLAT=flat,
            EVEN_C=blocks.c % tile.block_k == 0 and problem.C % blocks.c == 0,
            WIDE=is_wide(x, y),
            ACTIVATE=in_bn is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            RELU=relu,
            GENSTATS=genstats,
            PRECISION=precision(x.dtype),
            **tile_constants(tile),
        )
    return y, merge_parts(parts) if genstats else parts.view(0)

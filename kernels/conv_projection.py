"""``conv_projection``: the end of a bottleneck in eval, conv3 and its projection shortcut in one accumulator.

gemm_m = N*P*Q output pixels, gemm_n = K output channels, gemm_k = the channels of conv3's input, then those of the
block's: a matrix product with two pairs of operands. One launch; the projected map never exists in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels import configs
from fusedres.kernels.launch import (
    cdiv,
    check_operands,
    check_pixels,
    contiguous,
    is_wide,
    precision,
    run,
    tile_constants,
)
from fusedres.kernels.prologue import relu
from fusedres.kernels.tile import cast, channels_of, divisor, dot, pixel_of, row_offset, tile_of
from fusedres.layout import channels_last, new_activation
from fusedres.problem import ConvProblem


@triton.jit
def add_product(
    acc,
    x,  # pixels of C channels
    x_row,  # where those of the tile begin
    row_mask,
    w,  # (K, C)
    k,
    k_mask,
    C,
    EVEN_C: tl.constexpr,  # BLOCK_K divides C
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``acc`` and the tile's pixels times the weight of a pointwise conv."""
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        if EVEN_C:
            x_mask = row_mask[:, None] & tl.full([1, BLOCK_K], True, tl.int1)
            w_mask = k_mask[None, :] & tl.full([BLOCK_K, 1], True, tl.int1)
        else:
            x_mask = row_mask[:, None] & (c < C)[None, :]
            w_mask = k_mask[None, :] & (c < C)[:, None]
        a = tl.load(x + (x_row[:, None] + c[None, :]), mask=x_mask, other=0.0)
        b = tl.load(w + ((k * C)[None, :] + c[:, None]), mask=w_mask, other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["q_div", "pq_div"])
def conv_projection_kernel(
    x,  # (N, P, Q, C)
    w,  # (K, C)
    bias,  # (K,)
    x_d,  # (N, H, W, C_d)
    w_d,  # (K, C_d)
    bias_d,  # (K,)
    y,  # (N, P, Q, K)
    H,
    W,
    C,
    C_d,
    K,
    Q,
    PQ,
    q_div,
    pq_div,
    gemm_m,
    tiles_m,
    tiles_n,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    EVEN_C: tl.constexpr,
    EVEN_C_D: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS_D: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < gemm_m
    _, _, k, k_mask = channels_of(tile_n, K, K, False, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = add_product(acc, x, row_offset(row, C, WIDE), row_mask, w, k, k_mask, C, EVEN_C, PRECISION, BLOCK_K)
    pixel = row
    if STRIDE_H > 1 or STRIDE_W > 1:
        n, p, q = pixel_of(row, Q, q_div, PQ, pq_div)
        pixel = (n * H + p * STRIDE_H) * W + q * STRIDE_W
    x_row = row_offset(pixel, C_d, WIDE)
    acc = add_product(acc, x_d, x_row, row_mask, w_d, k, k_mask, C_d, EVEN_C_D, PRECISION, BLOCK_K)

    if HAS_BIAS:
        acc += tl.load(bias + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS_D:
        acc += tl.load(bias_d + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = relu(acc)
    y_offset = row_offset(row, K, WIDE)[:, None] + k[None, :]
    tl.store(y + y_offset, cast(acc, y.dtype.element_ty), mask=row_mask[:, None] & k_mask[None, :])


def conv_projection(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    x_d: Tensor,
    w_d: Tensor,
    bias_d: Tensor | None,
    stride_d: Sequence[int],
    relu: bool,
) -> Tensor:
    """As ``fusedres.ops.conv_projection``, for float32, bfloat16 and float16."""
    problem, source = ConvProblem.of(x, w), ConvProblem.of(x_d, w_d, stride_d)
    size = (problem.N, problem.K, source.P, source.Q)
    check_operands(
        x,
        x=(x, (source.N, problem.C, source.P, source.Q), x.dtype),
        w=(w, (problem.K, problem.C, 1, 1), x.dtype),
        bias=(bias, (problem.K,), x.dtype),
        x_d=(x_d, x_d.shape, x.dtype),
        w_d=(w_d, (problem.K, source.C, 1, 1), x.dtype),
        bias_d=(bias_d, (problem.K,), x.dtype),
    )
    check_pixels(source)
    y = new_activation(x, size)
    gathers = problem.C % 16 != 0 or source.C % 16 != 0
    tile = configs.choose(configs.machine(x.device).fprop, x.element_size(), problem.K, gathers)
    tiles_m, tiles_n = cdiv(problem.gemm_m, tile.block_m), cdiv(problem.K, tile.block_n)
    if tiles_m:
        run(
            conv_projection_kernel,
            (tiles_m * tiles_n,),
            channels_last(x),
            channels_last(w),
            contiguous(bias),
            channels_last(x_d),
            channels_last(w_d),
            contiguous(bias_d),
            y,
            source.H,
            source.W,
            problem.C,
            source.C,
            problem.K,
            source.Q,
            source.P * source.Q,
            divisor(source.Q),
            divisor(source.P * source.Q),
            problem.gemm_m,
            tiles_m,
            tiles_n,
            STRIDE_H=source.stride[0],
            STRIDE_W=source.stride[1],
            EVEN_C=problem.C % tile.block_k == 0,
            EVEN_C_D=source.C % tile.block_k == 0,
            WIDE=is_wide(x, x_d, y),
            HAS_BIAS=bias is not None,
            HAS_BIAS_D=bias_d is not None,
            RELU=relu,
            PRECISION=precision(x.dtype),
            **tile_constants(tile),
        )
    return y

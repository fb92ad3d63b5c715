"""``conv_dgrad``: the gradient of a conv's input as an implicit GEMM, BN backward before, ReLU backward or a sum after.

Input pixels fall into stride_h * stride_w parity classes. Within a class every pixel meets the same taps, a dense
arithmetic progression of them, so each class is a convolution of stride 1 with fewer taps: no zeros are multiplied.
gemm_m = the pixels of a class, gemm_n = C input channels, gemm_k = the taps of the class times K/groups channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels import configs, conv_descriptor
from fusedres.kernels.epilogue import drelu, tile_sums
from fusedres.kernels.groups import blocking, tile_class
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
from fusedres.kernels.prologue import bn_scale_shift, gradient_form, gradient_vectors, load_gradient
from fusedres.kernels.reduce import sum_parts
from fusedres.kernels.sums import ROWS, merge_sums
from fusedres.kernels.tile import cast, channels_of, divisor, dot, next_step, pixel_of, row_offset, tile_of
from fusedres.layout import BN_ROWS, SUM_ROWS, channels_last, new_activation
from fusedres.problem import ConvProblem, out_size


@triton.jit
def taps_of_class(phase, TAPS: tl.constexpr, STRIDE: tl.constexpr, DIL: tl.constexpr, STEP: tl.constexpr):
    """(first tap, their number) with ``(phase - tap*DIL) % STRIDE == 0``; they are ``STEP = STRIDE/gcd(STRIDE, DIL)``
    apart. ``phase`` is an input coordinate plus the padding, modulo the stride."""
    if STRIDE == 1:
        return 0, TAPS
    else:
        first = TAPS
        for tap in tl.static_range(min(STEP, TAPS)):
            hits = (phase + tap * DIL * (STRIDE - 1)) % STRIDE == 0  # -1 = STRIDE - 1, kept positive
            first = tl.where(hits, tap, first)
        return first, (TAPS - first + STEP - 1) // STEP


@triton.jit
def _store_dgamma(to, g, z, bn, offsets, c, c_mask, mask):
    """sum(g*(z - mean)) of a tile's columns, ``g`` (BLOCK_M, BLOCK_N) float32 as stored."""
    z_tile = tl.load(z + offsets, mask=mask, other=0.0)
    mean = tl.load(bn + c, mask=c_mask, other=0.0)
    tl.store(to, tile_sums(g, z_tile, mean, mask)[1], mask=c_mask)


@triton.jit(do_not_specialize=["w_div", "hw_div"])
def conv_dgrad_kernel(
    g,  # (N, P, Q, K)
    z,  # (N, P, Q, K)
    bn,  # (4, K) float32
    sums,  # (2, K) float32
    inv_count,
    w,  # (K, R, S, C/groups)
    residual,  # (N, ceil(H/RES_H), ceil(W/RES_W), C)
    y,  # (N, H, W, C)
    prev_z,  # (N, H, W, C)
    prev_bn,  # (4, C) float32
    side_z,  # (N, H, W, C)
    side_bn,  # (4, C) float32
    dx,  # (N, H, W, C)
    parts,  # (tiles_m * classes, 2 or by output 3, C) float32
    H,
    W,
    C,
    K,
    P,
    Q,
    class_w,  # rows of a class have this many pixels, planes class_hw; where H or W is odd, some lie outside
    class_hw,
    w_div,
    hw_div,
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
    STEP_H: tl.constexpr,  # from one tap of a class to the next
    STEP_W: tl.constexpr,
    JUMP_H: tl.constexpr,  # and from the gradient's row it meets to the next
    JUMP_W: tl.constexpr,
    GROUPED: tl.constexpr,
    MERGE: tl.constexpr,
    GROUP_C: tl.constexpr,  # channels of one group where groups are merged, else 0
    GROUP_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides block_k
    WIDE: tl.constexpr,
    FORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RES_H: tl.constexpr,
    RES_W: tl.constexpr,
    DRELU: tl.constexpr,
    BY_OUTPUT: tl.constexpr,  # masked by y, the output of the block before, not by what prev_bn makes of prev_z
    HAS_PREV: tl.constexpr,
    HAS_SIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # The classes of one tile are neighbours: they read the same gradients.
    CLASSES: tl.constexpr = STRIDE_H * STRIDE_W
    phase = tl.program_id(0) % CLASSES
    tile_m, tile_n = tile_of(tl.program_id(0) // CLASSES, tiles_m, tiles_n, GROUP_M)
    part = tile_m * CLASSES + phase
    phase_h = phase // STRIDE_W
    phase_w = phase % STRIDE_W
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < gemm_m
    group, c_in, c, c_mask = channels_of(tile_n, block_c, C, GROUPED, BLOCK_N)
    first_k = group * block_k

    PLAIN_GEMM: tl.constexpr = R == 1 and S == 1 and CLASSES == 1 and PAD_H == 0 and PAD_W == 0
    first_r, count_r = taps_of_class((phase_h + PAD_H) % STRIDE_H, R, STRIDE_H, DIL_H, STEP_H)
    first_s, count_s = taps_of_class((phase_w + PAD_W) % STRIDE_W, S, STRIDE_W, DIL_W, STEP_W)
    n, i, j = pixel_of(row, class_w, w_div, class_hw, hw_div)
    h = i * STRIDE_H + phase_h
    v = j * STRIDE_W + phase_w
    row_mask = row_mask & (h < H) & (v < W)
    # The gradient's pixel that the first tap of the class meets; it may lie outside. The divisions are exact.
    p = i + (phase_h + PAD_H - first_r * DIL_H) // STRIDE_H
    q = j + (phase_w + PAD_W - first_s * DIL_W) // STRIDE_W
    if PLAIN_GEMM:
        g_row = row_offset(row, K, WIDE)
        dx_row = row_offset(row, C, WIDE)
    else:
        g_row = row_offset((n * P + p) * Q + q, K, WIDE)
        dx_row = row_offset((n * H + h) * W + v, C, WIDE)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    k0 = 0
    tap_h = 0
    tap_w = 0
    for _ in range(0, count_r * count_s * tl.cdiv(block_k, BLOCK_K)):
        k0 = tl.multiple_of(k0, BLOCK_K)
        k_in = k0 + offs_k
        k = first_k + k_in
        k_mask = (k_in < block_k) & (k < K)
        mask = row_mask
        tap_offset = 0
        if not PLAIN_GEMM:
            p_tap = p - tap_h * JUMP_H
            q_tap = q - tap_w * JUMP_W
            mask = (p_tap >= 0) & (p_tap < P) & (q_tap >= 0) & (q_tap < Q) & row_mask
            tap_offset = -(tap_h * JUMP_H * Q + tap_w * JUMP_W) * K
        r = first_r + tap_h * STEP_H
        s = first_s + tap_w * STEP_W
        if EVEN_K:
            g_mask = mask[:, None] & tl.full([1, BLOCK_K], True, tl.int1)
            w_mask = c_mask[None, :] & tl.full([BLOCK_K, 1], True, tl.int1)
        else:
            g_mask = mask[:, None] & k_mask[None, :]
            w_mask = c_mask[None, :] & k_mask[:, None]
        mean, a, b, const = gradient_vectors(bn, sums, inv_count, k, K, k_mask, FORM)
        dz = load_gradient(g, z, g_row[:, None] + (tap_offset + k)[None, :], g_mask, mean, a, b, const, FORM)
        if MERGE > 1:
            # Block-diagonal: a weight exists where input and output channel are of one group.
            w_mask = w_mask & ((k_in // GROUP_K)[:, None] == (c_in // GROUP_C)[None, :])
            w_offset = (k * (R * S * GROUP_C))[:, None] + ((r * S + s) * GROUP_C + c_in % GROUP_C)[None, :]
        else:
            w_offset = (k * (R * S * block_c))[:, None] + ((r * S + s) * block_c + c_in)[None, :]
        acc = dot(dz, tl.load(w + w_offset, mask=w_mask, other=0.0), acc, PRECISION)

        k0 += BLOCK_K
        if R * S > 1:
            k0, tap_h, tap_w = next_step(k0, block_k, tap_h, tap_w, count_s)

    offsets = dx_row[:, None] + c[None, :]
    out_mask = row_mask[:, None] & c_mask[None, :]
    if HAS_RESIDUAL:
        at = offsets
        on_grid = out_mask
        if RES_H > 1 or RES_W > 1:
            grid_row = (n * tl.cdiv(H, RES_H) + h // RES_H) * tl.cdiv(W, RES_W) + v // RES_W
            at = row_offset(grid_row, C, WIDE)[:, None] + c[None, :]
            on_grid = out_mask & ((h % RES_H == 0) & (v % RES_W == 0))[:, None]
        acc += tl.load(residual + at, mask=on_grid, other=0.0).to(tl.float32)
    if BY_OUTPUT:
        closed = tl.load(y + offsets, mask=out_mask, other=0.0).to(tl.float32) <= 0
        stored = cast(tl.where(closed, 0.0, acc), dx.dtype.element_ty)
        tl.store(dx + offsets, stored, mask=out_mask)
        stored = tl.where(out_mask, stored.to(tl.float32), 0.0)
        out = parts + part.to(tl.int64) * (3 * C) + c
        tl.store(out, tl.sum(stored, 0), mask=c_mask)
        if HAS_PREV:
            _store_dgamma(out + C, stored, prev_z, prev_bn, offsets, c, c_mask, out_mask)
        if HAS_SIDE:
            _store_dgamma(out + 2 * C, stored, side_z, side_bn, offsets, c, c_mask, out_mask)
    elif DRELU:
        scale, shift = bn_scale_shift(prev_bn, c, C, c_mask)
        z_tile = tl.load(prev_z + offsets, mask=out_mask, other=0.0)
        stored = cast(drelu(acc, z_tile, scale[None, :], shift[None, :]), dx.dtype.element_ty)
        mean = tl.load(prev_bn + c, mask=c_mask, other=0.0)
        invstd = tl.load(prev_bn + C + c, mask=c_mask, other=0.0)
        dbeta, dgamma = tile_sums(stored.to(tl.float32), z_tile, mean, out_mask)
        out = parts + part.to(tl.int64) * (2 * C) + c
        tl.store(out, dbeta, mask=c_mask)
        tl.store(out + C, invstd * dgamma, mask=c_mask)
        tl.store(dx + offsets, stored, mask=out_mask)
    else:
        tl.store(dx + offsets, cast(acc, dx.dtype.element_ty), mask=out_mask)


def _step(stride: int, dilation: int) -> tuple[int, int]:
    """(taps of a class are this far apart, the rows of the gradient that they meet this far)."""
    common = math.gcd(stride, dilation)
    return stride // common, dilation // common


def conv_dgrad(
    g: Tensor,
    z: Tensor | None,
    bn: Tensor | None,
    sums: Tensor | None,
    inv_count: float,
    w: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    residual_stride: Sequence[int],
    prev_z: Tensor | None,
    prev_bn: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As ``fusedres.ops.conv_dgrad``, for float32, bfloat16 and float16."""
    conv = (w, input_size, stride, padding, dilation, groups)
    tail = (residual, residual_stride, None, prev_z, prev_bn, None, None)
    dx, parts = _conv_dgrad(g, z, bn, sums, inv_count, *conv, *tail)
    if prev_z is None:
        return dx, parts.view(0)
    c = dx.shape[1]
    return dx, sum_parts(parts.view(-1, SUM_ROWS * c)).view(SUM_ROWS, c)


def conv_dgrad_drelu_dbn(
    g: Tensor,
    z: Tensor | None,
    bn: Tensor | None,
    sums: Tensor | None,
    inv_count: float,
    w: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor,
    y: Tensor,
    prev_z: Tensor | None,
    prev_bn: Tensor | None,
    side_z: Tensor | None,
    side_bn: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``fusedres.ops.conv_dgrad_drelu_dbn``, for float32, bfloat16 and float16."""
    conv = (w, input_size, stride, padding, dilation, groups)
    dx, parts = _conv_dgrad(g, z, bn, sums, inv_count, *conv, residual, (1, 1), y, prev_z, prev_bn, side_z, side_bn)
    return dx, *merge_sums(parts, prev_bn, side_bn)


def _conv_dgrad(
    g: Tensor,
    z: Tensor | None,
    bn: Tensor | None,
    sums: Tensor | None,
    inv_count: float,
    w: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    residual_stride: Sequence[int],
    y: Tensor | None,
    prev_z: Tensor | None,
    prev_bn: Tensor | None,
    side_z: Tensor | None,
    side_bn: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dx, and of each program the sums over its pixels: none, two rows, or with ``y`` the three of ``merge_sums``)."""
    size = (g.shape[0], w.shape[1] * groups, *input_size)
    problem = ConvProblem.of(torch.Size(size), w, stride, padding, dilation, groups)
    grid_size = [out_size(length, 1, step, 0, 1) for length, step in zip(input_size, residual_stride, strict=True)]
    k = problem.K
    check_operands(
        g,
        g=(g, (problem.N, k, problem.P, problem.Q), g.dtype),
        z=(z, g.shape, g.dtype),
        bn=(bn, (BN_ROWS, k), torch.float32),
        sums=(sums, (SUM_ROWS, k), torch.float32),
        w=(w, w.shape, g.dtype),
        residual=(residual, (*size[:2], *grid_size), g.dtype),
        y=(y, size, g.dtype),
        prev_z=(prev_z, size, g.dtype),
        prev_bn=(prev_bn, (BN_ROWS, problem.C), torch.float32),
        side_z=(side_z, size, g.dtype),
        side_bn=(side_bn, (BN_ROWS, problem.C), torch.float32),
    )
    check_pixels(problem)
    tile = configs.choose(configs.machine(g.device).dgrad, g.element_size(), *tile_class("conv_dgrad", problem))
    by_descriptors = tile.descriptors and conv_descriptor.serves(
        problem, g, w, residual, bn, y, prev_z, residual_stride=residual_stride
    )
    maps = (g, z, w, residual, y, prev_z, side_z)
    g, z, w, residual, y, prev_z, side_z = (None if t is None else channels_last(t) for t in maps)
    assert g is not None
    assert w is not None
    if by_descriptors:
        return conv_descriptor.convolve(g, w, None, residual, problem, tile, mirrored=True)
    dx = new_activation(g, size)
    blocks = blocking(problem)
    classes = problem.stride[0] * problem.stride[1]
    class_h, class_w = cdiv(problem.H, problem.stride[0]), cdiv(problem.W, problem.stride[1])
    gemm_m = problem.N * class_h * class_w
    tiles_m = cdiv(gemm_m, tile.block_m)
    tiles_n = blocks.count * cdiv(blocks.c, tile.block_n)
    masks = y is not None or prev_z is not None
    rows = SUM_ROWS if y is None else ROWS.value
    parts = g.new_empty((tiles_m * classes if masks else 0, rows, problem.C), dtype=torch.float32)
    step_h, jump_h = _step(problem.stride[0], problem.dilation[0])
    step_w, jump_w = _step(problem.stride[1], problem.dilation[1])
    if tiles_m:
        run(
            conv_dgrad_kernel,
            (tiles_m * tiles_n * classes,),
            g,
            z,
            contiguous(bn),
            contiguous(sums),
            inv_count,
            w,
            residual,
            y,
            prev_z,
            contiguous(prev_bn),
            side_z,
            contiguous(side_bn),
            dx,
            parts,
            problem.H,
            problem.W,
            problem.C,
            k,
            problem.P,
            problem.Q,
            class_w,
            class_h * class_w,
            divisor(class_w),
            divisor(class_h * class_w),
            gemm_m,
            tiles_m,
            tiles_n,
            blocks.c,
            blocks.k,
            **geometry(problem),
            STEP_H=step_h,
            STEP_W=step_w,
            JUMP_H=jump_h,
            JUMP_W=jump_w,
            **blocks.constants(divides=blocks.merge > 1),
            EVEN_K=blocks.k % tile.block_k == 0 and k % blocks.k == 0,
            WIDE=is_wide(g, dx),
            FORM=gradient_form(bn, inv_count),
            HAS_RESIDUAL=residual is not None,
            RES_H=residual_stride[0],
            RES_W=residual_stride[1],
            DRELU=prev_z is not None,
            BY_OUTPUT=y is not None,
            HAS_PREV=prev_z is not None,
            HAS_SIDE=side_z is not None,
            PRECISION=precision(g.dtype),
            **tile_constants(tile),
        )
    return dx, parts

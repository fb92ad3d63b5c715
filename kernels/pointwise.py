"""The small products of a closed unit (docs/calculus.md), between the vendor's matrix products: one launch each.

w: (K, C) row-major, the unit's weight          moments: (C+1, C) float32, rows the second moments S, then the mean
bn: (4, K), sums: (2, K) float32                 ws: (K, C) float32, the product W S
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.launch import cdiv, run
from fusedres.kernels.prologue import dbn_factors, dbn_slope
from fusedres.kernels.tails import tile_of_matrix, tile_shape
from fusedres.kernels.tile import cast, dot
from fusedres.layout import STAT_ROWS, SUM_ROWS

_BLOCK_K, _BLOCK_C = 8, 128
_PRODUCT_BLOCK = 64
_WARPS = 4


def matrix(w: Tensor) -> Tensor:
    """A pointwise weight (K, C, 1, 1) as (K, C), dense."""
    return w.reshape(w.shape[0], w.shape[1]).contiguous()


@triton.jit
def _tile(k, c, start, K, C, BLOCK_C: tl.constexpr):
    """(columns, offsets, mask) of a block of a (K, C) matrix whose columns begin at ``start``."""
    column = start + c
    return column, k[:, None] * C + column[None, :], (k < K)[:, None] & (column < C)[None, :]


@triton.jit
def product_kernel(
    a,  # (M, K) of any strides and dtype
    b,  # (K, N) row-major, of any dtype
    bn,
    sums,
    out,  # (M, N) float32
    inv_count,
    M,
    N,
    K,
    stride_m,
    stride_k,
    HAS_SLOPE: tl.constexpr,  # row k of ``b`` is multiplied by the slope that the backward of BN has in channel k
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out = a @ b``, to float32's precision: three products of TF32 for each of float32."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a_offsets = m[:, None] * stride_m + k[None, :] * stride_k
        left = tl.load(a + a_offsets, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        right = tl.load(b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        right = right.to(tl.float32)
        if HAS_SLOPE:
            _, _, slope, _ = dbn_factors(bn, sums, inv_count, k, K, k < K)
            right *= slope[:, None]
        acc = dot(left, right, acc, "tf32x3")
    tl.store(out + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


def _product(
    a: Tensor, b: Tensor, bn: Tensor | None = None, sums: Tensor | None = None, inv_count: float = 0.0
) -> Tensor:
    """``a @ b`` (M, N) float32 of small matrices, ``b`` dense; with ``bn`` its rows are multiplied by their slopes."""
    (m, k), n = a.shape, b.shape[1]
    out = b.new_empty((m, n), dtype=torch.float32)
    run(
        product_kernel,
        (cdiv(m, _PRODUCT_BLOCK), cdiv(n, _PRODUCT_BLOCK)),
        a,
        b,
        bn,
        sums,
        out,
        inv_count,
        m,
        n,
        k,
        *a.stride(),
        HAS_SLOPE=bn is not None,
        BLOCK_M=_PRODUCT_BLOCK,
        BLOCK_N=_PRODUCT_BLOCK,
        BLOCK_K=32,
        num_warps=_WARPS,
    )
    return out


def weight_moments(w: Tensor, moments: Tensor) -> Tensor:
    """``W S``: (K, C) float32."""
    return _product(w, moments[:-1])


@triton.jit
def centre_kernel(x, mean, out, m, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """``x`` less its mean rounded to the dtype of ``x``."""
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, offsets, mask = tile_of_matrix(tl.program_id(0).to(tl.int64) * BLOCK_M, m, C, column, BLOCK_M)
    value = tl.load(x + start + offsets, mask=mask, other=0.0)
    pivot = cast(tl.load(mean + column, mask=column < C, other=0.0), value.dtype).to(tl.float32)
    tl.store(out + start + offsets, cast(value.to(tl.float32) - pivot[None, :], value.dtype), mask=mask)


@triton.jit
def moments_kernel(products, mean, centred, moments, m, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """``products`` of what ``centre_kernel`` left, less what it left of the mean; below them the mean itself. Of
    ``centred`` the dtype alone is looked at: the mean was rounded to it."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (k < C)[:, None] & (column < C)[None, :]
    mean_k = tl.load(mean + k, mask=k < C, other=0.0)
    mean_c = tl.load(mean + column, mask=column < C, other=0.0)
    left_k = mean_k - cast(mean_k, centred.dtype.element_ty).to(tl.float32)
    left_c = mean_c - cast(mean_c, centred.dtype.element_ty).to(tl.float32)
    offsets = k[:, None] * C + column[None, :]
    second = tl.load(products + offsets, mask=mask, other=0.0) - m * left_k[:, None] * left_c[None, :]
    tl.store(moments + offsets, second, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(moments + C * C + column, mean_c, mask=column < C)


def centre(rows: Tensor, mean: Tensor) -> Tensor:
    """``rows`` (M, C) of a half dtype less ``mean`` (C,) float32, rounded to that dtype first."""
    m, c = rows.shape
    out, (block_m, block_c) = torch.empty_like(rows), tile_shape(c, rows.element_size())
    if m:
        grid = (cdiv(m, block_m), cdiv(c, block_c))
        run(centre_kernel, grid, rows, mean, out, m, c, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=_WARPS)
    return out


def finish_moments(products: Tensor, mean: Tensor, centred: Tensor) -> Tensor:
    """``products`` (C, C) of ``centred`` (M, C), which was less ``mean`` -> moments (C+1, C) float32."""
    m, c = centred.shape
    moments = products.new_empty(c + 1, c)
    grid = (cdiv(c, _BLOCK_K), cdiv(c, _BLOCK_C))
    blocks = {"BLOCK_K": _BLOCK_K, "BLOCK_C": _BLOCK_C, "num_warps": _WARPS}
    run(moments_kernel, grid, products, mean, centred, moments, float(m), c, **blocks)
    return moments


@triton.jit
def pointwise_stats_kernel(
    w, ws, moments, bias, stats, count, K, C, HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mean = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        column, offsets, mask = _tile(k, tl.arange(0, BLOCK_C), start, K, C, BLOCK_C)
        weight = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
        mean += weight * tl.load(moments + C * C + column, mask=column < C, other=0.0)[None, :]
        m2 += weight * tl.load(ws + offsets, mask=mask, other=0.0)
    mean_k, m2_k = tl.sum(mean, 1), tl.sum(m2, 1)
    if HAS_BIAS:
        mean_k += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(stats + k, tl.zeros((BLOCK_K,), tl.float32) + count, mask=k < K)
    tl.store(stats + K + k, mean_k, mask=k < K)
    tl.store(stats + 2 * K + k, tl.where(m2_k < 0, 0.0, m2_k), mask=k < K)


def pointwise_stats(moments: Tensor, w: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """As ``fusedres.ops.pointwise_stats``."""
    w = matrix(w)
    k, c = w.shape
    stats = moments.new_empty(STAT_ROWS, k)
    run(
        pointwise_stats_kernel,
        (cdiv(k, _BLOCK_K),),
        w,
        weight_moments(w, moments),
        moments,
        bias,
        stats,
        float(count),
        k,
        c,
        HAS_BIAS=bias is not None,
        BLOCK_K=_BLOCK_K,
        BLOCK_C=_BLOCK_C,
        num_warps=_WARPS,
    )
    return stats


@triton.jit
def pointwise_wgrad_kernel(
    product, sum_g, w, ws, moments, bn, dw, sums, inv_count, K, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """``product`` is g^T a of the input as it is; less ``sum_g`` times its mean it is that of the centred input."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    dbeta = tl.load(sum_g + k, mask=k < K, other=0.0)
    dgamma = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        column, offsets, mask = _tile(k, tl.arange(0, BLOCK_C), start, K, C, BLOCK_C)
        mean = tl.load(moments + C * C + column, mask=column < C, other=0.0)
        centred = tl.load(product + offsets, mask=mask, other=0.0) - dbeta[:, None] * mean[None, :]
        dgamma += centred * tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
    invstd = tl.load(bn + K + k, mask=k < K, other=0.0)
    dgamma_k = invstd * tl.sum(dgamma, 1)
    tl.store(sums + k, dbeta, mask=k < K)
    tl.store(sums + K + k, dgamma_k, mask=k < K)
    a = tl.load(bn + 2 * K + k, mask=k < K, other=0.0)
    b = dbn_slope(a, invstd, dgamma_k, inv_count)
    for start in range(0, C, BLOCK_C):
        column, offsets, mask = _tile(k, tl.arange(0, BLOCK_C), start, K, C, BLOCK_C)
        mean = tl.load(moments + C * C + column, mask=column < C, other=0.0)
        centred = tl.load(product + offsets, mask=mask, other=0.0) - dbeta[:, None] * mean[None, :]
        gradient = a[:, None] * centred + b[:, None] * tl.load(ws + offsets, mask=mask, other=0.0)
        tl.store(dw + offsets, cast(gradient, dw.dtype.element_ty), mask=mask)


def pointwise_wgrad_of_product(
    product: Tensor, sum_g: Tensor, moments: Tensor, w: Tensor, bn: Tensor, inv_count: float
) -> tuple[Tensor, Tensor]:
    """``fusedres.ops.pointwise_wgrad`` given ``product = g^T a`` (K, C) float32, ``a`` not centred: (dw, sums)."""
    rows = matrix(w)
    k, c = rows.shape
    dw, sums = torch.empty_like(rows), product.new_empty(SUM_ROWS, k)
    run(
        pointwise_wgrad_kernel,
        (cdiv(k, _BLOCK_K),),
        product,
        sum_g.contiguous(),
        rows,
        weight_moments(rows, moments),
        moments,
        bn,
        dw,
        sums,
        inv_count,
        k,
        c,
        BLOCK_K=_BLOCK_K,
        BLOCK_C=_BLOCK_C,
        num_warps=_WARPS,
    )
    return dw.view(w.shape), sums


@triton.jit
def scaled_weights_kernel(w, bn, sums, from_g, inv_count, K, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """``diag(a) W`` in the dtype of ``w``."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    _, offsets, mask = _tile(k, tl.arange(0, BLOCK_C), tl.program_id(1) * BLOCK_C, K, C, BLOCK_C)
    _, a, _, _ = dbn_factors(bn, sums, inv_count, k, K, k < K)
    value = tl.load(w + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(from_g + offsets, cast(a[:, None] * value, from_g.dtype.element_ty), mask=mask)


@triton.jit
def constant_kernel(
    from_g, product, sums, moments, from_x, constant, inv_count, K, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """``product`` (C, C) rounded to ``from_x``, and the constant with which ``dx`` sums to zero as both are rounded."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < K)[:, None] & (column < C)[None, :]
        dbeta = tl.load(sums + k, mask=k < K, other=0.0) * inv_count
        total += dbeta[:, None] * tl.load(from_g + k[:, None] * C + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < C)[:, None] & (column < C)[None, :]
        offsets = k[:, None] * C + column[None, :]
        rounded = cast(tl.load(product + offsets, mask=mask, other=0.0), from_x.dtype.element_ty)
        tl.store(from_x + offsets, rounded, mask=mask)
        mean = tl.load(moments + C * C + k, mask=k < C, other=0.0)
        total += mean[:, None] * rounded.to(tl.float32)
    tl.store(constant + column, -tl.sum(total, 0), mask=column < C)


def pointwise_dgrad_operands(
    moments: Tensor, w: Tensor, bn: Tensor, sums: Tensor, inv_count: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(from_g (K, C), from_x (C, C), both in the dtype of ``w``; constant (C,) float32): per pixel
    ``dx = g from_g + a from_x + constant``.

    A BN's gradients sum to zero over the batch. The constant sees to that with the matrices as they are rounded: their
    error would be the same at every pixel, and grow with the sums that the BN before takes of them.
    """
    w = matrix(w)
    k, c = w.shape
    from_g = torch.empty_like(w)
    grid = (cdiv(k, _BLOCK_K), cdiv(c, _BLOCK_C))
    blocks = {"BLOCK_K": _BLOCK_K, "BLOCK_C": _BLOCK_C, "num_warps": _WARPS}
    run(scaled_weights_kernel, grid, w, bn, sums, from_g, inv_count, k, c, **blocks)
    product = _product(w.t(), w, bn, sums, inv_count)
    from_x, constant = w.new_empty(c, c), moments.new_empty(c)
    blocks = {"BLOCK_K": 64, "BLOCK_C": 16, "num_warps": _WARPS}
    operands = (from_g, product, sums, moments, from_x, constant, inv_count, k, c)
    run(constant_kernel, (cdiv(c, 16),), *operands, **blocks)
    return from_g, from_x, constant

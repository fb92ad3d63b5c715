"""BN's vectors: from statistics (``bn_finalize``), from constants (``bn_constants``), into a conv (``bn_fold``).

stats: (3, K) float32, rows count, mean, M2          bn: (4, K) float32, rows mean, invstd, scale, shift
weight, bias, running_mean, running_var: (K,) float32 | bfloat16 | float16          num_batches_tracked: () int64

A few thousand numbers: what costs is the launch, so each op is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres import reference
from fusedres.kernels.launch import cdiv, run
from fusedres.kernels.tile import cast
from fusedres.layout import BN_ROWS

_BLOCK = 1024
_WARPS = 4


@triton.jit
def _store_bn(bn, weight, bias, mean, var, eps, channels, k, mask, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Rows of ``bn`` for a block of channels, root and quotient correctly rounded: here that costs nothing."""
    invstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = invstd
    if HAS_WEIGHT:
        scale = tl.load(weight + channels, mask=mask).to(tl.float32) * invstd
    shift = -mean * scale
    if HAS_BIAS:
        shift = tl.load(bias + channels, mask=mask).to(tl.float32) - mean * scale
    tl.store(bn + channels, mean, mask=mask)
    tl.store(bn + k + channels, invstd, mask=mask)
    tl.store(bn + 2 * k + channels, scale, mask=mask)
    tl.store(bn + 3 * k + channels, shift, mask=mask)


@triton.jit
def _move_running(running, batch, factor, channels, mask):
    before = tl.load(running + channels, mask=mask).to(tl.float32)
    after = before * (1 - factor) + batch * factor
    tl.store(running + channels, cast(after, running.dtype.element_ty), mask=mask)


@triton.jit
def bn_finalize_kernel(
    stats,
    weight,
    bias,
    running_mean,
    running_var,
    counter,
    bn,
    momentum,
    eps,
    k,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RUNNING_MEAN: tl.constexpr,
    HAS_RUNNING_VAR: tl.constexpr,
    HAS_COUNTER: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for all channels, so that the counter is raised once and after everybody has read it."""
    factor = momentum
    if HAS_COUNTER:
        raised = tl.load(counter) + 1
        if CUMULATIVE:
            factor = tl.div_rn(1.0, raised.to(tl.float32))
        tl.debug_barrier()
        tl.store(counter, raised)
    for start in range(0, k, BLOCK):
        channels = start + tl.arange(0, BLOCK)
        mask = channels < k
        count = tl.load(stats + channels, mask=mask, other=1.0)
        mean = tl.load(stats + k + channels, mask=mask, other=0.0)
        m2 = tl.load(stats + 2 * k + channels, mask=mask, other=0.0)
        if HAS_RUNNING_MEAN:
            _move_running(running_mean, mean, factor, channels, mask)
        if HAS_RUNNING_VAR:
            _move_running(running_var, tl.div_rn(m2, count - 1), factor, channels, mask)
        var = tl.div_rn(m2, count)
        _store_bn(bn, weight, bias, mean, var, eps, channels, k, mask, HAS_WEIGHT, HAS_BIAS)


def bn_finalize(
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """As ``fusedres.ops.bn_finalize``. Running statistics that are views with gaps go through the reference."""
    operands = (stats, weight, bias, running_mean, running_var)
    if not all(t is None or t.is_contiguous() for t in operands):
        return reference.bn_finalize(stats, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    bn = stats.new_empty(BN_ROWS, stats.shape[1])
    is_cumulative = momentum is None and num_batches_tracked is not None
    run(
        bn_finalize_kernel,
        (1,),
        *operands,
        num_batches_tracked,
        bn,
        momentum or 0.0,  # without a counter nothing moves, as in torch.nn.BatchNorm2d
        eps,
        stats.shape[1],
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RUNNING_MEAN=running_mean is not None,
        HAS_RUNNING_VAR=running_var is not None,
        HAS_COUNTER=num_batches_tracked is not None,
        CUMULATIVE=is_cumulative,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return bn


@triton.jit
def bn_constants_kernel(
    mean, var, weight, bias, bn, eps, k, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < k
    mean_ = tl.load(mean + channels, mask=mask, other=0.0).to(tl.float32)
    var_ = tl.load(var + channels, mask=mask, other=1.0).to(tl.float32)
    _store_bn(bn, weight, bias, mean_, var_, eps, channels, k, mask, HAS_WEIGHT, HAS_BIAS)


def bn_constants(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """As ``fusedres.ops.bn_constants``."""
    operands = (mean, var, weight, bias)
    if dtype != torch.float32 or not all(t is None or t.is_contiguous() for t in operands):
        return reference.bn_constants(mean, var, weight, bias, eps, dtype)
    k = mean.shape[0]
    bn = mean.new_empty(BN_ROWS, k, dtype=dtype)
    grid = (cdiv(k, _BLOCK),)
    run(
        bn_constants_kernel,
        grid,
        *operands,
        bn,
        eps,
        k,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return bn


@triton.jit
def bn_fold_kernel(w, bias, bn, folded_w, folded_bias, k, row_size, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """A program for a block of one filter, ``row_size`` numbers; the first of a filter folds its bias too."""
    channel = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < row_size
    scale = tl.load(bn + 2 * k + channel)
    row = channel.to(tl.int64) * row_size
    value = tl.load(w + row + offsets, mask=mask).to(tl.float32) * scale
    tl.store(folded_w + row + offsets, cast(value, folded_w.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        shift = tl.load(bn + 3 * k + channel)
        if HAS_BIAS:
            shift += tl.load(bias + channel).to(tl.float32) * scale
        tl.store(folded_bias + channel, cast(shift, folded_bias.dtype.element_ty))


def bn_fold(w: Tensor, bias: Tensor | None, bn: Tensor) -> tuple[Tensor, Tensor]:
    """As ``fusedres.ops.bn_fold``; ``w`` keeps its memory format, dense in one or the other."""
    is_dense = w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last)
    if bn.dtype != torch.float32 or not is_dense or not (bias is None or bias.is_contiguous()):
        return reference.bn_fold(w, bias, bn)
    k, row_size = w.shape[0], w[0].numel() if w.shape[0] else 0
    folded_w, folded_bias = torch.empty_like(w), w.new_empty(k)
    if w.numel():
        grid = (k, cdiv(row_size, _BLOCK))
        run(
            bn_fold_kernel,
            grid,
            w,
            bias,
            bn,
            folded_w,
            folded_bias,
            k,
            row_size,
            HAS_BIAS=bias is not None,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return folded_w, folded_bias

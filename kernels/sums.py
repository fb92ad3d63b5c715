"""Sums over all pixels by partials: how many programs share them, and the second, tiny launch that adds them up.

partials: (programs, rows, c) float32, ``rows`` = sum(g), sum(g*(z - mean)) and, if there is a second branch, its own.
How the pixels are divided follows from shapes alone, and nothing is added atomically: sums are bitwise repeatable.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.launch import cdiv, run
from fusedres.layout import SUM_ROWS, acc_dtype

ROWS = tl.constexpr(3)
PROGRAMS = 1024  # about what the largest GPU here keeps in flight at 8 blocks of 4 warps an SM
_BLOCK_C = 32
_BLOCK_P = 128


def rows_each(m: int, c: int, block_m: int, block_c: int) -> int:
    """How many of ``m`` rows each program sums: whole tiles, few enough programs that their partials stay small."""
    programs = max(PROGRAMS // cdiv(c, block_c), 1)
    return cdiv(cdiv(m, programs), block_m) * block_m


@triton.jit
def _column_sums(partials, programs, row, channels, c, mask, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        offsets = (part * ROWS + row)[:, None] * c + channels[None, :]
        total += tl.load(partials + offsets, mask=(part < programs)[:, None] & mask[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def merge_sums_kernel(
    partials,
    bn,
    residual_bn,
    sums,
    residual_sums,
    programs,
    c,
    HAS_Z: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``dbeta = sum(g)`` and ``dgamma = invstd * sum(g*(z - mean))`` of one branch or two."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channels < c
    dbeta = _column_sums(partials, programs, 0, channels, c, mask, BLOCK_P, BLOCK_C)
    tl.store(sums + channels, dbeta, mask=mask)
    if HAS_Z:
        dgamma = _column_sums(partials, programs, 1, channels, c, mask, BLOCK_P, BLOCK_C)
        invstd = tl.load(bn + c + channels, mask=mask, other=0.0)
        tl.store(sums + c + channels, invstd * dgamma, mask=mask)
    if HAS_RESIDUAL:
        dgamma = _column_sums(partials, programs, 2, channels, c, mask, BLOCK_P, BLOCK_C)
        invstd = tl.load(residual_bn + c + channels, mask=mask, other=0.0)
        tl.store(residual_sums + channels, dbeta, mask=mask)
        tl.store(residual_sums + c + channels, invstd * dgamma, mask=mask)


def merge_sums(partials: Tensor, bn: Tensor | None, residual_bn: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sums (2, c), or (1, c) without ``bn``; residual_sums (2, c), or (0,) without ``residual_bn``)."""
    programs, _, c = partials.shape
    sums = partials.new_empty(1 if bn is None else SUM_ROWS, c)
    residual_sums = partials.new_empty(0) if residual_bn is None else partials.new_empty(SUM_ROWS, c)
    if c:
        run(
            merge_sums_kernel,
            (cdiv(c, _BLOCK_C),),
            partials,
            bn,
            residual_bn,
            sums,
            residual_sums,
            programs,
            c,
            HAS_Z=bn is not None,
            HAS_RESIDUAL=residual_bn is not None,
            BLOCK_P=_BLOCK_P,
            BLOCK_C=_BLOCK_C,
            num_warps=8,
        )
    return sums, residual_sums


def new_partials(like: Tensor, m: int, c: int, each: int) -> Tensor:
    """Room for the partials of ``m`` rows; no program at all where ``m`` is 0, and the sums come out zero."""
    return like.new_empty((cdiv(m, each) if m else 0, ROWS.value, c), dtype=acc_dtype(like.dtype))

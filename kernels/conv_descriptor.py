"""Convolutions of stride 1 through tensor descriptors: hardware copies boxes of a map and fills what is outside with
zeros (TMA, compute capability 9.0 and later). ``conv_fprop`` and ``conv_dgrad`` come here where their tile asks for it.

A tile of gemm_m is a box of pixels; tap (r, s) reads the box that lies (r, s) further. The input gradient is the same
convolution of the gradient with the taps mirrored. Addresses and masks are computed by no thread.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels import configs
from fusedres.kernels.configs import Tile
from fusedres.kernels.epilogue import store_statistics
from fusedres.kernels.launch import Boxes, cdiv, contiguous, run, tile_constants
from fusedres.kernels.prologue import relu
from fusedres.kernels.tile import cast, dot, next_step, tile_of
from fusedres.layout import STAT_ROWS, new_activation
from fusedres.problem import ConvProblem, is_plain_gemm


@triton.jit
def conv_descriptor_kernel(
    x,  # (N, H, W, C) in boxes (BOX_N, BOX_H, BOX_W, BLOCK_K)
    w,  # (R*S, K, C) in boxes (1, BLOCK_N, BLOCK_K); MIRRORED: (R*S, C, K) in boxes (1, BLOCK_K, BLOCK_N)
    bias,  # (K,)
    residual,  # (N, P, Q, K) in boxes (BOX_N, BOX_H, BOX_W, BLOCK_N)
    y,  # (N, P, Q, K) in boxes (BOX_N, BOX_H, BOX_W, BLOCK_N)
    parts,  # (tiles_m, 3, K) float32
    C,
    K,
    N,
    P,
    Q,
    boxes_h,
    boxes_w,
    tiles_m,
    tiles_n,
    R: tl.constexpr,
    S: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    MIRRORED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    GENSTATS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    SWAPPED: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,  # BOX_N * BOX_H * BOX_W
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    turns = 1  # a constant: without a loop around it the pipeline's memory serves the store too
    if PERSISTENT:
        turns = tl.cdiv(tiles_m * tiles_n - tl.program_id(0), tl.num_programs(0))
    for turn in tl.range(0, turns, flatten=PERSISTENT):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        n = tile_m // (boxes_h * boxes_w) * BOX_N
        p = tile_m // boxes_w % boxes_h * BOX_H
        q = tile_m % boxes_w * BOX_W
        k0 = tile_n * BLOCK_N

        acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAPPED else [BLOCK_M, BLOCK_N], tl.float32)
        c0 = 0
        r = 0
        s = 0
        for _ in range(0, R * S * tl.cdiv(C, BLOCK_K)):
            tap = r * S + s
            if MIRRORED:
                a = x.load([n, p + PAD_H - r * DIL_H, q + PAD_W - s * DIL_W, c0]).reshape(BLOCK_M, BLOCK_K)
                b = w.load([tap, c0, k0]).reshape(BLOCK_K, BLOCK_N)
            else:
                a = x.load([n, p - PAD_H + r * DIL_H, q - PAD_W + s * DIL_W, c0]).reshape(BLOCK_M, BLOCK_K)
                b = w.load([tap, k0, c0]).reshape(BLOCK_N, BLOCK_K).T
            acc = dot(b.T, a.T, acc, "ieee") if SWAPPED else dot(a, b, acc, "ieee")
            c0 += BLOCK_K
            if R * S > 1:
                c0, r, s = next_step(c0, C, r, s, S)
        if SWAPPED:
            acc = acc.T

        k = k0 + tl.arange(0, BLOCK_N)
        k_mask = k < K
        if HAS_BIAS:
            acc += tl.load(bias + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            acc += residual.load([n, p, q, k0]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
        if RELU:
            acc = relu(acc)
        stored = cast(acc, y.dtype)
        y.store([n, p, q, k0], stored.reshape(BOX_N, BOX_H, BOX_W, BLOCK_N))
        if GENSTATS:
            row = tl.arange(0, BLOCK_M)
            row_mask = (n + row // (BOX_H * BOX_W) < N) & (p + row // BOX_W % BOX_H < P) & (q + row % BOX_W < Q)
            store_statistics(parts, tile_m, stored.to(tl.float32), row_mask, k, K, k_mask)


def serves(
    problem: ConvProblem,
    x: Tensor,
    w: Tensor,
    residual: Tensor | None,
    *others: object | None,
    residual_stride: Sequence[int] = (1, 1),
) -> bool:
    """Whether descriptors can serve a conv, ``x`` being what it reads: stride 1, half dtypes, channels and addresses in
    units of 16 bytes, and nothing done to ``x`` or asked of the output that ``others`` would be the operands of."""
    unit = 16 // x.element_size()
    return (
        len(configs.machine(x.device).descriptors) > 0
        and x.element_size() == 2
        and x.numel() * w.numel() > 0
        and (*problem.stride, *residual_stride, problem.groups) == (1, 1, 1, 1, 1)
        and problem.C % unit == problem.K % unit == 0
        and all(t is None or t.data_ptr() % 16 == 0 for t in (x, w, residual))
        and all(other is None for other in others)
    )


def candidates(op: str, problem: ConvProblem, args: Sequence[Any]) -> list[Tile]:
    """The tiles with descriptors that are worth timing for a call of ``op`` in ``fusedres.ops``."""
    if op == "conv_fprop":
        x, w, _, residual, in_bn, *_ = args
        is_served, gemm_n = serves(problem, x, w, residual, in_bn), problem.K
    elif op == "conv_dgrad":
        x, _, bn, _, _, w, *_, residual, step, prev_z, _ = args
        is_served, gemm_n = serves(problem, x, w, residual, bn, prev_z, residual_stride=step), problem.C
    else:
        return []
    return configs.worth_timing(configs.machine(x.device).descriptors, gemm_n) if is_served else []


@functools.cache
def box(n: int, p: int, q: int, block_m: int) -> tuple[int, int, int]:
    """(images, rows, columns) whose product is ``block_m``, a power of two each: such that the fewest cover n*p*q
    pixels; of those the widest, for its pixels lie together in memory."""
    powers = [1 << i for i in range(block_m.bit_length())]
    sizes = [(a, b, block_m // (a * b)) for a in powers for b in powers if a * b <= block_m]
    return min(sizes, key=lambda size: (_count(n, p, q, size), -size[2], -size[1]))


def _count(n: int, p: int, q: int, size: tuple[int, int, int]) -> int:
    return cdiv(n, size[0]) * cdiv(p, size[1]) * cdiv(q, size[2])


def convolve(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    problem: ConvProblem,
    tile: Tile,
    *,
    relu: bool = False,
    genstats: bool = False,
    mirrored: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, statistics of its tiles (tiles, 3, K)) of a conv that ``serves`` allows, operands channels_last and checked.

    ``mirrored``: ``x`` is the gradient (N, K, P, Q) at the output of ``problem``, y that of the input (N, C, H, W).
    """
    p = problem
    c, k = (p.K, p.C) if mirrored else (p.C, p.K)
    y = new_activation(x, (p.N, k, p.H, p.W) if mirrored else (p.N, k, p.P, p.Q))
    (n, h, v), (out_h, out_w) = (x.shape[0], *x.shape[2:]), y.shape[2:]
    if is_plain_gemm((p.R, p.S), p.stride, p.padding, p.groups):  # one line of pixels
        n, h, v, out_h, out_w = 1, 1, p.gemm_m, 1, p.gemm_m
    pixels = box(n, out_h, out_w, tile.block_m)
    tiles_m, tiles_n = _count(n, out_h, out_w, pixels), cdiv(k, tile.block_n)
    parts = x.new_empty((tiles_m if genstats else 0, STAT_ROWS, k), dtype=torch.float32)
    outputs = Boxes.of((n, out_h, out_w, k), (*pixels, tile.block_n))
    w_block = (tile.block_k, tile.block_n) if mirrored else (tile.block_n, tile.block_k)
    swapped = configs.machine(x.device).swaps_boxes and p.R * p.S > 1
    grid = tiles_m * tiles_n
    if tile.programs:
        grid = min(grid, tile.programs * configs.multiprocessors(x.device))
    if tiles_m:
        run(
            conv_descriptor_kernel,
            (grid,),
            x,
            w,
            contiguous(bias),
            residual,
            y,
            parts,
            c,
            k,
            n,
            out_h,
            out_w,
            cdiv(out_h, pixels[1]),
            cdiv(out_w, pixels[2]),
            tiles_m,
            tiles_n,
            boxes={
                "x": Boxes.of((n, h, v, c), (*pixels, tile.block_k)),
                "w": Boxes((p.R * p.S, p.K, p.C), (p.C, p.R * p.S * p.C, 1), (1, *w_block)),
                "residual": outputs,
                "y": outputs,
            },
            R=p.R,
            S=p.S,
            PAD_H=p.padding[0],
            PAD_W=p.padding[1],
            DIL_H=p.dilation[0],
            DIL_W=p.dilation[1],
            MIRRORED=mirrored,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            RELU=relu,
            GENSTATS=genstats,
            PERSISTENT=tile.programs > 0,
            SWAPPED=swapped,
            BOX_N=pixels[0],
            BOX_H=pixels[1],
            BOX_W=pixels[2],
            **tile_constants(tile),
        )
    return y, parts

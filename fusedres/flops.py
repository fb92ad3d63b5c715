"""Floating-point operations of every op that multiplies matrices, in the registry of ``torch.utils.flop_counter``.

Multiply-adds count as two, per-channel and per-element work not at all. (``FlopCounterMode`` itself hooks every module,
so that blocks run theirs one by one under it. ``fusedres.plan`` does not.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fusedres.problem import ConvProblem

Shape = Sequence[int]
_ops = torch.ops.fusedres


@register_flop_formula(_ops.conv_fprop)
def conv_fprop_flops(
    x: Shape, w: Shape, bias: Any, residual: Any, in_bn: Any, *geometry: Any, out_shape: Any = None
) -> int:
    """Of the convolution; ``geometry`` is stride, padding, dilation, groups, relu, genstats."""
    return ConvProblem.of(torch.Size(x), torch.Size(w), *geometry[:4]).flops


@register_flop_formula(_ops.conv_projection)
def conv_projection_flops(
    x: Shape,
    w: Shape,
    bias: Any,
    x_d: Shape,
    w_d: Shape,
    bias_d: Any,
    stride_d: Shape,
    *rest: Any,
    out_shape: Any = None,
) -> int:
    """Of both convolutions."""
    of_source = ConvProblem.of(torch.Size(x_d), torch.Size(w_d), stride_d).flops
    return ConvProblem.of(torch.Size(x), torch.Size(w)).flops + of_source


@register_flop_formula((_ops.conv_dgrad, _ops.conv_dgrad_drelu_dbn))
def conv_dgrad_flops(
    g: Shape,
    z: Any,
    bn: Any,
    sums: Any,
    inv_count: float,
    w: Shape,
    input_size: Shape,
    *rest: Any,
    out_shape: Any = None,
) -> int:
    """As many as its forward convolution; ``rest`` begins with stride, padding, dilation, groups."""
    groups = rest[3]
    return ConvProblem.of(torch.Size((g[0], w[1] * groups, *input_size)), torch.Size(w), *rest[:4]).flops


@register_flop_formula(_ops.conv_wgrad)
def conv_wgrad_flops(
    g: Shape,
    z: Any,
    bn: Any,
    sums: Any,
    inv_count: float,
    x: Shape,
    in_bn: Any,
    kernel_size: Shape,
    *geometry: Any,
    out_shape: Any = None,
) -> int:
    """As many as its forward convolution; ``geometry`` is stride, padding, dilation, groups."""
    return ConvProblem.of(torch.Size(x), torch.Size((g[1], x[1] // geometry[3], *kernel_size)), *geometry).flops


@register_flop_formula(_ops.input_moments)
def input_moments_flops(x: Shape, in_bn: Any, stride: Shape, out_shape: Any = None) -> int:
    """Half of a (C, M) by (M, C) product: the result is symmetric."""
    n, c, h, w = x
    return n * -(-h // stride[0]) * -(-w // stride[1]) * c * (c + 1)


@register_flop_formula(_ops.pointwise_stats)
def pointwise_stats_flops(moments: Shape, w: Shape, bias: Any, count: int, out_shape: Any = None) -> int:
    """``W S``, (K, C) by (C, C)."""
    return 2 * w[0] * w[1] ** 2


@register_flop_formula(_ops.pointwise_wgrad)
def pointwise_wgrad_flops(
    g: Shape,
    sum_g: Any,
    x: Shape,
    in_bn: Any,
    moments: Any,
    w: Shape,
    bn: Any,
    inv_count: float,
    stride: Shape,
    out_shape: Any = None,
) -> int:
    """``g^T a'`` and ``W S``."""
    return ConvProblem.of(torch.Size(x), torch.Size(w), stride).flops + 2 * w[0] * w[1] ** 2


@register_flop_formula(_ops.pointwise_dgrad)
def pointwise_dgrad_flops(
    g: Shape,
    x: Shape,
    in_bn: Any,
    moments: Any,
    w: Shape,
    bn: Any,
    sums: Any,
    inv_count: float,
    stride: Shape,
    *previous: Any,
    out_shape: Any = None,
) -> int:
    """``W^T g``, ``B a'`` with ``B`` (C, C), and ``B = W^T diag(b) W``."""
    problem = ConvProblem.of(torch.Size(x), torch.Size(w), stride)
    return problem.flops + 2 * problem.gemm_m * problem.C**2 + 2 * problem.K * problem.C**2


# Chains of convs in one launch


def _chain_flops(x: Shape, convs: Sequence[tuple[Shape, Sequence[Any]]], projection: bool) -> int:
    """Of ``convs`` (w, (stride, padding, dilation)), each on the output of the one before, a projection's on ``x``."""
    total, size = 0, torch.Size(x)
    for i, (w, geometry) in enumerate(convs):
        is_projection = projection and i == len(convs) - 1
        problem = ConvProblem.of(torch.Size(x) if is_projection else size, torch.Size(w), *geometry)
        total += problem.flops
        size = torch.Size((problem.N, problem.K, problem.P, problem.Q))
    return total


@register_flop_formula(torch.ops.fusedres_cpu.eval_chain)
def eval_chain_flops(
    x: Shape,
    residual: Any,
    weights: Sequence[Shape],
    packed: Any,
    vectors: Any,
    eps: Any,
    geometry: Sequence[int],
    identity: bool,
    projection: bool,
    relu: bool,
    pool: Sequence[int],
    out_shape: Any = None,
) -> int:
    """``geometry`` holds the stride, padding and dilation of each conv, six numbers."""
    pairs = [tuple(geometry[i : i + 2]) for i in range(0, len(geometry), 2)]
    return _chain_flops(x, [(w, pairs[3 * i : 3 * i + 3]) for i, w in enumerate(weights)], projection)

"""The ops: schema, fake and dispatch of every fused step a residual block is built from.

One op is one launch. Ops are functional: they return new tensors and mutate nothing; ``bn_finalize`` alone updates
running statistics, and says so in its schema. No op carries autograd: the Functions in ``fusedres.autograd`` own the
calculus. Each op is registered once, for every device; the engine that computes it is chosen by ``fusedres.dispatch``.

Shapes and dtypes used below
  activations  (N, C, H, W) channels_last in memory; float64 | float32 | bfloat16 | float16
  acc          the accumulation dtype: float64 for float64 activations, else float32
  bn           (4, C) acc: rows mean, invstd, scale = weight*invstd, shift = bias - mean*scale
  stats        (3, K) acc: rows count, mean, M2 = sum((z - mean)**2)
  sums         (2, C) acc: rows dbeta = sum(g), dgamma = invstd * sum(g * (z - mean))
  moments      (C+1, C) acc: C rows of sum((a - a_mean) outer (a - a_mean)), then the row a_mean
  inv_count    1/(N*P*Q) where BN used batch statistics, 0.0 where its statistics are constants (eval); a Scalar in the
               schemas, for a float would fix the sizes of a graph compiled for all

BN backward is affine in g and z. It is written around the mean, so that a large mean cancels exactly:
``dz = a*g + b*(z - mean) + c``, ``a = scale``, ``b = -scale*invstd*dgamma*inv_count``, ``c = -scale*dbeta*inv_count``
(Ioffe and Szegedy 2015, section 3, with the two sums named).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import increment_version

from fusedres import dispatch
from fusedres.layout import BN_ROWS, STAT_ROWS, SUM_ROWS, acc_dtype, new_activation
from fusedres.problem import out_size

_library = torch.library.Library("fusedres", "DEF")

#: Every op, by its name.
OPS: dict[str, OpOverload] = {}
#: What each op calls, whatever the device.
IMPLEMENTATIONS: dict[OpOverload, Callable[..., Any]] = {}


def _register(schema: str) -> Callable[[Callable], Callable]:
    """Define ``fusedres::<schema>``; the decorated function is its fake, the dispatch table its implementation."""
    name = schema.partition("(")[0]

    def bind(fake: Callable) -> Callable:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        op = getattr(torch.ops.fusedres, name).default
        written = [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]
        call = dispatch.caller(name)
        IMPLEMENTATIONS[op] = _versioned(call, written) if written else call
        _library.impl(name, IMPLEMENTATIONS[op], "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedres::{name}", fake, lib=_library)
        OPS[name] = op
        return op

    return bind


def _versioned(call: Callable, written: Sequence[int]) -> Callable:
    """``call``, after which autograd knows that the arguments ``written`` have changed: kernels do not tell it."""

    def run(*args: Any) -> Any:
        result = call(*args)
        increment_version([args[i] for i in written if args[i] is not None])
        return result

    return run


def _acc(like: Tensor, *size: int) -> Tensor:
    return like.new_empty(size, dtype=acc_dtype(like.dtype))


@_register(
    "conv_fprop(Tensor x, Tensor w, Tensor? bias, Tensor? residual, Tensor? in_bn, SymInt[2] stride, SymInt[2] padding,"
    " SymInt[2] dilation, SymInt groups, bool relu, bool genstats) -> (Tensor y, Tensor stats)"
)
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
    """``y = act(conv(p(x), w) + bias + residual)``, and the statistics of ``y`` where ``genstats`` asks for them.

    Prologue ``p(x) = relu(in_scale*x + in_shift)`` per channel with ``in_bn`` (4, C), identity without; taps in the
    padding are zero AFTER the prologue. ``w`` (K, C/groups, R, S), ``bias`` (K,), ``residual`` like ``y`` (N, K, P, Q).
    ``stats`` (3, K) describe ``y`` as stored; without ``genstats`` its size is (0,).
    """
    p = out_size(x.shape[2], w.shape[2], stride[0], padding[0], dilation[0])
    q = out_size(x.shape[3], w.shape[3], stride[1], padding[1], dilation[1])
    stats = _acc(x, STAT_ROWS, w.shape[0]) if genstats else _acc(x, 0)
    return new_activation(x, (x.shape[0], w.shape[0], p, q)), stats


@_register(
    "conv_projection(Tensor x, Tensor w, Tensor? bias, Tensor x_d, Tensor w_d, Tensor? bias_d, SymInt[2] stride_d,"
    " bool relu) -> Tensor"
)
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
    """The end of a folded block with a projection shortcut: ``act(conv(x, w) + bias + conv(x_d, w_d) + bias_d)``.

    Both convs are 1x1, that of the block's input ``x_d`` (N, C_d, H, W) with ``stride_d``; ``x`` (N, C, P, Q) lies on
    the grid that is left of it. ``w`` (K, C, 1, 1), ``w_d`` (K, C_d, 1, 1), biases (K,), the result (N, K, P, Q).
    """
    p = out_size(x_d.shape[2], 1, stride_d[0], 0, 1)
    q = out_size(x_d.shape[3], 1, stride_d[1], 0, 1)
    return new_activation(x, (x.shape[0], w.shape[0], p, q))


@_register(
    "conv_dgrad(Tensor g, Tensor? z, Tensor? bn, Tensor? sums, Scalar inv_count, Tensor w, SymInt[2] input_size,"
    " SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, Tensor? residual,"
    " SymInt[2] residual_stride,"
    " Tensor? prev_z, Tensor? prev_bn) -> (Tensor dx, Tensor prev_sums)"
)
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
    """Gradient with respect to the conv's input, ``dx`` (N, C, H, W) with ``(H, W) = input_size``.

    Prologue: with ``bn`` the gradient of the conv's output is ``dz`` as in ``dbn``, of ``z`` and ``sums``; without it
    ``g`` is that gradient. Epilogue, one of: add ``residual``, a gradient on the grid of
    every ``residual_stride``-th row and column; or, with ``prev_z, prev_bn`` (the BN and ReLU that made this conv's
    input), mask by ``prev_scale*prev_z + prev_shift > 0`` and return that BN's sums (2, C). ``prev_sums`` else (0,).
    """
    n, c = g.shape[0], w.shape[1] * groups
    prev_sums = _acc(g, SUM_ROWS, c) if prev_z is not None else _acc(g, 0)
    return new_activation(g, (n, c, *input_size)), prev_sums


@_register(
    "conv_dgrad_drelu_dbn(Tensor g, Tensor? z, Tensor? bn, Tensor? sums, Scalar inv_count, Tensor w,"
    " SymInt[2] input_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, Tensor residual,"
    " Tensor y, Tensor? prev_z, Tensor? prev_bn, Tensor? side_z, Tensor? side_bn)"
    " -> (Tensor g, Tensor sums, Tensor residual_sums)"
)
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
    """From a block's first conv over the border to the block before: ``conv_dgrad`` plus ``residual`` (N, C, H, W), and
    of that gradient ``drelu_dbn`` in the conv's input ``y``, which is the other block's output.

    ``prev_z, prev_bn`` are the last conv and BN of the block before, ``side_z, side_bn`` those of its projection.
    """
    c = w.shape[1] * groups
    prev_sums = _acc(g, SUM_ROWS if prev_z is not None else 1, c)
    side_sums = _acc(g, SUM_ROWS, c) if side_z is not None else _acc(g, 0)
    return new_activation(g, (g.shape[0], c, *input_size)), prev_sums, side_sums


@_register(
    "conv_wgrad(Tensor g, Tensor? z, Tensor? bn, Tensor? sums, Scalar inv_count, Tensor x, Tensor? in_bn,"
    " SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor"
)
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
    """Gradient with respect to the weight, (K, C/groups, R, S) channels_last, in the dtype of ``x``.

    Prologues: ``g`` as in ``conv_dgrad``; ``x`` as in ``conv_fprop`` (recomputed from the stored ``z``, never kept).
    """
    return new_activation(x, (g.shape[1], x.shape[1] // groups, *kernel_size))


@_register(
    "bn_finalize(Tensor stats, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> Tensor"
)
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
    """``stats`` (3, K) -> ``bn`` (4, K); running statistics move by ``momentum`` (None: cumulative average).

    The biased variance M2/count normalises; the unbiased M2/(count-1) enters ``running_var``. The counter is raised
    first, so that ``momentum=None`` gives the weight 1/num_batches_tracked, as in ``torch.nn.BatchNorm2d``.
    """
    return stats.new_empty(BN_ROWS, stats.shape[1])


@_register("bn_constants(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor")
def bn_constants(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """``bn`` (4, K) in ``dtype`` from running statistics (K,): BN in eval mode. Computed in float32 or better."""
    return mean.new_empty((BN_ROWS, mean.shape[0]), dtype=dtype)


@_register("bn_fold(Tensor w, Tensor? bias, Tensor bn) -> (Tensor, Tensor)")
def bn_fold(w: Tensor, bias: Tensor | None, bn: Tensor) -> tuple[Tensor, Tensor]:
    """BN folded into a conv: ``w*scale`` (K, C/groups, R, S) and ``(bias - mean)*scale + beta`` (K,).

    Computed in the dtype of ``bn`` or better and cast once, to the dtype of ``w``.
    """
    return torch.empty_like(w), w.new_empty(w.shape[0])


@_register("cast(Tensor x, ScalarType dtype) -> Tensor")
def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in another ``dtype``: a parameter in that which autocast computes in, or its gradient back in its own."""
    return torch.empty_like(x, dtype=dtype)


@_register("scale_shift_add_relu(Tensor z, Tensor bn, Tensor? residual, Tensor? residual_bn, bool relu) -> Tensor")
def scale_shift_add_relu(
    z: Tensor, bn: Tensor, residual: Tensor | None, residual_bn: Tensor | None, relu: bool
) -> Tensor:
    """The forward tail ``act(scale*z + shift + r)``, NaN kept.

    ``r`` is nothing, the ``residual`` (N, K, P, Q), or ``scale_d*residual + shift_d`` of a downsample branch with
    ``residual_bn`` (4, K).
    """
    return new_activation(z, z.shape)


@_register(
    "drelu_dbn(Tensor dy, Tensor? y, Tensor? z, Tensor? bn, Tensor? residual_z, Tensor? residual_bn)"
    " -> (Tensor g, Tensor sums, Tensor residual_sums)"
)
def drelu_dbn(
    dy: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    bn: Tensor | None,
    residual_z: Tensor | None,
    residual_bn: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward tail, both branches in one pass: ``g = dy`` where the output ``y`` is not <= 0, and its sums.

    ``y`` None: there was no ReLU and ``g`` is a copy of ``dy``. ``sums`` (2, K) for ``z, bn``; without them only
    ``dbeta`` is known and the size is (1, K). ``residual_sums`` the same for the downsample branch, (0,) without.
    """
    sums = _acc(dy, SUM_ROWS if z is not None else 1, dy.shape[1])
    residual_sums = _acc(dy, SUM_ROWS, dy.shape[1]) if residual_z is not None else _acc(dy, 0)
    return new_activation(dy, dy.shape), sums, residual_sums


@_register("dbn(Tensor g, Tensor? z, Tensor bn, Tensor? sums, Scalar inv_count) -> Tensor")
def dbn(g: Tensor, z: Tensor | None, bn: Tensor, sums: Tensor | None, inv_count: float) -> Tensor:
    """The prologue of ``conv_dgrad`` and ``conv_wgrad`` materialised: ``dz = a*g + b*(z - mean) + c``.

    With ``inv_count`` 0.0 that is ``a*g``: neither ``z`` nor ``sums`` is read, and either may be None.
    """
    return new_activation(g, g.shape)


@_register("input_moments(Tensor x, Tensor? in_bn, SymInt[2] stride) -> Tensor")
def input_moments(x: Tensor, in_bn: Tensor | None, stride: Sequence[int]) -> Tensor:
    """Centred second moments and mean (C+1, C) of ``a = p(x)`` on the grid of every ``stride``-th row and column."""
    return _acc(x, x.shape[1] + 1, x.shape[1])


@_register("pointwise_stats(Tensor moments, Tensor w, Tensor? bias, SymInt count) -> Tensor")
def pointwise_stats(moments: Tensor, w: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """Statistics (3, K) of a pointwise conv's output, known before it is computed.

    A 1x1 conv is linear, so ``mean = W a_mean + bias`` and ``M2_k = w_k S w_k^T`` with ``S`` the centred second
    moments of its input.
    """
    return moments.new_empty(STAT_ROWS, w.shape[0])


@_register(
    "pointwise_wgrad(Tensor g, Tensor sum_g, Tensor x, Tensor? in_bn, Tensor moments, Tensor w, Tensor bn,"
    " Scalar inv_count, SymInt[2] stride) -> (Tensor dw, Tensor sums)"
)
def pointwise_wgrad(
    g: Tensor,
    sum_g: Tensor,
    x: Tensor,
    in_bn: Tensor | None,
    moments: Tensor,
    w: Tensor,
    bn: Tensor,
    inv_count: float,
    stride: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Weight gradient and BN sums of a pointwise conv followed by batch-statistics BN, without the conv's output.

    With ``a' = p(x) - a_mean`` the conv's output is ``z - mean = W a'``, so with ``G = g^T a'`` (K, C):
    ``dgamma = invstd * rowsum(G * W)`` and ``dw = scale*G + b*(W S)`` (``S`` the moments; ``c`` meets sum(a') = 0).
    ``sum_g`` (K,) is dbeta. Returns ``dw`` like ``w`` and ``sums`` (2, K).
    """
    return torch.empty_like(w), _acc(g, SUM_ROWS, w.shape[0])


@_register(
    "pointwise_dgrad(Tensor g, Tensor x, Tensor? in_bn, Tensor moments, Tensor w, Tensor bn, Tensor sums,"
    " Scalar inv_count, SymInt[2] stride, Tensor? prev_z, Tensor? prev_bn) -> (Tensor dx, Tensor prev_sums)"
)
def pointwise_dgrad(
    g: Tensor,
    x: Tensor,
    in_bn: Tensor | None,
    moments: Tensor,
    w: Tensor,
    bn: Tensor,
    sums: Tensor,
    inv_count: float,
    stride: Sequence[int],
    prev_z: Tensor | None,
    prev_bn: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Input gradient of a pointwise conv followed by batch-statistics BN, without the conv's output.

    ``dx = W^T(scale*g) + B (p(x) - a_mean) + W^T c`` with ``B = W^T diag(b) W`` (C, C). ``dx`` (N, C, P, Q) lies on
    the conv's output grid: for ``stride`` 2 only those pixels have a gradient. Epilogue as in ``conv_dgrad``.
    """
    prev_sums = _acc(g, SUM_ROWS, x.shape[1]) if prev_z is not None else _acc(g, 0)
    return new_activation(g, (g.shape[0], x.shape[1], g.shape[2], g.shape[3])), prev_sums


@_register(
    "bn_relu_maxpool(Tensor z, Tensor bn, SymInt kernel_size, SymInt stride, SymInt padding) -> (Tensor, Tensor)"
)
def bn_relu_maxpool(z: Tensor, bn: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """The stem's tail ``maxpool(relu(scale*z + shift))`` (N, K, P, Q), and for each output the winning tap (uint8).

    Taps are numbered row by row inside the window; the first of equal values wins, and NaN wins over any number.
    """
    p = out_size(z.shape[2], kernel_size, stride, padding, 1)
    q = out_size(z.shape[3], kernel_size, stride, padding, 1)
    y = new_activation(z, (z.shape[0], z.shape[1], p, q))
    return y, torch.empty_like(y, dtype=torch.uint8)


@_register(
    "bn_relu_maxpool_backward(Tensor dy, Tensor tap, Tensor z, Tensor bn, SymInt kernel_size, SymInt stride,"
    " SymInt padding, Scalar inv_count) -> (Tensor dz, Tensor sums)"
)
def bn_relu_maxpool_backward(
    dy: Tensor,
    tap: Tensor,
    z: Tensor,
    bn: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    inv_count: float,
) -> tuple[Tensor, Tensor]:
    """Backward of ``bn_relu_maxpool`` through its BN: ``dz`` like ``z``, and ``sums`` (2, K).

    ``g`` (the gradient routed to the winning taps whose activation is not <= 0) is never stored.
    """
    return new_activation(z, z.shape), _acc(z, SUM_ROWS, z.shape[1])

"""The ``reference`` engine: every op in plain ATen, on any device and dtype. The oracle, and the last resort.

Written for clarity: each function is its docstring in ``fusedres.ops`` turned into tensor algebra. Half dtypes compute
in float32 and are rounded where the op stores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.layout import (
    BN,
    acc_dtype,
    add_on_grid_,
    channels_last,
    from_pixel_matrix,
    new_activation,
    no_sums,
    per_channel,
    pixel_matrix,
)


def _relu(x: Tensor) -> Tensor:
    return x.clamp_min(0)  # keeps NaN


def _input(x: Tensor, in_bn: Tensor | None) -> Tensor:
    """The prologue on a conv's input: ``relu(scale*x + shift)`` rounded to the dtype of ``x``, or ``x``."""
    return x if in_bn is None else scale_shift_add_relu(x, in_bn, None, None, True)


def _output_gradient(g: Tensor, z: Tensor | None, bn: Tensor | None, sums: Tensor | None, inv_count: float) -> Tensor:
    """The prologue on a gradient: dz, or ``g`` where it is that already."""
    return g if bn is None else dbn(g, z, bn, sums, inv_count)


def channel_stats(z: Tensor) -> Tensor:
    """(count, mean, M2) of each channel of ``z`` (N, K, H, W) -> (3, K), two passes."""
    rows = pixel_matrix(z).to(acc_dtype(z.dtype))
    count = rows.shape[0]
    mean = rows.mean(0) if count else rows.new_zeros(rows.shape[1])
    return torch.stack([torch.full_like(mean, count), mean, (rows - mean).square().sum(0)])


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
    y = F.conv2d(_input(x, in_bn), w, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y + residual
    if relu:
        y = _relu(y)
    y = channels_last(y)
    return y, channel_stats(y) if genstats else no_sums(y)


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
    y = F.conv2d(x, w, bias) + F.conv2d(x_d, w_d, bias_d, stride_d)
    return channels_last(_relu(y) if relu else y)


def _drelu(g: Tensor, z: Tensor, bn: Tensor) -> tuple[Tensor, Tensor]:
    """``g`` masked by the ReLU after ``bn``, and the sums (2, C) of that BN."""
    rows = BN.rows(bn)
    activated = per_channel(rows.scale) * z + per_channel(rows.shift)
    g = torch.where(activated <= 0, 0, g)
    return g, _bn_sums(g, z, bn)


def _bn_sums(g: Tensor, z: Tensor, bn: Tensor) -> Tensor:
    rows = BN.rows(bn)
    g_rows, z_rows = (pixel_matrix(t).to(acc_dtype(t.dtype)) for t in (g, z))
    return torch.stack([g_rows.sum(0), rows.invstd * (g_rows * (z_rows - rows.mean)).sum(0)])


def _input_gradient(
    dx: Tensor,
    residual: Tensor | None,
    residual_stride: Sequence[int],
    prev_z: Tensor | None,
    prev_bn: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The epilogue of the dgrad ops. ``dx`` is private to the op and may be changed in place."""
    if residual is not None:
        add_on_grid_(dx, residual, residual_stride)
    if prev_z is None or prev_bn is None:
        return channels_last(dx), no_sums(dx)
    dx, sums = _drelu(dx, prev_z, prev_bn)
    return channels_last(dx), sums


def convolution_dgrad(
    dz: Tensor,
    w: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of a plain convolution's input, by ATen: channels_last, private to the caller."""
    x = new_activation(dz, (dz.shape[0], w.shape[1] * groups, *input_size))  # only its shape is read
    return channels_last(_convolution_backward(dz, x, w, stride, padding, dilation, groups, (True, False))[0])


def convolution_wgrad(
    dz: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of a plain convolution's weight, by ATen: channels_last."""
    w = new_activation(x, (dz.shape[1], x.shape[1] // groups, *kernel_size))  # only its shape is read
    return channels_last(_convolution_backward(dz, x, w, stride, padding, dilation, groups, (False, True))[1])


def _convolution_backward(
    dz: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mask: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """(dx, dw) of a plain convolution, each only where ``mask`` asks for it."""
    if x.dtype == torch.bfloat16 and x.shape[3] < stride[1] and mask[1]:
        # oneDNN leaves parts of such a dw as they were in memory before
        wide = _convolution_backward(dz.float(), x.float(), w.float(), stride, padding, dilation, groups, mask)
        return tuple(None if t is None else t.to(x.dtype) for t in wide)  # type: ignore[return-value]  # of two
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dz, x, w, None, stride, padding, dilation, False, [0, 0], groups, [*mask, False]
    )
    return dx, dw


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
    dz = _output_gradient(g, z, bn, sums, inv_count)
    dx = convolution_dgrad(dz, w, input_size, stride, padding, dilation, groups)
    return _input_gradient(dx, residual, residual_stride, prev_z, prev_bn)


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
    conv = (w, input_size, stride, padding, dilation, groups)
    dx, _ = conv_dgrad(g, z, bn, sums, inv_count, *conv, residual, (1, 1), None, None)
    return drelu_dbn(dx, y, prev_z, prev_bn, side_z, side_bn)


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
    dz = _output_gradient(g, z, bn, sums, inv_count)
    return convolution_wgrad(dz, _input(x, in_bn), kernel_size, stride, padding, dilation, groups)


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
    count, mean, m2 = stats.unbind(0)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    for running, batch in ((running_mean, mean), (running_var, m2 / (count - 1))):
        if running is not None:
            factor = _averaging_factor(momentum, num_batches_tracked, batch.dtype)
            running.copy_(running.to(batch.dtype) * (1 - factor) + batch * factor)
    return _bn_rows(mean, m2 / count, weight, bias, eps)


def _averaging_factor(momentum: float | None, counter: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    """The weight of the new batch; no host sync where it depends on the counter."""
    if momentum is not None:
        return momentum
    return 0.0 if counter is None else counter.to(dtype).reciprocal()  # 0 without a counter, as in torch.nn.BatchNorm2d


def bn_constants(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    return _bn_rows(mean.to(dtype), var.to(dtype), weight, bias, eps)


def _bn_rows(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    invstd = (var + eps).rsqrt()
    scale = invstd if weight is None else weight.to(mean.dtype) * invstd
    shift = -mean * scale if bias is None else bias.to(mean.dtype) - mean * scale
    return torch.stack([mean, invstd, scale, shift])


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``fusedres.ops.cast``."""
    return x.to(dtype, copy=True)


def bn_fold(w: Tensor, bias: Tensor | None, bn: Tensor) -> tuple[Tensor, Tensor]:
    rows = BN.rows(bn)
    folded_bias = rows.shift + (0 if bias is None else bias.to(bn.dtype) * rows.scale)  # never a view of bn
    return (w * rows.scale.view(-1, 1, 1, 1)).to(w.dtype), folded_bias.to(w.dtype)


def scale_shift_add_relu(
    z: Tensor, bn: Tensor, residual: Tensor | None, residual_bn: Tensor | None, relu: bool
) -> Tensor:
    rows = BN.rows(bn)
    y = per_channel(rows.scale) * z + per_channel(rows.shift)
    if residual is not None and residual_bn is not None:
        residual_rows = BN.rows(residual_bn)
        residual = per_channel(residual_rows.scale) * residual + per_channel(residual_rows.shift)
    if residual is not None:
        y = y + residual
    return channels_last((_relu(y) if relu else y).to(z.dtype))


def drelu_dbn(
    dy: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    bn: Tensor | None,
    residual_z: Tensor | None,
    residual_bn: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    g = channels_last(dy.clone() if y is None else torch.where(y <= 0, 0, dy))
    acc = acc_dtype(g.dtype)
    sums = _bn_sums(g, z, bn) if z is not None and bn is not None else pixel_matrix(g).to(acc).sum(0, keepdim=True)
    if residual_z is None or residual_bn is None:
        return g, sums, no_sums(g)
    return g, sums, _bn_sums(g, residual_z, residual_bn)


def _dbn_factors(bn: Tensor, sums: Tensor, inv_count: float) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, c) of ``dz = a*g + b*(z - mean) + c``."""
    rows = BN.rows(bn)
    dbeta, dgamma = sums.unbind(0)
    return rows.scale, -rows.scale * rows.invstd * dgamma * inv_count, -rows.scale * dbeta * inv_count


def dbn(g: Tensor, z: Tensor | None, bn: Tensor, sums: Tensor | None, inv_count: float) -> Tensor:
    if z is None or sums is None or inv_count == 0:  # constants: NaN in z or in the sums does not reach dz
        return channels_last((per_channel(BN.rows(bn).scale) * g).to(g.dtype))
    a, b, c = (per_channel(v) for v in _dbn_factors(bn, sums, inv_count))
    return channels_last((a * g + b * (z - per_channel(BN.rows(bn).mean)) + c).to(g.dtype))


def input_moments(x: Tensor, in_bn: Tensor | None, stride: Sequence[int]) -> Tensor:
    rows = pixel_matrix(_input(x, in_bn), stride).to(acc_dtype(x.dtype))
    mean = rows.mean(0)
    centred = rows - mean
    return torch.cat([centred.t() @ centred, mean[None]])


def pointwise_stats(moments: Tensor, w: Tensor, bias: Tensor | None, count: int) -> Tensor:
    second, a_mean = moments[:-1], moments[-1]
    weight = w.reshape(w.shape[0], -1).to(moments.dtype)
    mean = weight @ a_mean
    if bias is not None:
        mean = mean + bias.to(mean.dtype)
    m2 = ((weight @ second) * weight).sum(1).clamp_min(0)  # a rounding below zero must not reach a square root
    return torch.stack([torch.full_like(mean, count), mean, m2])


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
    acc = acc_dtype(g.dtype)
    centred = pixel_matrix(_input(x, in_bn), stride).to(acc) - moments[-1]
    return pointwise_wgrad_from_product(pixel_matrix(g).to(acc).t() @ centred, sum_g, moments, w, bn, inv_count)


def pointwise_wgrad_from_product(
    product: Tensor, sum_g: Tensor, moments: Tensor, w: Tensor, bn: Tensor, inv_count: float
) -> tuple[Tensor, Tensor]:
    """``pointwise_wgrad`` given ``G = g^T a'`` (K, C): what remains is small and the same for every engine."""
    weight = w.reshape(w.shape[0], -1).to(product.dtype)
    sums = torch.stack([sum_g, BN.rows(bn).invstd * (product * weight).sum(1)])
    a, b, _ = _dbn_factors(bn, sums, inv_count)
    dw = a[:, None] * product + b[:, None] * (weight @ moments[:-1])
    return torch.empty_like(w).copy_(dw.view(w.shape)), sums


def pointwise_dgrad_operands(
    moments: Tensor, w: Tensor, bn: Tensor, sums: Tensor, inv_count: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(a*W (K, C), B = W^T diag(b) W (C, C), constant (C,)): ``dx = g (a*W) + p(x) B + constant`` per pixel."""
    weight = w.reshape(w.shape[0], -1).to(bn.dtype)
    a, b, c = _dbn_factors(bn, sums, inv_count)
    product = weight.t() @ (b[:, None] * weight)
    return a[:, None] * weight, product, c @ weight - moments[-1] @ product


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
    acc = acc_dtype(g.dtype)
    from_g, from_x, constant = pointwise_dgrad_operands(moments, w, bn, sums, inv_count)
    a = pixel_matrix(_input(x, in_bn), stride).to(acc)
    rows = pixel_matrix(g).to(acc) @ from_g + a @ from_x + constant
    dx = from_pixel_matrix(rows.to(g.dtype), g.shape[0], g.shape[2], g.shape[3])
    return _input_gradient(dx, None, (1, 1), prev_z, prev_bn)


def bn_relu_maxpool(z: Tensor, bn: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    a = scale_shift_add_relu(z, bn, None, None, True)
    y, index = F.max_pool2d(a, kernel_size, stride, padding, return_indices=True)
    row0, col0 = _window_origins(y, stride, padding)
    tap = (index // z.shape[3] - row0) * kernel_size + index % z.shape[3] - col0
    return channels_last(y), channels_last(tap.to(torch.uint8))


def _window_origins(y: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """First row (P, 1) and first column (Q,) of every pooling window, in the coordinates of the unpadded map."""
    row, col = (torch.arange(size, device=y.device) * stride - padding for size in y.shape[2:])
    return row[:, None], col


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
    row0, col0 = _window_origins(dy, stride, padding)
    tap = tap.to(torch.int64)
    index = (row0 + tap // kernel_size) * z.shape[3] + col0 + tap % kernel_size
    g = z.new_zeros(*z.shape[:2], z.shape[2] * z.shape[3])
    g.scatter_add_(2, index.flatten(2), dy.flatten(2))
    g, sums = _drelu(g.view(z.shape), z, bn)
    return dbn(g, z, bn, sums, inv_count), sums

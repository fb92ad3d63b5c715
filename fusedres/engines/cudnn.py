"""The ``cudnn`` engine: the vendor's convolutions and matrix products, between kernels of our own.

The vendor's convs have neither prologue nor statistics. So what they consume is materialised, once for all its readers,
by the kernels of the ``triton`` engine, which also do everything that eager does in passes of its own; the widest convs
run closed, so that their outputs never exist (docs/calculus.md). On Hopper this is faster than convs with a prologue:
their operands must pass through registers on the way to the matrix units (docs/gpu.md has the figures).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import reference
from fusedres.engines import Engine
from fusedres.engines.nvidia import capability
from fusedres.engines.triton import TRITON
from fusedres.layout import BN_ROWS, add_on_grid_, channels_last, from_pixel_matrix, no_sums, pixel_matrix
from fusedres.problem import is_plain_gemm

_DTYPES = (torch.bfloat16, torch.float16)
#: The compute capability from which it is the first choice.
_MEASURED_FROM = (9, 0)
_DGRADS = ("conv_dgrad", "conv_dgrad_drelu_dbn", "pointwise_dgrad")
_PRODUCTS = ("conv_fprop", "conv_wgrad", "input_moments", "pointwise_wgrad", *_DGRADS)


class CuDNNEngine(Engine):
    """See the module's docstring."""

    name = "cudnn"
    replays = True
    statistics_apart = True

    def rejects(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        reason = TRITON.rejects("conv_fprop" if op in _PRODUCTS else op, device_type, dtype)
        if reason is None and op in _PRODUCTS and dtype not in _DTYPES:
            return f"it has no products for {dtype}"
        return reason

    def only_by_name(self, device_type: str) -> str | None:
        reason = TRITON.only_by_name(device_type)
        is_measured = (capability() or (0, 0)) >= _MEASURED_FROM
        return reason if reason or is_measured else "on such a GPU nobody has measured it to be faster than triton"

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return getattr(TRITON, op)

    def conv_fprop(self, *args: Any) -> tuple[Tensor, Tensor]:
        return (TRITON.conv_fprop if prefers_triton("conv_fprop", args) else vendor_fprop)(*args)

    def conv_dgrad(self, *args: Any) -> tuple[Tensor, Tensor]:
        return (TRITON.conv_dgrad if prefers_triton("conv_dgrad", args) else vendor_dgrad)(*args)

    def conv_dgrad_drelu_dbn(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        conv, tail = (*args[:-5], (1, 1), None, None), args[-5:]  # the last five are those of drelu_dbn
        if prefers_triton("conv_dgrad", conv):
            return TRITON.conv_dgrad_drelu_dbn(*args)
        dx, _ = vendor_dgrad(*conv)
        return dx, *_kernel("tails", "drelu_dbn_")(dx, *tail)

    def conv_wgrad(self, *args: Any) -> Tensor:
        return vendor_wgrad(*args)

    @staticmethod
    def input_moments(x: Tensor, in_bn: Tensor | None, stride: Sequence[int]) -> Tensor:
        """Around a mean rounded to the dtype of ``x``: close to the true one that difference is exact, and what is left
        of the mean after it is too small to cancel digits."""
        rows = pixel_matrix(_input(x, in_bn), stride)
        mean = _kernel("channel_stats", "channel_stats")(rows[:, :, None, None])[1]
        centred = _kernel("pointwise", "centre")(rows, mean)
        products = _product(centred.t(), centred)
        return _kernel("pointwise", "finish_moments")(products, mean, centred)

    @staticmethod
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
        product = _product(pixel_matrix(g).t(), pixel_matrix(_input(x, in_bn), stride))
        return _kernel("pointwise", "pointwise_wgrad_of_product")(product, sum_g, moments, w, bn, inv_count)

    @staticmethod
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
        from_g, from_x, constant = _kernel("pointwise", "pointwise_dgrad_operands")(moments, w, bn, sums, inv_count)
        a, by_g = pixel_matrix(_input(x, in_bn), stride), pixel_matrix(g)
        if prev_z is None:
            rows = torch.addmm(constant.to(g.dtype), a, from_x).addmm_(by_g, from_g)
            return from_pixel_matrix(rows, g.shape[0], g.shape[2], g.shape[3]), no_sums(g)
        dx = from_pixel_matrix(torch.mm(a, from_x).addmm_(by_g, from_g), g.shape[0], g.shape[2], g.shape[3])
        return dx, _kernel("tails", "drelu_")(dx, prev_z, prev_bn, constant)


def prefers_triton(op: str, args: Sequence[Any]) -> bool:
    """Whether a conv with these arguments is left to the ``triton`` engine: where its epilogue spares whole passes."""
    if op == "conv_fprop":
        _, _, bias, residual, _, *_, relu, _ = args
        return bias is not None or residual is not None or relu
    if op == "conv_dgrad":  # what the sum costs apart is more than the conv
        w, _, stride, padding, _, groups, residual, _, prev_z, _ = args[5:]
        takes_sum = is_plain_gemm(w.shape[2:], stride, padding, groups) and prev_z is None
        return takes_sum and residual is not None
    return False


def vendor_fprop(
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
    """The vendor's conv; bias, shortcut and ReLU in one pass of ours behind it, statistics in another."""
    y = channels_last(F.conv2d(_input(x, in_bn), channels_last(w), None, stride, padding, dilation, groups))
    if bias is not None or residual is not None or relu:
        y = TRITON.scale_shift_add_relu(y, _bias_as_bn(bias, y), residual, None, relu)
    return y, _kernel("channel_stats", "channel_stats")(y) if genstats else no_sums(y)


def vendor_dgrad(
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
    """The vendor's, of ``dz`` materialised; the sum or the ReLU's mask in a pass behind it."""
    dz = g if bn is None else TRITON.dbn(g, z, bn, sums, inv_count)
    operands = (channels_last(dz), channels_last(w), input_size)
    dx = reference.convolution_dgrad(*operands, stride, padding, dilation, groups)
    if residual is not None:
        add_on_grid_(dx, residual, residual_stride)
    return dx, _drelu_(dx, prev_z, prev_bn)


def vendor_wgrad(
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
    """The vendor's, of both operands materialised."""
    dz = g if bn is None else TRITON.dbn(g, z, bn, sums, inv_count)
    operands = (channels_last(dz), _input(x, in_bn), kernel_size)
    return reference.convolution_wgrad(*operands, stride, padding, dilation, groups)


#: What serves each conv by the vendor's, whatever its dtype and epilogue.
VENDOR: dict[str, Callable[..., Any]] = {
    "conv_fprop": vendor_fprop,
    "conv_dgrad": vendor_dgrad,
    "conv_wgrad": vendor_wgrad,
}


@functools.cache
def _kernel(module: str, name: str) -> Callable[..., Any]:
    """A kernel that serves no op of its own. Triton is imported when it is first needed."""
    return getattr(importlib.import_module(f"fusedres.kernels.{module}"), name)


def _input(x: Tensor, in_bn: Tensor | None) -> Tensor:
    """A conv's input with its prologue materialised."""
    return channels_last(x) if in_bn is None else TRITON.scale_shift_add_relu(x, in_bn, None, None, True)


def _bias_as_bn(bias: Tensor | None, y: Tensor) -> Tensor:
    """``bn`` (4, K) that scales by one and shifts by ``bias``."""
    bn = y.new_zeros((BN_ROWS, y.shape[1]), dtype=torch.float32)
    bn[2] = 1.0
    if bias is not None:
        bn[3] = bias
    return bn


def _drelu_(dx: Tensor, prev_z: Tensor | None, prev_bn: Tensor | None) -> Tensor:
    """The dgrad epilogue, in place on a ``dx`` that its op made: mask by the ReLU before, return that BN's sums."""
    return no_sums(dx) if prev_z is None else _kernel("tails", "drelu_")(dx, prev_z, prev_bn)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of half operands, accumulated and left in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


CUDNN = CuDNNEngine()

"""oneDNN's convolutions with bias, shortcut add and ReLU inside, as torch ships them for its own compiler.

The calls under ``torch.ops.mkldnn`` are private: they are probed once, ``onednn_reason`` says why they are not used.

oneDNN's ReLU turns NaN into 0 where eager keeps it. A fused ReLU is therefore used only where the magnitudes of all
operands prove that neither NaN nor infinity can arise; anything else takes a ReLU of its own.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import native
from fusedres.engines import EvalChain, FoldedConv

_mkldnn = torch.ops.mkldnn


@functools.cache
def onednn_reason(dtype: torch.dtype) -> str | None:
    """Why oneDNN's fused convolutions cannot be used for ``dtype`` in this process, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this CPU"
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "oneDNN has no float16 on this CPU"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"oneDNN has no {dtype}"
    try:
        return _probe(dtype)
    except (AttributeError, RuntimeError) as error:
        return f"this torch does not offer the calls: {error}"


def _probe(dtype: torch.dtype) -> str | None:
    """Run every call once on a small problem and compare with ATen."""
    x = torch.linspace(-1, 1, 2 * 8 * 4 * 4).view(2, 8, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.linspace(-0.1, 0.1, 8 * 8 * 9).view(8, 8, 3, 3).to(dtype)
    conv = FoldedConv(w, w[:, 0, 0, 0].contiguous(), (1, 1), (1, 1), (1, 1), 1)
    plain = F.conv2d(x, w, conv.bias, padding=1)
    expected = (plain + x).relu()
    packed = pack(conv, x.shape)
    results = (_call(x, packed, x, True), _call_into(x.clone(memory_format=torch.preserve_format), x, packed, True))
    close = all(torch.allclose(result, expected, atol=1e-2) for result in results)
    return (
        None
        if close and torch.allclose(_call(x, packed, None, False), plain, atol=1e-2)
        else "they compute other numbers"
    )


def pack(conv: FoldedConv, x_shape: torch.Size) -> FoldedConv:
    """``conv`` with its weight in the layout oneDNN prefers for inputs of ``x_shape``."""
    w = conv.w.contiguous(memory_format=torch.channels_last)
    packed = _mkldnn._reorder_convolution_weight(
        w, conv.padding, conv.stride, conv.dilation, conv.groups, list(x_shape)
    )
    return conv._replace(w=packed)


def _call(x: Tensor, conv: FoldedConv, residual: Tensor | None, relu: bool) -> Tensor:
    """``act(conv(x) + residual)`` in one oneDNN call."""
    w, bias, stride, padding, dilation, groups = conv
    if residual is None:
        attr = "relu" if relu else "none"
        return _mkldnn._convolution_pointwise(x, w, bias, padding, stride, dilation, groups, attr, [], "")
    return _mkldnn._convolution_pointwise.binary(
        x, residual, w, bias, padding, stride, dilation, groups, "add", 1.0, "relu" if relu else None, [], ""
    )


def _call_into(out: Tensor, x: Tensor, conv: FoldedConv, relu: bool) -> Tensor:
    """``out = act(conv(x) + out)``: only for a buffer that nobody else reads."""
    w, bias, stride, padding, dilation, groups = conv
    return _mkldnn._convolution_pointwise_.binary(
        out, x, w, bias, padding, stride, dilation, groups, "add", 1.0, "relu" if relu else None, [], ""
    )


def max_abs(x: Tensor) -> float:
    """Largest magnitude; NaN or infinity where ``x``, an activation or a vector, holds one."""
    if x.dim() == 4 and native.missing is None:
        return torch.ops.fusedres_cpu.max_abs(x).item()
    low, high = (v.item() for v in torch.aminmax(x))
    return math.nan if math.isnan(low) else max(abs(low), abs(high))


def conv_gain(conv: FoldedConv) -> tuple[float, float]:
    """(a, b) such that ``|conv(x)| <= a*max|x| + b``: the largest row sum of magnitudes, the largest bias."""
    gain = torch.linalg.vector_norm(conv.w.float().flatten(1), 1, dim=1).max().item()
    return gain, 0.0 if conv.bias is None else max_abs(conv.bias)


def onednn_conv(x: Tensor, conv: FoldedConv, residual: Tensor | None, relu: bool) -> Tensor:
    """``act(conv(x) + bias + residual)`` with plain weights, NaN kept."""
    if onednn_reason(x.dtype) is None and (not relu or _is_bounded(x, conv, residual)):
        return _call(x, conv, residual, relu)
    return _separate(x, conv, residual, relu)


def _is_bounded(x: Tensor, conv: FoldedConv, residual: Tensor | None) -> bool:
    """Whether the result is finite whatever the order of its additions."""
    gain, offset = conv_gain(conv)
    bound = gain * max_abs(x) + offset + (max_abs(residual) if residual is not None else 0.0)
    return bound < torch.finfo(x.dtype).max


def _separate(x: Tensor, conv: FoldedConv, residual: Tensor | None, relu: bool) -> Tensor:
    w, bias, stride, padding, dilation, groups = conv
    y = F.conv2d(x, w, bias, stride, padding, dilation, groups)
    if residual is not None:
        y += residual
    return y.clamp_min_(0) if relu else y


class PackedChain:
    """A folded chain, weights packed for inputs like ``x_shape``: a oneDNN call a conv, shortcut and ReLU inside."""

    def __init__(self, chain: EvalChain[FoldedConv], x_shape: torch.Size) -> None:
        self.chain = chain
        self.finite_max = torch.finfo(chain.convs[0].w.dtype).max
        self.gains = [conv_gain(conv) for conv in chain.convs]
        self.projection_gain = conv_gain(chain.projection) if chain.projection else (0.0, 0.0)
        self.convs = [pack(*each) for each in zip(chain.all_convs, chain.input_shapes(x_shape), strict=True)]
        self.projection = self.convs.pop() if chain.projection else None

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if not self._is_bounded(x, residual):
            return self._run_separate(x, residual)
        return self._run(x, residual)

    def _is_bounded(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether every intermediate stays finite, so that the fused ReLU never meets NaN."""
        entering = max_abs(x)
        bound = entering
        for gain, offset in self.gains:
            bound = bound * gain + offset
            if not bound < self.finite_max:
                return False
        shortcut = entering if self.chain.identity else 0.0 if residual is None else max_abs(residual)
        if self.projection is not None:
            shortcut = entering * self.projection_gain[0] + self.projection_gain[1]
        return bound + shortcut < self.finite_max

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        last, relu = self.convs[-1], self.chain.relu
        a = x
        for conv in self.convs[:-1]:
            a = _call(a, conv, None, True)
        if self.projection is not None:
            return _call_into(_call(x, self.projection, None, False), a, last, relu)
        return _call(a, last, x if self.chain.identity else residual, relu)

    def _run_separate(self, x: Tensor, residual: Tensor | None) -> Tensor:
        a = x
        for conv in self.chain.convs[:-1]:
            a = _separate(a, conv, None, True)
        if self.chain.projection is not None:
            residual = _separate(x, self.chain.projection, None, False)
        elif self.chain.identity:
            residual = x
        return _separate(a, self.chain.convs[-1], residual, self.chain.relu)

"""The ``cpu`` engine: the native kernels of csrc/cpu.

Convolutions are native in float32 and float64 without groups; oneDNN's, with fused epilogues, serve the rest. None has
a prologue, so the caller materialises it; weight gradients and second moments do without, for they apply theirs while
packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import native, reference
from fusedres.engines import Engine, EvalChain, EvalRun, FoldedConv, LiveConv, NetworkRun
from fusedres.engines.onednn import PackedChain, onednn_conv, onednn_reason
from fusedres.layout import add_on_grid_, channels_last, no_sums
from fusedres.problem import as_pair, is_plain_gemm

kernels = torch.ops.fusedres_cpu

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Ops on per-channel vectors and small matrices, where ATen leaves nothing to fuse.
_SMALL_OPS = ("bn_finalize", "bn_constants", "bn_fold", "cast", "pointwise_stats")


class CPUEngine(Engine):
    """See the module's docstring."""

    name = "cpu"
    missing = native.missing
    replays = True
    chains_blocks = True
    flops_per_byte = 7  # with 1 and with 15 the steps of ResNet-50 took longer

    def rejects(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != "cpu":
            return f"it computes on the CPU, the tensors are on {device_type}"
        if dtype not in _DTYPES:
            return f"it has no kernels for {dtype}"
        if op not in _SMALL_OPS and op != "conv_fprop":
            return self.missing
        return None

    bn_constants = staticmethod(reference.bn_constants)
    bn_fold = staticmethod(reference.bn_fold)
    cast = staticmethod(reference.cast)
    pointwise_stats = staticmethod(reference.pointwise_stats)

    scale_shift_add_relu = staticmethod(kernels.scale_shift_add_relu)
    drelu_dbn = staticmethod(kernels.drelu_dbn)
    input_moments = staticmethod(kernels.input_moments)
    bn_relu_maxpool = staticmethod(kernels.bn_relu_maxpool)
    bn_relu_maxpool_backward = staticmethod(kernels.bn_relu_maxpool_backward)

    @staticmethod
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
        vectors = (weight, bias, running_mean, running_var)
        are_native = native.missing is None and all(v is None or _is_dense(v, stats.dtype) for v in vectors)
        finalize = kernels.bn_finalize if are_native else reference.bn_finalize
        return finalize(stats, *vectors, num_batches_tracked, momentum, eps)

    def compile_live(self, chain: EvalChain[LiveConv], dtype: torch.dtype) -> EvalRun | None:
        convs = chain.all_convs
        vectors = [(conv.conv_bias, conv.gamma, conv.beta, conv.mean, conv.var) for conv in convs]
        tensors = [*(conv.w for conv in convs), *(v for of_conv in vectors for v in of_conv if v is not None)]
        if not all(_is_native(conv.w, conv.groups) for conv in convs) or any(t.dtype != dtype for t in tensors):
            return None
        return NativeChain.of(chain, vectors, [conv.eps for conv in convs], [])

    def folded_reason(self, chain: EvalChain[FoldedConv]) -> str | None:
        w = chain.convs[0].w
        if all(_is_native(conv.w, conv.groups) for conv in chain.all_convs):
            return self.rejects("eval_chain", w.device.type, w.dtype)
        if chain.pool is not None:
            return "a pool behind oneDNN's convs is a launch of its own"
        return self.rejects("conv_fprop", w.device.type, w.dtype) or onednn_reason(w.dtype)

    def compile_folded(self, chain: EvalChain[FoldedConv], x_shape: torch.Size) -> EvalRun | None:
        if self.folded_reason(chain) is not None:
            return None
        convs = chain.all_convs
        if all(_is_native(conv.w, conv.groups) for conv in convs):
            sizes = [shape[2:] for shape in chain.input_shapes(x_shape)]
            packed = [
                kernels.conv_pack(conv.w, size, conv.stride, conv.padding, conv.dilation)
                for conv, size in zip(convs, sizes, strict=True)
            ]
            return NativeChain.of(chain, [(conv.bias, *[None] * 4) for conv in convs], [0.0] * len(convs), packed)
        return PackedChain(chain, x_shape)

    def compile_network(self, chains: Sequence[EvalRun], x_shape: torch.Size) -> NetworkRun | None:
        natives = [chain for chain in chains if isinstance(chain, NativeChain)]
        kinds = {(bool(chain.packed), chain.weights[0].dtype) for chain in natives}
        if len(natives) < len(chains) or len(kinds) > 1:
            return None
        program = _program(natives, x_shape)
        return lambda x: kernels.eval_network(x, program)

    def head_reason(self, w: Tensor) -> str | None:
        reason = self.rejects("head_fprop", w.device.type, w.dtype)
        if reason is None and not (_is_native(w, groups=1) and w.is_contiguous()):
            return "its head takes contiguous weights of float32 or float64"
        return reason

    def head(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.head_fprop(x, w, bias)

    @staticmethod
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
        if native.missing is not None and (in_bn is not None or genstats):
            return reference.conv_fprop(x, w, bias, residual, in_bn, stride, padding, dilation, groups, relu, genstats)
        x = _input(x, in_bn)
        if residual is None and not relu and not _is_native(x, groups):
            y = F.conv2d(x, w, bias, stride, padding, dilation, groups)
        else:
            conv = FoldedConv(w, bias, as_pair(stride), as_pair(padding), as_pair(dilation), groups)
            y = _run(x, conv, residual, relu)
        y = channels_last(y)
        return y, kernels.channel_stats(y) if genstats else no_sums(y)

    @staticmethod
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
        plain = (0, 0), (1, 1), 1
        residual, _ = CPUEngine.conv_fprop(x_d, w_d, bias_d, None, None, stride_d, *plain, False, False)
        return CPUEngine.conv_fprop(x, w, bias, residual, None, (1, 1), *plain, relu, False)[0]

    @staticmethod
    def dbn(g: Tensor, z: Tensor | None, bn: Tensor, sums: Tensor | None, inv_count: float) -> Tensor:
        if z is None or sums is None:  # a BN of constants: dz = scale*g
            scale_alone = F.pad(bn[2:3], (0, 0, 2, 1))
            return kernels.scale_shift_add_relu(g, scale_alone, None, None, False)
        return kernels.dbn(g, z, bn, sums, inv_count)

    @staticmethod
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
        dz = g if bn is None else CPUEngine.dbn(g, z, bn, sums, inv_count)
        if _is_native(dz, groups):
            dx = kernels.conv_dgrad(dz, w, input_size, stride, padding, dilation, residual, residual_stride)
            return dx, _drelu_(dx, prev_z, prev_bn)
        # The transposed weight makes it a forward conv, which may add the residual as it stores. Not where the sum over
        # K is the long one: oneDNN's forward conv adds that up with three times the rounding of its dgrad.
        if is_plain_gemm(w.shape[2:], stride, padding, groups) and w.shape[0] <= w.shape[1]:
            fused = residual if tuple(residual_stride) == (1, 1) else None
            transposed = FoldedConv(channels_last(w.transpose(0, 1)), None, (1, 1), (0, 0), (1, 1), 1)
            dx = channels_last(onednn_conv(dz, transposed, fused, False))
            residual = residual if fused is None else None
        else:
            dx = reference.convolution_dgrad(dz, w, input_size, stride, padding, dilation, groups)
        if residual is not None:
            add_on_grid_(dx, residual, residual_stride)
        return dx, _drelu_(dx, prev_z, prev_bn)

    @staticmethod
    def conv_dgrad_drelu_dbn(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        conv, tail = (*args[:-5], (1, 1), None, None), args[-5:]  # the last five are those of drelu_dbn
        dx, _ = CPUEngine.conv_dgrad(*conv)
        return dx, *kernels.drelu_dbn_by_output_(dx, *tail)

    @staticmethod
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
        if bn is not None and (z is None or groups != 1):
            g, z, bn, sums = CPUEngine.dbn(g, z, bn, sums, inv_count), None, None, None
        if groups == 1:
            return kernels.conv_wgrad(g, z, bn, sums, inv_count, x, in_bn, kernel_size, stride, padding, dilation)
        return reference.convolution_wgrad(g, _input(x, in_bn), kernel_size, stride, padding, dilation, groups)

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
        product = kernels.centered_wgrad(g, x, in_bn, moments[-1], stride)
        return reference.pointwise_wgrad_from_product(product, sum_g, moments, w, bn, inv_count)

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
        from_g, from_x, constant = reference.pointwise_dgrad_operands(moments, w, bn, sums, inv_count)
        a = channels_last(_input(x, in_bn)[:, :, :: stride[0], :: stride[1]])
        part = _run(a, _pointwise(from_x, constant, g.dtype), None, False)
        dx = channels_last(_run(g, _pointwise(from_g, None, g.dtype), part, False))
        return dx, _drelu_(dx, prev_z, prev_bn)


def _input(x: Tensor, in_bn: Tensor | None) -> Tensor:
    """A conv's input with its prologue materialised."""
    return x if in_bn is None else kernels.scale_shift_add_relu(x, in_bn, None, None, True)


@dataclass(frozen=True, eq=False)
class NativeChain:
    """A chain in one native call (fusedres/native.py): the tensors and geometries of its convs, and its form.

    ``vectors`` are the five of each conv; ``packed`` its weights, packed, or none.
    """

    weights: list[Tensor]
    packed: list[Tensor]
    vectors: list[Tensor]
    eps: Tensor
    geometry: list[int]
    identity: bool
    projection: bool
    relu: bool
    pool: tuple[int, ...]

    @classmethod
    def of(
        cls,
        chain: EvalChain[LiveConv] | EvalChain[FoldedConv],
        vectors: Sequence[Sequence[Tensor | None]],
        eps: Sequence[float],
        packed: list[Tensor],
    ) -> NativeChain:
        """``vectors`` are None where absent."""
        convs = chain.all_convs
        weights = [conv.w for conv in convs]
        none = weights[0].new_empty(0)
        flat = [none if vector is None else vector for of_conv in vectors for vector in of_conv]
        all_eps = torch.tensor(eps, dtype=torch.float64)
        geometry = [size for conv in convs for size in (*conv.stride, *conv.padding, *conv.dilation)]
        form = chain.identity, chain.projection is not None, chain.relu, chain.pool or ()
        return cls(weights, packed, flat, all_eps, geometry, *form)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        tensors = self.weights, self.packed, self.vectors, self.eps
        return kernels.eval_chain(
            x, residual, *tensors, self.geometry, self.identity, self.projection, self.relu, self.pool
        )


def _program(chains: Sequence[NativeChain], x_shape: torch.Size) -> Tensor:
    """``chains``, one behind another, made ready for inputs of ``x_shape``."""
    forms = [(len(c.weights), c.identity, c.projection, c.relu, *(c.pool or (0, 0, 0))) for c in chains]
    return kernels.eval_program(
        [w for chain in chains for w in chain.weights],
        [w for chain in chains for w in chain.packed],
        [v for chain in chains for v in chain.vectors],
        torch.cat([chain.eps for chain in chains]),
        [size for chain in chains for size in chain.geometry],
        [size for form in forms for size in form],
        x_shape,
    )


def _is_dense(vector: Tensor, dtype: torch.dtype) -> bool:
    return vector.dtype == dtype and vector.is_contiguous()


def _is_native(x: Tensor, groups: int) -> bool:
    """Whether the native library computes convolutions of ``x``."""
    return native.missing is None and groups == 1 and x.dtype in (torch.float32, torch.float64)


def _run(x: Tensor, conv: FoldedConv, residual: Tensor | None, relu: bool) -> Tensor:
    """``act(conv(x) + bias + residual)``, by the native library or oneDNN."""
    if not _is_native(x, conv.groups):
        return onednn_conv(x, conv, residual, relu)
    w, bias, *geometry, _ = conv
    return kernels.conv_fprop(x, w, None, bias, residual, *geometry, relu)


def _drelu_(dx: Tensor, prev_z: Tensor | None, prev_bn: Tensor | None) -> Tensor:
    """The dgrad epilogue, in place on a ``dx`` that its op made: mask by the ReLU before, return that BN's sums."""
    return no_sums(dx) if prev_z is None else kernels.drelu_dbn_(dx, prev_z, prev_bn)


def _pointwise(matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> FoldedConv:
    """The 1x1 conv that multiplies pixels (rows) by ``matrix`` (C_in, C_out)."""
    w = channels_last(matrix.t().to(dtype)[:, :, None, None])
    return FoldedConv(w, None if bias is None else bias.to(dtype), (1, 1), (0, 0), (1, 1), 1)


CPU = CPUEngine()

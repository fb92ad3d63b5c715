"""The ``cuda`` engine: the native kernels of csrc/cuda. In eval each is a whole block, a stem or a head; in
training they are the tails of blocks.

It has no convolutions of its own: what no kernel serves in one launch runs in the next engine, a launch a conv, and in
training the tails stand between that engine's convs.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from fusedres import native, reference
from fusedres.engines import Engine, EvalChain, EvalRun, FoldedConv
from fusedres.engines.block_kernels import arguments, form_reason, head_reason, is_measured, kernel_of, size_reason
from fusedres.engines.nvidia import old_device, shared_memory
from fusedres.layout import channels_last

kernels = torch.ops.fusedres_cuda

_DTYPES = (torch.bfloat16, torch.float16)
_TAIL_DTYPES = (torch.float32, *_DTYPES)
_TAILS = ("scale_shift_add_relu", "drelu_dbn", "dbn", "channel_stats", "bn_finalize")
_ALIGNMENT = 16  # bytes
_UNMEASURED = "nobody has measured it on a GPU"


class CUDAEngine(Engine):
    """See the module's docstring. A subclass may run the same kernels on another device type."""

    name = "cuda"
    missing = native.missing_cuda
    device_type = "cuda"

    def rejects(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        reason = self._tensor_reason(device_type, dtype, _TAIL_DTYPES)
        if reason is not None or op in _TAILS:
            return reason
        return "it has kernels for whole blocks in eval and for tails in training, none for this alone"

    def only_by_name(self, device_type: str) -> str | None:
        return "nobody has measured its tails on a GPU"

    @staticmethod
    def scale_shift_add_relu(
        z: Tensor, bn: Tensor, residual: Tensor | None, residual_bn: Tensor | None, relu: bool
    ) -> Tensor:
        return kernels.scale_shift_add_relu(_dense(z), bn, _dense(residual), residual_bn, relu)

    @staticmethod
    def drelu_dbn(
        dy: Tensor,
        y: Tensor | None,
        z: Tensor | None,
        bn: Tensor | None,
        residual_z: Tensor | None,
        residual_bn: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.drelu_dbn(_dense(dy), _dense(y), _dense(z), bn, _dense(residual_z), residual_bn)

    @staticmethod
    def dbn(g: Tensor, z: Tensor | None, bn: Tensor, sums: Tensor | None, inv_count: float) -> Tensor:
        return kernels.dbn(_dense(g), _dense(z), bn, sums, inv_count)

    @staticmethod
    def channel_stats(z: Tensor) -> Tensor:
        """(count, mean, M2) of each channel of ``z`` (N, K, H, W) -> (3, K)."""
        return kernels.channel_stats(_dense(z))

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
        """Vectors with gaps, or of several dtypes, go through the reference."""
        vectors = [v for v in (weight, bias, running_mean, running_var) if v is not None]
        dtypes = {v.dtype for v in vectors}
        are_served = len(dtypes) <= 1 and dtypes <= set(_TAIL_DTYPES) and all(v.is_contiguous() for v in vectors)
        finalize = kernels.bn_finalize if are_served else reference.bn_finalize
        return finalize(stats, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)

    def folded_reason(self, chain: EvalChain[FoldedConv]) -> str | None:
        w = chain.convs[0].w
        reason = self._tensor_reason(w.device.type, w.dtype) or form_reason(chain)
        return reason or size_reason(chain, self.shared_memory(w.device), _shared_bytes)

    def folded_only_by_name(self, chain: EvalChain[FoldedConv]) -> str | None:
        if is_measured(chain):
            return None
        if kernel_of(chain) == "stem_fprop":
            return _UNMEASURED
        return "a launch a conv is faster wherever both were measured (docs/gpu.md)"

    def compile_folded(self, chain: EvalChain[FoldedConv], x_shape: torch.Size) -> EvalRun | None:
        name = kernel_of(chain)
        if name is None or self.folded_reason(chain) is not None:
            return None
        kernel, operands = getattr(kernels, name), arguments(chain)
        return lambda x, _: kernel(_aligned(x), *operands)

    def head_reason(self, w: Tensor) -> str | None:
        return self._tensor_reason(w.device.type, w.dtype) or head_reason(w)

    def head_only_by_name(self) -> str | None:
        return _UNMEASURED

    def head(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.head_fprop(_aligned(x), _aligned(w), bias)

    def _tensor_reason(
        self, device_type: str, dtype: torch.dtype, served: tuple[torch.dtype, ...] = _DTYPES
    ) -> str | None:
        if device_type != self.device_type:
            return f"it computes on CUDA devices, the tensors are on {device_type}"
        if dtype not in served:
            return f"it has no kernels for {dtype}"
        return self.missing or old_device()

    def shared_memory(self, device: torch.device) -> int:
        """Bytes of shared memory that one thread block may have."""
        return shared_memory(device)


def _shared_bytes(kernel: str, width: int, stride: int) -> int:
    """Bytes of shared memory that a block of ``kernel`` needs at least: the native library knows its tiles."""
    if kernel == "bottleneck_fprop":
        return kernels.bottleneck_shared_bytes(width, stride)
    return kernels.basic_block_shared_bytes(width)


@overload
def _dense(x: Tensor) -> Tensor: ...
@overload
def _dense(x: Tensor | None) -> Tensor | None: ...
def _dense(x: Tensor | None) -> Tensor | None:
    """``x`` (N, C, H, W) channels_last and aligned, or a copy that is; None where it is None."""
    return None if x is None else _aligned(channels_last(x))


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy where a view begins in the middle of 16 bytes."""
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone(memory_format=torch.preserve_format)


CUDA = CUDAEngine()

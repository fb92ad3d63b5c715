"""The ``cuda`` engine: the native kernels of csrc/cuda, each a whole block, the stem or the head of a network in eval.

It has no convolutions of its own: what no kernel serves in one launch runs in the next engine, a launch a conv.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import native
from fusedres.engines import Engine, EvalChain, EvalRun, FoldedConv
from fusedres.engines.block_kernels import arguments, form_reason, head_reason, is_measured, kernel_of, size_reason
from fusedres.engines.nvidia import old_device, shared_memory

kernels = torch.ops.fusedres_cuda

_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes
_UNMEASURED = "nobody has measured it on a GPU"


class CUDAEngine(Engine):
    """See the module's docstring. A subclass may run the same kernels on another device type."""

    name = "cuda"
    missing = native.missing_cuda
    device_type = "cuda"

    def rejects(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        return self._tensor_reason(device_type, dtype) or "it has kernels for whole blocks in eval, none for this alone"

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

    def _tensor_reason(self, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != self.device_type:
            return f"it computes on CUDA devices, the tensors are on {device_type}"
        if dtype not in _DTYPES:
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


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy where a view begins in the middle of 16 bytes."""
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone(memory_format=torch.preserve_format)


CUDA = CUDAEngine()

"""``cast``: a parameter, or a gradient of one, in another dtype: a launch that joins a program's list of launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres import reference
from fusedres.kernels import tile
from fusedres.kernels.launch import cdiv, run

_BLOCK = 2048
_WARPS = 4


@triton.jit
def cast_kernel(x, out, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets, mask=offsets < count).to(tl.float32)
    tl.store(out + offsets, tile.cast(value, out.dtype.element_ty), mask=offsets < count)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``fusedres.ops.cast``."""
    is_dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    if dtype == torch.float64 or not is_dense or not x.numel():
        return reference.cast(x, dtype)
    out = torch.empty_like(x, dtype=dtype)
    run(cast_kernel, (cdiv(x.numel(), _BLOCK),), x, out, x.numel(), BLOCK=_BLOCK, num_warps=_WARPS)
    return out

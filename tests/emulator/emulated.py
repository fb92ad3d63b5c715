"""The CUDA kernels as functions of CPU tensors: shapes checked, outputs poisoned with NaN, run by the emulator."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from build_emulator import load, sanitized
from torch import Tensor

CL = torch.channels_last
#: Dynamic shared memory of a block on sm_90.
SHARED_LIMIT = 227 << 10
#: Fiber orders a kernel must not care about: (order, seed).
ORDERS = (("forward", 0), ("reverse", 0), ("seeded", 1), ("seeded", 2))


def options(order: str = "forward", seed: int = 0, **faults: Any) -> Any:
    """How to run: ``faults`` are fields of csrc/emulator/options.h."""
    module = load("fusedres_emulator")
    result = module.Options()
    result.order = getattr(module.Order, order)
    result.seed = seed
    result.workers = len(os.sched_getaffinity(0))
    for name, value in faults.items():
        setattr(result, name, value)
    return result


def checked(dtype: torch.dtype) -> Any:
    """How accuracy is tested: in float16 under the race detector; other dtypes touch the same bytes.

    AddressSanitizer watches the shared memory that kernels see, which the race detector leaves alone: one or the other.
    """
    return options(racecheck=dtype == torch.float16 and not sanitized())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def address(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int:
    """Of a dense tensor with these sizes; four of them mean channels_last."""
    if tensor is None:
        return 0
    dense = tensor.is_contiguous(memory_format=CL) if len(shape) == 4 else tensor.is_contiguous()
    assert (tuple(tensor.shape), tensor.dtype, dense) == (shape, dtype, True), (tensor.shape, tensor.dtype, dense)
    return tensor.data_ptr()


def poisoned(dtype: torch.dtype, *shape: int) -> Tensor:
    """An output that nothing has been written to: NaN, channels_last where it is a map."""
    fill = math.nan if dtype.is_floating_point else -1
    result = torch.full(shape, fill, dtype=dtype)
    return result.contiguous(memory_format=CL) if len(shape) == 4 else result


def bottleneck_fprop(
    x: Tensor,
    convs: list[tuple[Tensor, Tensor]],
    w_shortcut: Tensor | None,
    stride: int,
    run: Any = None,
    tile: int = -1,
    shared_limit: int = SHARED_LIMIT,
) -> tuple[Tensor, dict[str, Any]]:
    """``y`` and the totals of the launch. ``convs``: (w, bias) of conv1, conv2, conv3."""
    (w1, b1), (w2, b2), (w3, b3) = convs
    (n, c, h, w), f, k, dtype, f32 = x.shape, w1.shape[0], w3.shape[0], x.dtype, torch.float32
    p, q = (h - 1) // stride + 1, (w - 1) // stride + 1
    y = poisoned(dtype, n, k, p, q)
    tensors = [
        address(x, dtype, n, c, h, w),
        address(w1, dtype, f, c, 1, 1),
        address(w2, dtype, f, f, 3, 3),
        address(w3, dtype, k, f, 1, 1),
        address(w_shortcut, dtype, k, c, 1, 1),
        *(address(b, f32, size) for b, size in ((b1, f), (b2, f), (b3, k))),
        address(y, dtype, n, k, p, q),
    ]
    sizes = [n, h, w, c, f, k, p, q]
    call = load("fusedres_emulator").bottleneck_fprop
    return y, call(name_of(dtype), tensors, sizes, stride, shared_limit, tile, run or options())


def stem_fprop(x: Tensor, w: Tensor, bias: Tensor, run: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """``y`` and the totals of the launch. ``w`` (K, 4, R, R + 1) as ``block_kernels.stem_weight`` pads it."""
    (n, c, h, w_), (k, _, r, _), dtype = x.shape, w.shape, x.dtype
    p, q = ((h - 1) // 2 + 1, (w_ - 1) // 2 + 1) if r == 7 else (h, w_)
    u, v = ((p - 1) // 2 + 1, (q - 1) // 2 + 1) if r == 7 else (p, q)
    y = poisoned(dtype, n, k, u, v)
    tensors = [
        address(x, dtype, n, c, h, w_),
        address(w, dtype, k, 4, r, r + 1),
        address(bias, torch.float32, k),
        address(y, dtype, n, k, u, v),
    ]
    sizes = [n, h, w_, c, k, p, q, u, v]
    return y, load("fusedres_emulator").stem_fprop(name_of(dtype), tensors, sizes, r, SHARED_LIMIT, run or options())


def head_fprop(
    x: Tensor, w: Tensor, bias: Tensor | None, run: Any = None, tickets: int = 0
) -> tuple[Tensor, dict[str, Any]]:
    """``y`` and the totals of the launch. ``tickets``: how many blocks are said to have begun before the first."""
    (n, c, h, width), f, dtype = x.shape, w.shape[0], x.dtype
    module = load("fusedres_emulator")
    pooled, y = poisoned(dtype, n, c), poisoned(dtype, n, f)
    counters = torch.zeros(module.head_counters(n), dtype=torch.int32)
    counters[0] = tickets
    tensors = [
        address(x, dtype, n, c, h, width),
        address(w, dtype, f, c),
        address(bias, dtype, f),
        address(pooled, dtype, n, c),
        address(counters, torch.int32, *counters.shape),
        address(y, dtype, n, f),
    ]
    return y, module.head_fprop(name_of(dtype), tensors, [n, h * width, c, f], SHARED_LIMIT, run or options())


def basic_block_fprop(
    x: Tensor,
    convs: list[tuple[Tensor, Tensor]],
    w_shortcut: Tensor | None,
    stride: int,
    run: Any = None,
    tile: int = -1,
    shared_limit: int = SHARED_LIMIT,
) -> tuple[Tensor, dict[str, Any]]:
    """``y`` and the totals of the launch. ``convs``: (w, bias) of conv1, conv2."""
    (w1, b1), (w2, b2) = convs
    (n, c, h, w), f, dtype, f32 = x.shape, w1.shape[0], x.dtype, torch.float32
    p, q = (h - 1) // stride + 1, (w - 1) // stride + 1
    y = poisoned(dtype, n, f, p, q)
    tensors = [
        address(x, dtype, n, c, h, w),
        address(w1, dtype, f, c, 3, 3),
        address(w2, dtype, f, f, 3, 3),
        address(w_shortcut, dtype, f, c, 1, 1),
        address(b1, f32, f),
        address(b2, f32, f),
        address(y, dtype, n, f, p, q),
    ]
    sizes = [n, h, w, c, f, p, q, stride]
    call = load("fusedres_emulator").basic_block_fprop
    return y, call(name_of(dtype), tensors, sizes, shared_limit, tile, run or options())

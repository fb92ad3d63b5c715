"""What engines share about tensors: accumulation dtypes, memory format, the named rows of per-channel tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BN_ROWS = 4  # mean, invstd, scale, shift
STAT_ROWS = 3  # count, mean, M2
SUM_ROWS = 2  # dbeta, dgamma


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics and per-channel vectors of ``dtype`` activations are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class BN(NamedTuple):
    """The rows of a ``bn`` tensor (4, K): BN is ``scale*z + shift`` = ``(z - mean)*invstd*weight + bias``."""

    mean: Tensor
    invstd: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def rows(cls, bn: Tensor) -> BN:
        return cls(*bn.unbind(0))


def per_channel(vector: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1), to broadcast over (N, C, H, W)."""
    return vector.view(1, -1, 1, 1)


def channels_last(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) dense in NHWC order: itself where it is already, else a copy."""
    return x.contiguous(memory_format=torch.channels_last)


def new_activation(like: Tensor, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (N, C, H, W) channels_last tensor on the device and, unless told, of the dtype of ``like``."""
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def no_sums(like: Tensor) -> Tensor:
    """What an op returns for statistics or sums of ``like`` that nobody asked for: (0,)."""
    return like.new_empty(0, dtype=acc_dtype(like.dtype))


def add_on_grid_(x: Tensor, part: Tensor, stride: Sequence[int]) -> None:
    """Add ``part`` to every ``stride``-th row and column of ``x`` (N, C, H, W), as many as ``part`` has."""
    x[:, :, :: stride[0], :: stride[1]] += part


def pixels(x: Tensor) -> int:
    """How many values each channel of ``x`` (N, C, H, W) has: N*H*W."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def pixel_matrix(x: Tensor, stride: Sequence[int] = (1, 1)) -> Tensor:
    """(N, C, H, W) channels_last -> (N*P*Q, C): the pixels of every ``stride``-th row and column, as GEMM rows."""
    x = x[:, :, :: stride[0], :: stride[1]] if tuple(stride) != (1, 1) else x
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def from_pixel_matrix(rows: Tensor, n: int, p: int, q: int) -> Tensor:
    """(N*P*Q, C) -> (N, C, P, Q) channels_last, without a copy."""
    return rows.view(n, p, q, rows.shape[1]).permute(0, 3, 1, 2)

"""The conv problem: every size of one 2-D convolution, and the implicit-GEMM axes that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Pair = tuple[int, int]


def as_pair(value: int | Sequence[int]) -> Pair:
    """``3 -> (3, 3)``; ``(3, 1) -> (3, 1)``. ValueError for any other length."""
    if type(value) is tuple and len(value) == 2:
        return value
    if isinstance(value, int):
        return value, value
    if not isinstance(value, (list, tuple)) or len(value) not in (1, 2):
        raise ValueError(f"expected one or two integers, got {value!r}")
    return value[0], value[-1]


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output length of one spatial axis: ``floor((size + 2*padding - dilation*(kernel-1) - 1) / stride) + 1``."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def is_plain_gemm(kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int) -> bool:
    """Whether a conv of this geometry multiplies each pixel by one matrix: 1x1, stride 1, no padding, no groups."""
    return (*kernel_size, *stride, *padding, groups) == (1, 1, 1, 1, 0, 0, 1)


@dataclass(frozen=True)
class ConvProblem:
    """One convolution ``x (N, C, H, W) * w (K, C/groups, R, S) -> y (N, K, P, Q)``."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(
        cls,
        x: torch.Tensor | torch.Size,
        w: torch.Tensor | torch.Size,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> ConvProblem:
        """The problem of convolving ``x`` with ``w`` (tensors or their shapes)."""
        N, C, H, W = x.shape if isinstance(x, torch.Tensor) else x
        K, _, R, S = w.shape if isinstance(w, torch.Tensor) else w
        return cls(N, C, H, W, K, R, S, as_pair(stride), as_pair(padding), as_pair(dilation), groups)

    @property
    def P(self) -> int:
        return out_size(self.H, self.R, self.stride[0], self.padding[0], self.dilation[0])

    @property
    def Q(self) -> int:
        return out_size(self.W, self.S, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def gemm_m(self) -> int:
        return self.N * self.P * self.Q

    @property
    def gemm_n(self) -> int:
        return self.K

    @property
    def gemm_k(self) -> int:
        return self.R * self.S * self.C // self.groups

    @property
    def flops(self) -> int:
        """Multiply-adds counted as two operations."""
        return 2 * self.gemm_m * self.gemm_n * self.gemm_k

    @property
    def is_pointwise(self) -> bool:
        """A 1x1 convolution without padding or groups: a plain GEMM over a (strided) grid of pixels."""
        return (self.R, self.S, self.padding, self.groups) == (1, 1, (0, 0), 1)

"""Sample calls of every op: all optional operands present and absent, ragged sizes, strides, dilations and groups."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.layout import acc_dtype
from fusedres.problem import ConvProblem

#: name -> problem; every axis is ragged somewhere, and the last ones have ambiguous strides.
PROBLEMS = {
    "3x3": ConvProblem(2, 8, 7, 5, 16, 3, 3, padding=(1, 1)),
    "3x3s2": ConvProblem(3, 5, 9, 6, 7, 3, 3, stride=(2, 2), padding=(1, 1)),
    "3x3d2": ConvProblem(2, 6, 8, 9, 5, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "3x3g2": ConvProblem(2, 6, 5, 7, 4, 3, 3, stride=(2, 2), padding=(1, 1), groups=2),
    "3x3g9": ConvProblem(2, 9, 5, 4, 9, 3, 3, padding=(1, 1), groups=9),
    "1x1": ConvProblem(2, 8, 5, 7, 32, 1, 1),
    "1x1s2": ConvProblem(3, 6, 7, 5, 13, 1, 1, stride=(2, 2)),
    "1x1g4": ConvProblem(2, 8, 4, 4, 8, 1, 1, groups=4),
    "1x1p1": ConvProblem(2, 4, 4, 3, 8, 1, 1, padding=(1, 1)),
    "7x7s2": ConvProblem(2, 3, 17, 15, 8, 7, 7, stride=(2, 2), padding=(3, 3)),
    "3x1": ConvProblem(2, 5, 8, 7, 6, 3, 1, stride=(2, 1), padding=(1, 0)),
    "unpadded": ConvProblem(1, 4, 6, 7, 3, 3, 3, stride=(3, 2)),
    "channel": ConvProblem(3, 1, 5, 4, 1, 3, 3, padding=(1, 1)),
    "pixel": ConvProblem(4, 6, 1, 1, 10, 3, 3, padding=(1, 1)),
    "image": ConvProblem(1, 7, 1, 3, 5, 1, 1),
}
POINTWISE = [name for name, problem in PROBLEMS.items() if problem.is_pointwise]


class Sample(NamedTuple):
    """One call of ``fusedres::<op>``."""

    op: str
    label: str
    args: tuple[Any, ...]


class Operands:
    """Makes operands of one dtype, reproducibly."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.acc = acc_dtype(dtype)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def activation(self, *size: int) -> Tensor:
        return self.normal(*size).to(self.dtype).contiguous(memory_format=torch.channels_last)

    def weight(self, problem: ConvProblem) -> Tensor:
        size = (problem.K, problem.C // problem.groups, problem.R, problem.S)
        return (self.normal(*size) * problem.gemm_k**-0.5).to(self.dtype)

    def input(self, problem: ConvProblem) -> Tensor:
        return self.activation(problem.N, problem.C, problem.H, problem.W)

    def output(self, problem: ConvProblem) -> Tensor:
        return self.activation(problem.N, problem.K, problem.P, problem.Q)

    def vector(self, size: int) -> Tensor:
        return self.normal(size).to(self.dtype)

    def bn(self, channels: int) -> Tensor:
        """mean, invstd, scale, shift (4, C) of some BN, weights of either sign."""
        mean, weight, bias = (0.3 * self.normal(channels) for _ in range(3))
        invstd = 0.5 + torch.rand(channels, generator=self.generator, dtype=torch.float64)
        scale = (1 + weight * 2) * invstd
        return torch.stack([mean, invstd, scale, bias - mean * scale]).to(self.acc)

    def sums(self, channels: int) -> Tensor:
        return self.normal(2, channels).to(self.acc)

    def moments(self, x: Tensor, stride: tuple[int, int]) -> Tensor:
        """Those of ``x`` (N, C, H, W) itself."""
        rows = x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).reshape(-1, x.shape[1]).to(self.acc)
        centred = rows - rows.mean(0)
        return torch.cat([centred.t() @ centred, rows.mean(0, keepdim=True)])


def samples_of(op: str, dtype: torch.dtype = torch.float32) -> list[Sample]:
    """Sample calls of ``op`` with activations of ``dtype``."""
    return [sample for sample in samples(dtype) if sample.op == op]


@functools.cache
def samples(dtype: torch.dtype = torch.float32) -> tuple[Sample, ...]:
    """Sample calls of all ops with activations of ``dtype``. They are shared: copy what an op may change."""
    return tuple(_samples(dtype))


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    make = Operands(dtype)
    for name, problem in PROBLEMS.items():
        yield from _conv_samples(make, name, problem)
        if name in POINTWISE:
            yield from _pointwise_samples(make, name, problem)
    yield from _channel_samples(make)
    for size in ((2, 8, 7, 5), (3, 5, 4, 9), (1, 1, 3, 2), (4, 6, 1, 1)):
        yield from _tail_samples(make, size)
    for size, pool in (((2, 8, 9, 7), (3, 2, 1)), ((3, 5, 6, 8), (2, 2, 0)), ((1, 1, 5, 5), (5, 3, 2))):
        yield from _pool_samples(make, size, pool)


def _conv_samples(make: Operands, name: str, problem: ConvProblem) -> Iterator[Sample]:
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    x, w, y = make.input(problem), make.weight(problem), make.output(problem)
    bias, in_bn, bn, sums = make.vector(problem.K), make.bn(problem.C), make.bn(problem.K), make.sums(problem.K)
    yield Sample("conv_fprop", f"{name}-plain", (x, w, None, None, None, *geometry, False, False))
    yield Sample("conv_fprop", f"{name}-genstats", (x, w, bias, None, in_bn, *geometry, False, True))
    yield Sample("conv_fprop", f"{name}-relu", (x, w, bias, None, None, *geometry, True, False))
    yield Sample("conv_fprop", f"{name}-everything", (x, w, bias, y, in_bn, *geometry, True, True))

    g, z, count = make.output(problem), y, 1 / problem.gemm_m
    size, residual = (problem.H, problem.W), make.input(problem)
    compact = make.activation(problem.N, problem.C, -(-problem.H // 2), -(-problem.W // 2))
    plain, lazy, constant = (g, None, None, None, 0.0), (g, z, bn, sums, count), (g, None, bn, None, 0.0)
    yield Sample("conv_dgrad", f"{name}-plain", (*plain, w, size, *geometry, None, (1, 1), None, None))
    yield Sample("conv_dgrad", f"{name}-residual", (*plain, w, size, *geometry, residual, (1, 1), None, None))
    yield Sample("conv_dgrad", f"{name}-compact", (*lazy, w, size, *geometry, compact, (2, 2), None, None))
    yield Sample("conv_dgrad", f"{name}-constant", (*constant, w, size, *geometry, residual, (1, 1), None, None))
    yield Sample("conv_dgrad", f"{name}-drelu", (*plain, w, size, *geometry, None, (1, 1), x, in_bn))
    yield Sample("conv_dgrad", f"{name}-everything", (*lazy, w, size, *geometry, None, (1, 1), x, in_bn))

    side = make.input(problem), make.bn(problem.C)
    for label, gradient, tail in (
        ("bare", plain, (None, None, None, None)),
        ("stored", lazy, (x, in_bn, None, None)),
        ("both", lazy, (x, in_bn, *side)),
        ("side", constant, (None, None, *side)),
    ):
        border = (w, size, *geometry, residual, make.input(problem), *tail)
        yield Sample("conv_dgrad_drelu_dbn", f"{name}-{label}", (*gradient, *border))

    kernel = (problem.R, problem.S)
    yield Sample("conv_wgrad", f"{name}-plain", (*plain, x, None, kernel, *geometry))
    yield Sample("conv_wgrad", f"{name}-activated", (*plain, x, in_bn, kernel, *geometry))
    yield Sample("conv_wgrad", f"{name}-constant", (*constant, x, in_bn, kernel, *geometry))
    yield Sample("conv_wgrad", f"{name}-everything", (*lazy, x, in_bn, kernel, *geometry))


def _pointwise_samples(make: Operands, name: str, problem: ConvProblem) -> Iterator[Sample]:
    x, w, g, stride = make.input(problem), make.weight(problem), make.output(problem), problem.stride
    in_bn, bn, sums, bias = make.bn(problem.C), make.bn(problem.K), make.sums(problem.K), make.vector(problem.K)
    count, sum_g = 1 / problem.gemm_m, make.sums(problem.K)[0].clone()
    a, w_a = make.activation(problem.N, 5, problem.P, problem.Q), make.weight(replace(problem, C=5))
    for label, biases, relu in (("plain", (None, None), False), ("everything", (bias, make.vector(problem.K)), True)):
        args = (a, w_a, biases[0], x, w, biases[1], stride, relu)
        yield Sample("conv_projection", f"{name}-{label}", args)
    moments = make.moments(x, stride)
    yield Sample("input_moments", f"{name}-plain", (x, None, stride))
    yield Sample("input_moments", f"{name}-activated", (x, in_bn, stride))
    yield Sample("pointwise_stats", f"{name}-plain", (moments, w, None, problem.gemm_m))
    yield Sample("pointwise_stats", f"{name}-bias", (moments, w, bias, problem.gemm_m))
    for label, prologue in (("plain", None), ("activated", in_bn)):
        yield Sample("pointwise_wgrad", f"{name}-{label}", (g, sum_g, x, prologue, moments, w, bn, count, stride))
        operands = (g, x, prologue, moments, w, bn, sums, count, stride)
        yield Sample("pointwise_dgrad", f"{name}-{label}", (*operands, None, None))
    if stride == (1, 1):
        yield Sample("pointwise_dgrad", f"{name}-drelu", (g, x, in_bn, moments, w, bn, sums, count, stride, x, in_bn))


def _channel_samples(make: Operands) -> Iterator[Sample]:
    k = 7
    mean, m2 = make.normal(k), 3 + make.normal(k).square()
    stats = torch.stack([torch.full_like(mean, 12), mean, m2]).to(make.acc)
    running = [t.to(make.acc) for t in (make.normal(k), make.normal(k).square())]
    weight, bias, counter = make.normal(k).to(make.acc), make.normal(k).to(make.acc), torch.tensor(3)
    yield Sample("bn_finalize", "bare", (stats, None, None, None, None, None, 0.1, 1e-5))
    yield Sample("bn_finalize", "everything", (stats, weight, bias, *running, counter, 0.1, 1e-3))
    yield Sample(
        "bn_finalize", "cumulative", (stats, weight, bias, *(t.clone() for t in running), counter + 0, None, 0.1)
    )
    yield Sample("bn_constants", "bare", (*running, None, None, 1e-5, make.acc))
    yield Sample("bn_constants", "affine", (*running, weight, bias, 1e-3, make.acc))
    w, bn = make.weight(ConvProblem(1, 5, 3, 3, k, 3, 3)), make.bn(k)
    yield Sample("bn_fold", "bare", (w, None, bn))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        if dtype != w.dtype:
            weight = make.weight(ConvProblem(1, 5, 3, 3, k, 3, 3))
            yield Sample("cast", f"to-{dtype}".replace("torch.", ""), (weight, dtype))
    yield Sample("cast", "vector", (make.vector(k), torch.float32 if w.dtype != torch.float32 else torch.float16))
    yield Sample("bn_fold", "bias", (w.contiguous(memory_format=torch.channels_last), make.vector(k), bn))


def _tail_samples(make: Operands, size: tuple[int, ...]) -> Iterator[Sample]:
    name, k = "x".join(map(str, size)), size[1]
    z, r, y, dy = (make.activation(*size) for _ in range(4))
    bn, residual_bn, sums = make.bn(k), make.bn(k), make.sums(k)
    for relu in (True, False):
        tail = f"{name}-{'relu' if relu else 'linear'}"
        yield Sample("scale_shift_add_relu", f"{tail}-plain", (z, bn, None, None, relu))
        yield Sample("scale_shift_add_relu", f"{tail}-residual", (z, bn, r, None, relu))
        yield Sample("scale_shift_add_relu", f"{tail}-projection", (z, bn, r, residual_bn, relu))
    for label, output in (("relu", y), ("linear", None)):
        yield Sample("drelu_dbn", f"{name}-{label}", (dy, output, z, bn, None, None))
        yield Sample("drelu_dbn", f"{name}-{label}-projection", (dy, output, z, bn, r, residual_bn))
        yield Sample("drelu_dbn", f"{name}-{label}-closed", (dy, output, None, None, None, None))
        yield Sample("drelu_dbn", f"{name}-{label}-closed-projection", (dy, output, None, None, r, residual_bn))
    yield Sample("dbn", f"{name}-batch", (dy, z, bn, sums, 1 / 12))
    yield Sample("dbn", f"{name}-constant", (dy, z, bn, sums, 0.0))
    yield Sample("dbn", f"{name}-constant-alone", (dy, None, bn, None, 0.0))


def _pool_samples(make: Operands, size: tuple[int, ...], pool: tuple[int, int, int]) -> Iterator[Sample]:
    name = "x".join(map(str, size))
    z, bn = make.activation(*size), make.bn(size[1])
    y, tap = torch.ops.fusedres.bn_relu_maxpool(z, bn, *pool)
    yield Sample("bn_relu_maxpool", name, (z, bn, *pool))
    for label, inv_count in (("batch", 1 / 12), ("constant", 0.0)):
        args = (make.activation(*y.shape), tap, z, bn, *pool, inv_count)
        yield Sample("bn_relu_maxpool_backward", f"{name}-{label}", args)

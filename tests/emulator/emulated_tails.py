"""The CUDA kernels of a training step's tails as functions of CPU tensors: the ops of their names, run by the emulator.

Each returns what its op does, and appends the launch's totals to ``totals`` where a list is given.
"""

from __future__ import annotations

from typing import Any

import torch
from build_emulator import load
from emulated import address, name_of, options, poisoned
from torch import Tensor

F32 = torch.float32
Totals = list[dict[str, int]]


def _map(t: Tensor | None, like: Tensor) -> int:
    """The address of an activation like ``like``, aligned as the native op wants it."""
    at = address(t, like.dtype, *like.shape)
    assert at % (16 if like.shape[1] * like.itemsize % 16 == 0 else like.itemsize) == 0
    return at


def _vectors(t: Tensor | None, *shape: int) -> int:
    return address(t, F32, *shape)


def _rows(t: Tensor) -> int:
    return t.shape[0] * t.shape[2] * t.shape[3]


def _parts(t: Tensor) -> tuple[int, int]:
    """How many parts ``drelu_dbn`` and ``channel_stats`` of ``t`` leave."""
    return load("fusedres_emulator").reduction_parts(name_of(t.dtype), _rows(t), t.shape[1])


def _note(totals: Totals | None, of_launch: dict[str, int]) -> None:
    if totals is not None:
        totals.append(of_launch)


def scale_shift_add_relu(
    z: Tensor,
    bn: Tensor,
    residual: Tensor | None,
    residual_bn: Tensor | None,
    relu: bool,
    run: Any = None,
    totals: Totals | None = None,
) -> Tensor:
    c, y = z.shape[1], poisoned(z.dtype, *z.shape)
    tensors = [_map(z, z), _vectors(bn, 4, c), _map(residual, z), _vectors(residual_bn, 4, c), _map(y, z)]
    call = load("fusedres_emulator").scale_shift_add_relu
    _note(totals, call(name_of(z.dtype), tensors, _rows(z), c, relu, run or options()))
    return y


def drelu_dbn(
    dy: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    bn: Tensor | None,
    residual_z: Tensor | None,
    residual_bn: Tensor | None,
    run: Any = None,
    totals: Totals | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    c, g = dy.shape[1], poisoned(dy.dtype, *dy.shape)
    partials, sums = poisoned(F32, _parts(dy)[0], 3, c), poisoned(F32, 1 if z is None else 2, c)
    residual_sums = poisoned(F32, 0) if residual_z is None else poisoned(F32, 2, c)
    tensors = [
        *(_map(t, dy) for t in (dy, y, z)),
        _vectors(bn, 4, c),
        _map(residual_z, dy),
        _vectors(residual_bn, 4, c),
        _map(g, dy),
        *(t.data_ptr() for t in (partials, sums, residual_sums)),
    ]
    call = load("fusedres_emulator").drelu_dbn
    _note(totals, call(name_of(dy.dtype), tensors, _rows(dy), c, run or options()))
    return g, sums, residual_sums


def dbn(
    g: Tensor,
    z: Tensor | None,
    bn: Tensor,
    sums: Tensor | None,
    inv_count: float,
    run: Any = None,
    totals: Totals | None = None,
) -> Tensor:
    c, dz = g.shape[1], poisoned(g.dtype, *g.shape)
    z, sums = (None, None) if z is None or sums is None or inv_count == 0 else (z, sums)  # as csrc/cuda/dbn.cu does
    tensors = [_map(g, g), _map(z, g), _vectors(bn, 4, c), _vectors(sums, 2, c), _map(dz, g)]
    call = load("fusedres_emulator").dbn
    _note(totals, call(name_of(g.dtype), tensors, _rows(g), c, inv_count, run or options()))
    return dz


def channel_stats(z: Tensor, run: Any = None, totals: Totals | None = None) -> Tensor:
    c = z.shape[1]
    parts, stats = poisoned(F32, _parts(z)[1], 3, c), poisoned(F32, 3, c)
    tensors = [_map(z, z), parts.data_ptr(), stats.data_ptr()]
    _note(totals, load("fusedres_emulator").channel_stats(name_of(z.dtype), tensors, _rows(z), c, run or options()))
    return stats


def bn_finalize(
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    run: Any = None,
    totals: Totals | None = None,
) -> Tensor:
    k, vectors = stats.shape[1], (weight, bias, running_mean, running_var)
    bn, dtype = poisoned(F32, 4, k), next((v.dtype for v in vectors if v is not None), F32)
    tensors = [
        _vectors(stats, 3, k),
        *(address(v, dtype, k) for v in vectors),
        address(num_batches_tracked, torch.int64),
        _vectors(bn, 4, k),
    ]
    call = load("fusedres_emulator").bn_finalize
    _note(totals, call(name_of(dtype), tensors, k, momentum is None, momentum or 0.0, eps, run or options()))
    return bn

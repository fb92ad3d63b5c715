"""The tails of a block: ``scale_shift_add_relu`` (forward), ``drelu_dbn`` (backward), and ``dbn`` materialised.

Activations are (m, c) matrices here: ``m = N*P*Q`` pixels of ``c`` channels, dense, float32 | bfloat16 | float16.
bn: (4, c) float32, rows mean, invstd, scale, shift          sums: (2, c) float32, rows dbeta, dgamma

These kernels wait for memory alone. A tile is (BLOCK_M, BLOCK_C): its first element has a 64-bit offset, those inside
it 32-bit ones. Where ``c`` is a multiple of 16 every access is one of 16 bytes.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.epilogue import drelu
from fusedres.kernels.launch import cdiv, run
from fusedres.kernels.prologue import activate, bn_scale_shift, gradient_form, gradient_vectors, load_gradient, relu
from fusedres.kernels.sums import merge_sums, new_partials, rows_each
from fusedres.kernels.tile import cast
from fusedres.layout import channels_last, new_activation

WARPS = 4
_TILE_BYTES = 8192  # of one operand: four 16-byte accesses in flight for each of 128 threads
_MAX_BLOCK_C = 128


@functools.cache
def tile_shape(c: int, itemsize: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_C) for ``c`` channels of ``itemsize`` bytes."""
    block_c = min(triton.next_power_of_2(c), _MAX_BLOCK_C)
    return max(_TILE_BYTES // itemsize // block_c, 1), block_c


def sums_tile_shape(c: int, itemsize: int) -> tuple[int, int]:
    """``tile_shape`` for kernels that keep a float32 accumulator of the tile for every sum: half of it."""
    return tile_shape(c, max(itemsize, 4))


@triton.jit
def tile_of_matrix(row, m, c, channels, BLOCK_M: tl.constexpr):
    """(offset of ``row``, offsets in the tile that starts there, which exist) of an (m, c) matrix; ``row`` int64."""
    rows = tl.arange(0, BLOCK_M)
    mask = (rows < m - row)[:, None] & (channels < c)[None, :]
    return row * c, rows[:, None] * c + channels[None, :], mask


@triton.jit
def scale_shift_add_relu_kernel(
    z,
    bn,
    residual,
    residual_bn,
    y,
    m,
    c,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RESIDUAL_BN: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, offsets, mask = tile_of_matrix(tl.program_id(0).to(tl.int64) * BLOCK_M, m, c, channels, BLOCK_M)
    scale, shift = bn_scale_shift(bn, channels, c, channels < c)
    value = activate(tl.load(z + start + offsets, mask=mask), scale[None, :], shift[None, :])
    if HAS_RESIDUAL:
        added = tl.load(residual + start + offsets, mask=mask)
        if HAS_RESIDUAL_BN:
            scale, shift = bn_scale_shift(residual_bn, channels, c, channels < c)
            value += activate(added, scale[None, :], shift[None, :])
        else:
            value += added.to(tl.float32)
    if RELU:
        value = relu(value)
    tl.store(y + start + offsets, cast(value, y.dtype.element_ty), mask=mask)


def scale_shift_add_relu(
    z: Tensor, bn: Tensor, residual: Tensor | None, residual_bn: Tensor | None, relu: bool
) -> Tensor:
    """As ``fusedres.ops.scale_shift_add_relu``."""
    z, residual = channels_last(z), None if residual is None else channels_last(residual)
    y, c = new_activation(z, z.shape), z.shape[1]
    if z.numel() == 0:
        return y
    m, (block_m, block_c) = z.numel() // c, tile_shape(c, z.element_size())
    run(
        scale_shift_add_relu_kernel,
        (cdiv(m, block_m), cdiv(c, block_c)),
        z,
        bn,
        residual,
        residual_bn,
        y,
        m,
        c,
        HAS_RESIDUAL=residual is not None,
        HAS_RESIDUAL_BN=residual_bn is not None,
        RELU=relu,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=WARPS,
    )
    return y


@triton.jit
def dbn_kernel(g, z, bn, sums, dz, inv_count, m, c, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, offsets, mask = tile_of_matrix(tl.program_id(0).to(tl.int64) * BLOCK_M, m, c, channels, BLOCK_M)
    mean, a, b, constant = gradient_vectors(bn, sums, inv_count, channels, c, channels < c, FORM)
    value = load_gradient(g + start, z + start, offsets, mask, mean, a, b, constant, FORM)
    tl.store(dz + start + offsets, value, mask=mask)


def dbn(g: Tensor, z: Tensor | None, bn: Tensor, sums: Tensor | None, inv_count: float) -> Tensor:
    """As ``fusedres.ops.dbn``."""
    g = channels_last(g)
    z, sums = g if z is None else channels_last(z), bn if sums is None else sums  # not read where they are None
    dz, c = new_activation(g, g.shape), g.shape[1]
    if g.numel() == 0:
        return dz
    m, (block_m, block_c) = g.numel() // c, tile_shape(c, g.element_size())
    grid = (cdiv(m, block_m), cdiv(c, block_c))
    run(
        dbn_kernel,
        grid,
        g,
        z,
        bn,
        sums,
        dz,
        inv_count,
        m,
        c,
        FORM=gradient_form(bn, inv_count),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=WARPS,
    )
    return dz


@triton.jit
def drelu_dbn_kernel(
    dy,
    y,
    z,
    bn,
    residual_z,
    residual_bn,
    constant,
    g,
    partials,
    m,
    c,
    rows_each,
    HAS_CONSTANT: tl.constexpr,
    HAS_RELU: tl.constexpr,
    OPEN_BY_Z: tl.constexpr,  # the ReLU lies behind this BN alone: its mask is recomputed from z
    HAS_Z: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``g`` and, from ``rows_each`` rows of a block of channels, partials (programs, 3, c): sum(g), sum(g*(z - mean))
    and the latter for the other branch."""
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < c
    first = tl.program_id(0).to(tl.int64) * rows_each
    end = tl.minimum(first + rows_each, m)
    dbeta = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dgamma = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    residual_dgamma = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if HAS_Z:
        mean = tl.load(bn + channels, mask=channel_mask, other=0.0)[None, :]
    if OPEN_BY_Z:
        scale, shift = bn_scale_shift(bn, channels, c, channel_mask)
    if HAS_CONSTANT:
        added = tl.load(constant + channels, mask=channel_mask, other=0.0)[None, :]
    if HAS_RESIDUAL:
        residual_mean = tl.load(residual_bn + channels, mask=channel_mask, other=0.0)[None, :]
    for row in range(first, end, BLOCK_M):
        start, offsets, mask = tile_of_matrix(row, end, c, channels, BLOCK_M)
        gradient = tl.load(dy + start + offsets, mask=mask, other=0.0)
        if HAS_CONSTANT:
            gradient = tl.where(mask, cast(gradient.to(tl.float32) + added, gradient.dtype), 0.0)
        if HAS_RELU:
            closed = tl.load(y + start + offsets, mask=mask, other=0.0).to(tl.float32) <= 0
            gradient = tl.where(closed, 0.0, gradient)
        if HAS_Z:
            z_tile = tl.load(z + start + offsets, mask=mask, other=0.0)
        if OPEN_BY_Z:
            gradient = drelu(gradient, z_tile, scale[None, :], shift[None, :])
        tl.store(g + start + offsets, gradient, mask=mask)
        gradient = gradient.to(tl.float32)
        dbeta += gradient
        # Off the mask ``other`` is 0 and so is the gradient: nothing is added.
        if HAS_Z:
            dgamma += gradient * (z_tile.to(tl.float32) - mean)
        if HAS_RESIDUAL:
            value = tl.load(residual_z + start + offsets, mask=mask, other=0.0).to(tl.float32)
            residual_dgamma += gradient * (value - residual_mean)
    part = partials + tl.program_id(0).to(tl.int64) * 3 * c + channels
    tl.store(part, tl.sum(dbeta, 0), mask=channel_mask)
    if HAS_Z:
        tl.store(part + c, tl.sum(dgamma, 0), mask=channel_mask)
    if HAS_RESIDUAL:
        tl.store(part + 2 * c, tl.sum(residual_dgamma, 0), mask=channel_mask)


def drelu_dbn(
    dy: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    bn: Tensor | None,
    residual_z: Tensor | None,
    residual_bn: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``fusedres.ops.drelu_dbn``."""
    dy, y, z, residual_z = (None if t is None else channels_last(t) for t in (dy, y, z, residual_z))
    return _drelu_dbn(dy, y, z, bn, residual_z, residual_bn, None, new_activation(dy, dy.shape), False)


def drelu_dbn_(
    dy: Tensor,
    y: Tensor,
    z: Tensor | None,
    bn: Tensor | None,
    residual_z: Tensor | None,
    residual_bn: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``drelu_dbn`` in place on ``dy``, which must be dense channels_last: its sums."""
    y, z, residual_z = (None if t is None else channels_last(t) for t in (y, z, residual_z))
    return _drelu_dbn(dy, y, z, bn, residual_z, residual_bn, None, dy, False)[1:]


def drelu_(dx: Tensor, z: Tensor, bn: Tensor, constant: Tensor | None = None) -> Tensor:
    """The backward of ``relu(scale*z + shift)``, in place on its gradient ``dx`` (N, C, H, W): sums (2, C) of its BN.

    ``dx`` must be dense channels_last; ``z`` is of its shape and dtype, ``bn`` (4, C) float32. ``constant`` (C,)
    float32 is first added to every pixel of ``dx``.
    """
    return _drelu_dbn(dx, None, channels_last(z), bn, None, None, constant, dx, True)[1]


def _drelu_dbn(
    dy: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    bn: Tensor | None,
    residual_z: Tensor | None,
    residual_bn: Tensor | None,
    constant: Tensor | None,
    g: Tensor,
    open_by_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(g, written to; the sums of one branch; those of the other)."""
    c = dy.shape[1]
    m = dy.numel() // max(c, 1)
    block_m, block_c = sums_tile_shape(c, dy.element_size())
    each = rows_each(m, c, block_m, block_c)
    partials = new_partials(dy, m, c, each)
    if dy.numel():
        run(
            drelu_dbn_kernel,
            (partials.shape[0], cdiv(c, block_c)),
            dy,
            y,
            z,
            bn,
            residual_z,
            residual_bn,
            constant,
            g,
            partials,
            m,
            c,
            each,
            HAS_CONSTANT=constant is not None,
            HAS_RELU=y is not None,
            OPEN_BY_Z=open_by_z,
            HAS_Z=z is not None,
            HAS_RESIDUAL=residual_z is not None,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=WARPS,
        )
    return g, *merge_sums(partials, bn if z is not None else None, residual_bn if residual_z is not None else None)

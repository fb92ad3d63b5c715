"""Work on a loaded operand: the input's BN and ReLU, and the gradient at a conv's output from the one behind its BN.

The formulas of these two exist here once. Vectors are float32 blocks of channels; operands are tiles of any dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedres.kernels.tile import cast

#: What forms ``dz``: the gradient as it is, ``a*g`` (BN's statistics are constants), or ``a*g + b*(z - mean) + c``.
PLAIN, CONSTANT, BATCH = 0, 1, 2


def gradient_form(bn: object | None, inv_count: float) -> int:
    """PLAIN without ``bn``; with it CONSTANT where ``inv_count`` is 0.0: then neither z nor the sums are read."""
    if bn is None:
        return PLAIN
    return BATCH if inv_count != 0 else CONSTANT


@triton.jit
def activate(x, scale, shift):
    """``scale*x + shift`` in float32: what the ReLU after a BN sees, in forward and when its mask is recomputed."""
    return scale * x.to(tl.float32) + shift


@triton.jit
def relu(x):
    """``max(x, 0)`` that keeps NaN."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def bn_relu(x, scale, shift):
    """The prologue of a conv's input, ``relu(scale*x + shift)`` rounded to the dtype of ``x``."""
    return cast(relu(activate(x, scale, shift)), x.dtype)


@triton.jit
def bn_scale_shift(bn, channels, count, mask):
    """(scale, shift) of a block of ``channels``; ``bn`` (4, count) float32."""
    scale = tl.load(bn + 2 * count + channels, mask=mask, other=0.0)
    shift = tl.load(bn + 3 * count + channels, mask=mask, other=0.0)
    return scale, shift


@triton.jit
def dbn_factors(bn, sums, inv_count, channels, count, mask):
    """(mean, a, b, c) of ``dz = a*g + b*(z - mean) + c``; ``bn`` (4, count) and ``sums`` (2, count) float32."""
    mean = tl.load(bn + channels, mask=mask, other=0.0)
    invstd = tl.load(bn + count + channels, mask=mask, other=0.0)
    a = tl.load(bn + 2 * count + channels, mask=mask, other=0.0)
    dbeta = tl.load(sums + channels, mask=mask, other=0.0)
    dgamma = tl.load(sums + count + channels, mask=mask, other=0.0)
    return mean, a, dbn_slope(a, invstd, dgamma, inv_count), -a * dbeta * inv_count


@triton.jit
def dbn_slope(a, invstd, dgamma, inv_count):
    """The factor ``b`` of ``z - mean``."""
    return -a * invstd * dgamma * inv_count


@triton.jit
def dbn(g, z, mean, a, b, c):
    """``dz`` rounded to the dtype of ``g``. Around the mean, so that a large one cancels exactly."""
    return cast(a * g.to(tl.float32) + (b * (z.to(tl.float32) - mean) + c), g.dtype)


@triton.jit
def dbn_constant(g, a):
    """``dz`` where BN's statistics are constants: ``z`` has no part in it."""
    return cast(a * g.to(tl.float32), g.dtype)


@triton.jit
def input_vectors(in_bn, channels, count, mask, ACTIVATE: tl.constexpr):
    """(scale, shift) for ``load_input``; not read without the prologue."""
    if ACTIVATE:
        return bn_scale_shift(in_bn, channels, count, mask)
    else:
        return 0.0, 0.0


@triton.jit
def load_input(x, offsets, mask, scale, shift, ACTIVATE: tl.constexpr):
    """A tile (pixels, channels) of ``p(x)``, zero where ``mask`` is off: padding is zero AFTER the prologue."""
    tile = tl.load(x + offsets, mask=mask, other=0.0)
    if ACTIVATE:
        tile = tl.where(mask, bn_relu(tile, scale[None, :], shift[None, :]), 0.0)
    return tile


@triton.jit
def gradient_vectors(bn, sums, inv_count, channels, count, mask, FORM: tl.constexpr):
    """(mean, a, b, c) for ``load_gradient``, as far as ``FORM`` has them."""
    if FORM == 2:
        return dbn_factors(bn, sums, inv_count, channels, count, mask)
    elif FORM == 1:
        return 0.0, tl.load(bn + 2 * count + channels, mask=mask, other=0.0), 0.0, 0.0
    else:
        return 0.0, 0.0, 0.0, 0.0


@triton.jit
def load_gradient(g, z, offsets, mask, mean, a, b, c, FORM: tl.constexpr):
    """A tile (pixels, channels) of ``dz``, zero where ``mask`` is off. ``g`` and ``z`` share ``offsets``.

    The mask is applied AFTER the formula: ``c`` is not zero.
    """
    dz = tl.load(g + offsets, mask=mask, other=0.0)
    if FORM == 2:
        z_tile = tl.load(z + offsets, mask=mask, other=0.0)
        dz = tl.where(mask, dbn(dz, z_tile, mean[None, :], a[None, :], b[None, :], c[None, :]), 0.0)
    if FORM == 1:
        dz = tl.where(mask, dbn_constant(dz, a[None, :]), 0.0)
    return dz

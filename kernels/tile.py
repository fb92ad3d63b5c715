"""Index arithmetic that the conv kernels share: program order, pixels of GEMM rows, and casts around ``tl.dot``."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

#: Triton's interpreter keeps bfloat16 as its bits: a dot would multiply integers, and a cast would truncate. There, and
#: only there, dots take float32 operands and casts round by hand. A constant of the kernels, so it costs nothing.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


def divisor(d: int) -> int:
    """``d`` as ``divide`` wants it: a 32-bit reciprocal and its shift in one integer, always larger than 2**31.

    ``n // d = umulhi(2*n, ceil(2**(31+L) / d)) >> L`` with ``L = ceil(log2 d)``, exact for 0 <= n < 2**31 (Granlund and
    Montgomery 1994). GPUs have no integer division; the compiler's costs some twenty instructions.
    """
    shift = (d - 1).bit_length()
    return (-(-(1 << (31 + shift)) // d) << 8) | shift


@triton.jit
def divide(n, packed):
    """``n // d`` for int32 ``n`` >= 0, ``packed = divisor(d)``."""
    reciprocal = (packed >> 8).to(tl.uint32)
    shift = (packed & 255).to(tl.uint32)
    return (tl.umulhi((n * 2).to(tl.uint32), reciprocal) >> shift).to(tl.int32)


@triton.jit
def pixel_of(row, inner, inner_div, plane, plane_div):
    """GEMM rows (int32) -> (image, row, column) of maps of ``plane`` pixels whose rows have ``inner``."""
    image = divide(row, plane_div)
    rest = row - image * plane
    line = divide(rest, inner_div)
    return image, line, rest - line * inner


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(tile_m, tile_n) of a program: ``GROUP`` tiles down, then the next column, so that both operands stay in L2."""
    if GROUP == 1:
        return program // tiles_n, program % tiles_n
    else:
        per_group = GROUP * tiles_n
        first = program // per_group * GROUP
        height = tl.minimum(tiles_m - first, GROUP)
        inside = program % per_group
        return first + inside % height, inside // height


@triton.jit
def channels_of(tile, width, count, GROUPED: tl.constexpr, BLOCK: tl.constexpr):
    """(group, channels inside it, channels, which exist) of a tile; tiles count groups of ``width`` one by one."""
    group = 0
    if GROUPED:
        tiles = tl.cdiv(width, BLOCK)
        group = tile // tiles
        tile = tile % tiles
    inside = tile * BLOCK + tl.arange(0, BLOCK)
    channels = group * width + inside
    return group, inside, channels, (inside < width) & (channels < count)


@triton.jit
def row_offset(row, pitch, WIDE: tl.constexpr):
    """``row * pitch`` elements, in 64 bits where the tensor has 2**31 elements or more."""
    if WIDE:
        return row.to(tl.int64) * pitch
    else:
        return row * pitch


@triton.jit
def next_step(at, width, r, s, taps_s):
    """(channel, r, s) in a loop over taps and blocks of channels: past ``width`` channels the next of ``taps_s`` in a
    row, past those the next row."""
    is_next = at >= width
    s += is_next.to(tl.int32)
    is_line = s >= taps_s
    return tl.where(is_next, 0, at), r + is_line.to(tl.int32), tl.where(is_line, 0, s)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32; ``PRECISION`` "ieee", "tf32" or "tf32x3" matters for float32 operands only."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """float32 -> ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        rounded = tl.where(value != value, 0x7FC00000, rounded)
        value = rounded.to(tl.float32, bitcast=True)
    return value.to(dtype)

"""The native library: its schemas, and where it is loaded from.

Schemas live here, so that they exist without the library; csrc/registration.cpp adds the implementations. These are the
leaf kernels of the ``cpu`` engine (fusedres/engines/cpu.py), not a public interface: activations must be dense
channels_last and of one dtype, vectors contiguous and of the accumulation dtype; whatever else raises RuntimeError.
Shapes and names are those of ``fusedres.ops``.
"""

from __future__ import annotations

from pathlib import Path

import torch

_library = torch.library.Library("fusedres_cpu", "DEF")

_SCHEMAS = (
    # z (N, K, H, W) -> stats (3, K), single pass from memory, tiles merged pairwise in a fixed order.
    "channel_stats(Tensor z) -> Tensor",
    "scale_shift_add_relu(Tensor z, Tensor bn, Tensor? residual, Tensor? residual_bn, bool relu) -> Tensor",
    "drelu_dbn(Tensor dy, Tensor? y, Tensor? z, Tensor? bn, Tensor? residual_z, Tensor? residual_bn)"
    " -> (Tensor, Tensor, Tensor)",
    # The dgrad epilogue: dx *= (scale*prev_z + shift > 0) in place, returns prev_sums (2, C).
    "drelu_dbn_(Tensor(a!) dx, Tensor prev_z, Tensor prev_bn) -> Tensor",
    "dbn(Tensor g, Tensor z, Tensor bn, Tensor sums, float inv_count) -> Tensor",
    "bn_relu_maxpool(Tensor z, Tensor bn, int kernel_size, int stride, int padding) -> (Tensor, Tensor)",
    "bn_relu_maxpool_backward(Tensor dy, Tensor tap, Tensor z, Tensor bn, int kernel_size, int stride, int padding,"
    " float inv_count) -> (Tensor, Tensor)",
    # A weight (K, C, R, S) of any strides in the order in which conv_fprop reads it: 1-D. float32, float64.
    "conv_pack(Tensor w) -> Tensor",
    # y = act(conv(x, w) + bias + residual), groups 1, float32, float64; with `packed` given, `w` only tells sizes.
    "conv_fprop(Tensor x, Tensor w, Tensor? packed, Tensor? bias, Tensor? residual, int[2] stride, int[2] padding,"
    " int[2] dilation, bool relu) -> Tensor",
    # dx of the output's gradient dz, plus `residual` on every residual_stride-th row and column; as conv_fprop.
    "conv_dgrad(Tensor dz, Tensor w, int[2] input_size, int[2] stride, int[2] padding, int[2] dilation,"
    " Tensor? residual, int[2] residual_stride) -> Tensor",
    # A chain with constant BN (fusedres/engines), a projection's conv last. vectors: conv bias, BN weight and bias,
    # running mean and variance of each conv, without elements where there is none; eps (convs,) float64; packed: none,
    # or each weight's; geometry: stride, padding and dilation of each conv.
    "eval_chain(Tensor x, Tensor? residual, Tensor[] weights, Tensor[] packed, Tensor[] vectors, Tensor eps,"
    " int[] geometry, bool identity, bool projection, bool relu) -> Tensor",
    # As fusedres::conv_wgrad, groups 1; dw is (K, C, R, S) channels_last.
    "conv_wgrad(Tensor g, Tensor? z, Tensor? bn, Tensor? sums, float inv_count, Tensor x, Tensor? in_bn,"
    " int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    # G = g^T (p(x) - mean), (K, C) in the accumulation dtype; mean (C,).
    "centered_wgrad(Tensor g, Tensor x, Tensor? in_bn, Tensor mean, int[2] stride) -> Tensor",
    "input_moments(Tensor x, Tensor? in_bn, int[2] stride) -> Tensor",
    # Largest magnitude in an activation, NaN if it holds one: float64 scalar tensor.
    "max_abs(Tensor x) -> Tensor",
    # A 64-bit fingerprint of every byte of the tensors, in order: int64 scalar tensor.
    "fingerprint(Tensor[] tensors) -> Tensor",
)
for _schema in _SCHEMAS:
    _library.define(_schema)


def library_path() -> Path | None:
    """The built library beside this file, or None."""
    return next(iter(sorted(Path(__file__).parent.glob("_native*.so"))), None)


def _load() -> str | None:
    """Load the library; None, or why there is none."""
    path = library_path()
    if path is None:
        return "the native library was not built (no C++ compiler at install time?); reinstall with one to get it"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    names = (f"fusedres_cpu::{schema.partition('(')[0]}" for schema in _SCHEMAS)
    absent = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]
    return f"{path.name} was built from other sources, it lacks {', '.join(absent)}; build it again" if absent else None


#: None where the native library is loaded, else the reason why it is not.
missing: str | None = _load()

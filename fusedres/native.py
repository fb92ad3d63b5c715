"""The native library: its schemas, and where it is loaded from.

Schemas live here, so that they exist without the library; csrc/registration.cpp adds the implementations. These are the
leaf kernels of the engines ``cpu`` and ``cuda`` (fusedres/engines), not a public interface: activations must be dense
channels_last and of one dtype, vectors contiguous and of the accumulation dtype; whatever else raises RuntimeError.
Shapes and names are those of ``fusedres.ops``. The CUDA kernels are in the library where it was built with them.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

_CPU_SCHEMAS = (
    # z (N, K, H, W) -> stats (3, K), single pass from memory, tiles merged pairwise in a fixed order.
    "channel_stats(Tensor z) -> Tensor",
    # All vectors (K,) in the dtype of stats (3, K); the counter int64.
    "bn_finalize(Tensor stats, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> Tensor",
    "scale_shift_add_relu(Tensor z, Tensor bn, Tensor? residual, Tensor? residual_bn, bool relu) -> Tensor",
    "drelu_dbn(Tensor dy, Tensor? y, Tensor? z, Tensor? bn, Tensor? residual_z, Tensor? residual_bn)"
    " -> (Tensor, Tensor, Tensor)",
    # The dgrad epilogue: dx *= (scale*prev_z + shift > 0) in place, returns prev_sums (2, C).
    "drelu_dbn_(Tensor(a!) dx, Tensor prev_z, Tensor prev_bn) -> Tensor",
    # drelu_dbn in place on dy: returns sums and residual_sums.
    "drelu_dbn_by_output_(Tensor(a!) dy, Tensor y, Tensor? z, Tensor? bn, Tensor? residual_z, Tensor? residual_bn)"
    " -> (Tensor, Tensor)",
    "dbn(Tensor g, Tensor z, Tensor bn, Tensor sums, float inv_count) -> Tensor",
    "bn_relu_maxpool(Tensor z, Tensor bn, int kernel_size, int stride, int padding) -> (Tensor, Tensor)",
    "bn_relu_maxpool_backward(Tensor dy, Tensor tap, Tensor z, Tensor bn, int kernel_size, int stride, int padding,"
    " float inv_count) -> (Tensor, Tensor)",
    # A weight (K, C, R, S) of any strides as conv_fprop reads it for inputs of that size (H, W): 1-D. float32, float64.
    "conv_pack(Tensor w, int[2] input_size, int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    # y = act(conv(x, w) + bias + residual), groups 1, float32, float64; `packed`: `w` from conv_pack.
    "conv_fprop(Tensor x, Tensor w, Tensor? packed, Tensor? bias, Tensor? residual, int[2] stride, int[2] padding,"
    " int[2] dilation, bool relu) -> Tensor",
    # dx of the output's gradient dz, plus `residual` on every residual_stride-th row and column; as conv_fprop.
    "conv_dgrad(Tensor dz, Tensor w, int[2] input_size, int[2] stride, int[2] padding, int[2] dilation,"
    " Tensor? residual, int[2] residual_stride) -> Tensor",
    # A chain with constant BN (fusedres/engines), a projection's conv last. vectors: conv bias, BN weight and bias,
    # running mean and variance of each conv, without elements where there is none; eps (convs,) float64; packed: none,
    # or each weight's; geometry: stride, padding and dilation of each conv; pool: kernel size, stride and padding of a
    # max-pool behind it all, or nothing.
    "eval_chain(Tensor x, Tensor? residual, Tensor[] weights, Tensor[] packed, Tensor[] vectors, Tensor eps,"
    " int[] geometry, bool identity, bool projection, bool relu, int[] pool) -> Tensor",
    # Chains one behind another, without given shortcuts, for inputs of that size (N, C, H, W), and what they give.
    # forms: of each chain its number of convs, identity, projection, relu, and the three of its pool, zeros for none.
    # The program is a tensor that means nothing to anyone else. Packed weights, and the vectors beside them, must stay
    # as they are; what is not packed is read at every call.
    "eval_program(Tensor[] weights, Tensor[] packed, Tensor[] vectors, Tensor eps, int[] geometry, int[] forms,"
    " int[] input_size) -> Tensor",
    "eval_network(Tensor x, Tensor program) -> Tensor",
    # The fully connected layer of the means over H and W: x (N, C, H, W), w (F, C) -> (N, F). float32, float64.
    "head_fprop(Tensor x, Tensor w, Tensor? bias) -> Tensor",
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

#: csrc/cuda/ops.h. First blocks with folded BN: float16 | bfloat16 activations and weights, 16-byte aligned, float32
#: biases. Then a training step's tails, for float32 too, and aligned where C allows accesses of 16 bytes.
_CUDA_SCHEMAS = (
    "bottleneck_fprop(Tensor x, Tensor w1, Tensor bias1, Tensor w2, Tensor bias2, Tensor w3, Tensor bias3,"
    " Tensor? w_shortcut, int stride) -> Tensor",
    "basic_block_fprop(Tensor x, Tensor w1, Tensor bias1, Tensor w2, Tensor bias2, Tensor? w_shortcut, int stride)"
    " -> Tensor",
    # w (K, 4, 7, 8): the conv's (K, C <= 4, 7, 7), padded with zeros; then ReLU and a 3x3 max-pool of stride 2. Or
    # (K, 4, 3, 4) of (K, C <= 4, 3, 3); then ReLU.
    "stem_fprop(Tensor x, Tensor w, Tensor bias) -> Tensor",
    # w (F, C), bias (F,) in the dtype of x (N, C, H, W): the fully connected layer of the means over H and W, (N, F).
    "head_fprop(Tensor x, Tensor w, Tensor? bias) -> Tensor",
    "scale_shift_add_relu(Tensor z, Tensor bn, Tensor? residual, Tensor? residual_bn, bool relu) -> Tensor",
    "drelu_dbn(Tensor dy, Tensor? y, Tensor? z, Tensor? bn, Tensor? residual_z, Tensor? residual_bn)"
    " -> (Tensor, Tensor, Tensor)",
    "dbn(Tensor g, Tensor? z, Tensor bn, Tensor? sums, float inv_count) -> Tensor",
    "channel_stats(Tensor z) -> Tensor",
    # Vectors (K,) of one dtype, stats float32; the counter int64.
    "bn_finalize(Tensor stats, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> Tensor",
    # Bytes of shared memory that a thread block needs at least.
    "bottleneck_shared_bytes(int width, int stride) -> int",
    "basic_block_shared_bytes(int width) -> int",
)

_SCHEMAS = {"cpu": _CPU_SCHEMAS, "cuda": _CUDA_SCHEMAS}
_libraries = {device_type: torch.library.Library(f"fusedres_{device_type}", "DEF") for device_type in _SCHEMAS}
for _device_type, _library in _libraries.items():
    for _schema in _SCHEMAS[_device_type]:
        _library.define(_schema)


def library_path() -> Path | None:
    """The built library beside this file, or None."""
    return next(iter(sorted(Path(__file__).parent.glob("_native*.so"))), None)


def function(name: str, loader: type[ctypes.CDLL] = ctypes.CDLL) -> Any:
    """The library's C function ``name``, or None where it was not built; by ``ctypes.PyDLL`` if it needs the lock."""
    path = library_path()
    return None if missing is not None or path is None else getattr(loader(str(path)), name, None)


def _load() -> dict[str, str | None]:
    """Load the library; why it has no kernels for the device types "cpu" and "cuda", None where it has."""
    path = library_path()
    reason = "the native library was not built (no C++ compiler at install time?); reinstall with one to get it"
    if path is not None:
        try:
            torch.ops.load_library(str(path))
            return {"cpu": _absent(path, "cpu"), "cuda": _absent(path, "cuda")}
        except OSError as error:
            reason = f"{path.name} does not load: {error}"
    return {"cpu": reason, "cuda": reason}


def _absent(path: Path, device_type: str) -> str | None:
    """Which kernels for tensors of a device type the loaded library lacks, and what helps; None where it has all."""
    names = [schema.partition("(")[0] for schema in _SCHEMAS[device_type] if "(Tensor" in schema]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    absent = [name for name in names if not has_kernel(f"fusedres_{device_type}::{name}", device_type.upper())]
    if not absent:
        return None
    if device_type == "cuda" and absent == names:
        return f"{path.name} was built without CUDA kernels; build it where nvcc and a GPU are, or with FORCE_CUDA=1"
    return f"{path.name} was built from other sources, it lacks {', '.join(absent)}; build it again"


_reasons = _load()
#: None where the native library is loaded, else the reason why it is not; and the same of its CUDA kernels.
missing: str | None = _reasons["cpu"]
missing_cuda: str | None = _reasons["cuda"]

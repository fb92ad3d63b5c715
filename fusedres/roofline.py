"""Lower bounds of time: no launch is shorter than its traffic at full bandwidth or its FLOPs at the full matrix rate.

(Williams, Waterman and Patterson 2009.) Launches follow each other, so that their bounds add up. Left out, because it
depends on more than two figures of a device: caches that keep operands from one launch to the next (which let small
maps beat these bounds), and the time to launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.nn.functional import conv2d

from fusedres.measure import interleaved
from fusedres.plan import Launch

_TERA = 1e12


class Roof(NamedTuple):
    """What a device can do at most: memory traffic and matrix products, and where the two figures are from."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    source: str
    capability: tuple[int, int] | None = None  # of a GPU that need not be here


def _gpu(name: str, capability: tuple[int, int], terabytes: float, teraflops: float, source: str) -> Roof:
    return Roof(name, terabytes * _TERA, teraflops * _TERA, source, capability)


#: Memory bandwidth and dense float16 or bfloat16 rate of the tensor cores, accumulated in float32, as the maker
#: publishes them. Where a data sheet states the rate with sparsity, half of it is the dense one.
GPUS = {
    "a10": _gpu("NVIDIA A10", (8, 6), 0.600, 125, "NVIDIA A10 Tensor Core GPU data sheet"),
    "a100": _gpu("NVIDIA A100 SXM 80 GB", (8, 0), 2.039, 312, "NVIDIA A100 Tensor Core GPU data sheet"),
    "l4": _gpu("NVIDIA L4", (8, 9), 0.300, 121, "NVIDIA L4 Tensor Core GPU data sheet"),
    "l40s": _gpu("NVIDIA L40S", (8, 9), 0.864, 362, "NVIDIA L40S data sheet"),
    "h100": _gpu("NVIDIA H100 SXM", (9, 0), 3.35, 989.5, "NVIDIA H100 Tensor Core GPU data sheet"),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", (9, 0), 2.0, 756.5, "NVIDIA H100 Tensor Core GPU data sheet"),
    "h200": _gpu("NVIDIA H200 SXM", (9, 0), 4.8, 989.5, "NVIDIA H200 Tensor Core GPU data sheet"),
    "b200": _gpu("NVIDIA B200", (10, 0), 8.0, 2250, "NVIDIA DGX B200 data sheet, an eighth of the system"),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", (8, 9), 1.008, 165.2, "NVIDIA Ada GPU Architecture white paper"),
}
#: The dtypes whose rate the table holds.
GPU_DTYPES = (torch.float16, torch.bfloat16)

#: More than the last-level cache of any CPU or GPU here.
_COPIED_BYTES = 512 << 20
#: A convolution that keeps every unit busy.
_CONV_PICTURES, _CONV_WIDTH, _CONV_SIDE = 8, 256, 28
_ROUNDS = 20  # so that some fall between what else the machine does


def measured(device: torch.device, dtype: torch.dtype) -> Roof:
    """The roof of this machine: the best of several copies, and of several convolutions and matrix products.

    On some CPUs the convolution is twice as fast as the product, whose library is of another maker.
    """
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 2048 if device.type == "cpu" else 8192
    a, b, c = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    pictures = _CONV_PICTURES if device.type == "cpu" else 32 * _CONV_PICTURES
    x, weight = (
        torch.randn(size, device=device).to(dtype, memory_format=torch.channels_last)
        for size in ((pictures, _CONV_WIDTH, _CONV_SIDE, _CONV_SIDE), (_CONV_WIDTH, _CONV_WIDTH, 3, 3))
    )
    copy = f"copy of {_COPIED_BYTES >> 20} MiB"
    product = f"product of {side} x {side}"
    convolution = f"3x3 convolution of {pictures}x{_CONV_WIDTH}x{_CONV_SIDE}x{_CONV_SIDE}"
    calls: dict[str, Callable[[], object]] = {
        copy: lambda: target.copy_(source),
        product: lambda: torch.mm(a, b, out=c),
        convolution: lambda: conv2d(x, weight, padding=1),
    }
    flops = {product: 2 * side**3, convolution: 2 * 9 * pictures * (_CONV_SIDE * _CONV_WIDTH) ** 2}
    best = {name: min(samples) for name, samples in interleaved(calls, _ROUNDS, device).items()}
    fastest = max(flops, key=lambda name: flops[name] / best[name])
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"this CPU, {torch.get_num_threads()} threads"
    )
    what = f"measured: {copy}, {fastest} in {str(dtype).split('.')[1]}"
    return Roof(name, 2 * _COPIED_BYTES / best[copy], flops[fastest] / best[fastest], what)


class Bound(NamedTuple):
    """Launches added up. ``memory_s``: the part of ``seconds`` that launches spend which traffic limits, not FLOPs."""

    launches: int
    bytes: int
    activation_bytes: int
    flops: int
    seconds: float
    memory_s: float


def bound(launches: Iterable[Launch], roof: Roof) -> Bound:
    """The bound of ``launches``, one after the other, under ``roof``."""
    launches = list(launches)
    times = [(launch.bytes / roof.bytes_per_s, launch.flops / roof.flops_per_s) for launch in launches]
    return Bound(
        len(launches),
        sum(launch.bytes for launch in launches),
        sum(launch.activation_bytes for launch in launches),
        sum(launch.flops for launch in launches),
        sum(max(time) for time in times),
        sum(traffic for traffic, product in times if traffic >= product),
    )


def by_layer(launches: Iterable[Launch], roof: Roof) -> dict[str, Bound]:
    """The bound of each layer, its forward and its backward together, in the order of the network."""
    layers: dict[str, list[Launch]] = {}
    for launch in launches:
        layers.setdefault(launch.layer, []).append(launch)
    return {layer: bound(part, roof) for layer, part in layers.items()}

"""Every distinct block of ResNet-18 and ResNet-50 at its place in the network: eager channels_last, compiled, fused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contest import BATCHES, CONTESTANTS, DEVICE, DTYPES, pair
from torch import nn

import fusedres

torchvision = pytest.importorskip("torchvision", reason="needs torchvision: its blocks are the baseline")

#: name: (block, inplanes, planes, stride, map size)
BLOCKS = {
    **{f"basic{64 << i}": ("BasicBlock", 64 << i, 64 << i, 1, 56 >> i) for i in range(4)},
    **{f"basic{64 << i}-down": ("BasicBlock", 32 << i, 64 << i, 2, 112 >> i) for i in range(1, 4)},
    **{f"bottleneck{64 << i}": ("Bottleneck", 256 << i, 64 << i, 1, 56 >> i) for i in range(4)},
    "bottleneck64-down": ("Bottleneck", 64, 64, 1, 56),
    **{f"bottleneck{64 << i}-down": ("Bottleneck", 128 << i, 64 << i, 2, 112 >> i) for i in range(1, 4)},
}


def build(kind: str, inplanes: int, planes: int, stride: int) -> dict[str, nn.Module]:
    eager_block, fused_block = getattr(torchvision.models.resnet, kind), getattr(fusedres, f"Fused{kind}")
    outplanes = planes * eager_block.expansion

    def downsample() -> nn.Module | None:
        if stride == 1 and inplanes == outplanes:
            return None
        return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))

    return pair(*(block(inplanes, planes, stride, downsample()) for block in (eager_block, fused_block)))


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def bench_block(name: str, training: bool, batch: int, dtype: str, compare: Callable[..., None]) -> None:
    kind, inplanes, planes, stride, size = BLOCKS[name]
    x = torch.randn(batch, inplanes, size, size, device=DEVICE, dtype=DTYPES[dtype])
    x = x.to(memory_format=torch.channels_last).requires_grad_(training)
    mode = "train" if training else "eval"
    compare(build(kind, inplanes, planes, stride), x, training, f"{name} {mode} {dtype} batch {batch}")

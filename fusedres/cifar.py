"""ResNets for CIFAR (He et al. 2015, section 4.2): cifar_resnet20 to cifar_resnet1202."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.backbone import CIFAR_CFG
from fusedres.blocks import FusedBasicBlock, NormLayer
from fusedres.models import Constructor, constructor
from fusedres.resnet import HE, StagedNet
from fusedres.specs import Memory

WIDTHS = (16, 32, 64)

#: depth = 6n + 2: depth -> n, the blocks in each of the three stages (sections 4.2 and table 6 of the paper).
BLOCKS_PER_STAGE = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18, 1202: 200}


class PaddedShortcut(nn.Module):
    """Option A, a shortcut without parameters: every ``stride``-th pixel, and zeros for the new channels.

    x (N, C, H, W) -> (N, C + extra_channels, ceil(H/stride), ceil(W/stride)).
    """

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


class CifarResNet(StagedNet):
    """ResNet for small images: a 3x3 stem of 16 channels, then ``n`` basic blocks in each of three stages.

    Args:
        n: blocks in a stage; the depth is 6n + 2.
        num_classes: size of the logits.
        shortcut: where the shape changes, "A" pads with zeros (the paper's), "B" projects (1x1 convolution and norm).
        norm_layer: makes a norm from a number of channels; default torch.nn.BatchNorm2d.
        memory: "standard", or "recompute" to keep less for the backward.
        in_channels: channels of the images.
    """

    cfg = CIFAR_CFG

    def __init__(
        self,
        n: int,
        num_classes: int = 10,
        *,
        shortcut: str = "A",
        norm_layer: NormLayer | None = None,
        memory: Memory = "standard",
        in_channels: int = 3,
    ) -> None:
        super().__init__(norm_layer, memory=memory)
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be 'A' or 'B', got {shortcut!r}")
        self.shortcut = shortcut
        self._make_stem(cifar_stem(in_channels))
        self._make_stages(FusedBasicBlock, cifar_stages(n), WIDTHS)
        self._make_head(num_classes)
        self._initialise()

    def _make_shortcut(self, outplanes: int, stride: int) -> nn.Module:
        if self.shortcut == "A":
            return PaddedShortcut(outplanes - self.inplanes, stride)
        return super()._make_shortcut(outplanes, stride)


def cifar_stages(n: int) -> list[int]:
    """How many blocks, or pairs of layers, each stage has; ValueError for none."""
    if n < 1:
        raise ValueError(f"each stage needs at least one block, got n={n}")
    return [n] * len(WIDTHS)


def cifar_stem(in_channels: int) -> nn.Conv2d:
    """Keep the map, ``in_channels`` -> 16 channels."""
    return nn.Conv2d(in_channels, WIDTHS[0], kernel_size=3, padding=1, bias=False)


def _constructor(depth: int) -> Constructor[CifarResNet]:
    n = BLOCKS_PER_STAGE[depth]
    summary = f"ResNet-{depth} for CIFAR ({HE}, section 4.2): {n} FusedBasicBlock in each of layer1 to layer3."
    return constructor(f"cifar_resnet{depth}", CifarResNet, n, summary=summary)


cifar_resnet20 = _constructor(20)
cifar_resnet32 = _constructor(32)
cifar_resnet44 = _constructor(44)
cifar_resnet56 = _constructor(56)
cifar_resnet110 = _constructor(110)
cifar_resnet1202 = _constructor(1202)

"""Plain nets: the ResNets without their shortcuts, the baseline of He et al. 2015 (sections 3.3, 4.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fusedres import cifar, resnet
from fusedres.backbone import CIFAR_CFG
from fusedres.blocks import NormLayer
from fusedres.layers import FusedConvBNReLU
from fusedres.models import Constructor, constructor
from fusedres.resnet import HE, StagedNet
from fusedres.specs import Memory


class _PlainStages(StagedNet):
    """Stages of conv-norm-ReLU layers: two where a residual net has a basic block, nothing around them."""

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        options = {"norm_layer": self._norm_layer, **self._block_options}
        first = block(self.inplanes, planes, stride=stride, **options)
        self.inplanes = planes
        return nn.Sequential(first, *(block(planes, planes, **options) for _ in range(1, 2 * blocks)))


class PlainNet(_PlainStages):
    """A ResNet of basic blocks for ImageNet, without its shortcuts.

    Args:
        layers: how many pairs of 3x3 layers each of the four stages has.
        num_classes: size of the logits.
        norm_layer: makes a norm from a number of channels; default torch.nn.BatchNorm2d.
        memory: "standard", or "recompute" to keep less for the backward.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        norm_layer: NormLayer | None = None,
        memory: Memory = "standard",
    ) -> None:
        super().__init__(norm_layer, memory=memory)
        self._make_stem(*resnet.imagenet_stem())
        self._make_stages(FusedConvBNReLU, layers, resnet.WIDTHS)
        self._make_head(num_classes)
        self._initialise()


class CifarPlainNet(_PlainStages):
    """A CIFAR ResNet without its shortcuts: depth 6n + 2.

    Args:
        n: pairs of 3x3 layers in each of the three stages.
        num_classes: size of the logits.
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
        norm_layer: NormLayer | None = None,
        memory: Memory = "standard",
        in_channels: int = 3,
    ) -> None:
        super().__init__(norm_layer, memory=memory)
        self._make_stem(cifar.cifar_stem(in_channels))
        self._make_stages(FusedConvBNReLU, cifar.cifar_stages(n), cifar.WIDTHS)
        self._make_head(num_classes)
        self._initialise()


def _imagenet(depth: int) -> Constructor[PlainNet]:
    layers = resnet.VARIANTS[f"resnet{depth}"].layers
    summary = f"The plain net of {depth} layers ({HE}, table 1): resnet{depth} without shortcuts."
    return constructor(f"plain{depth}", PlainNet, layers, summary=summary)


def _cifar(depth: int) -> Constructor[CifarPlainNet]:
    summary = f"The plain net of {depth} layers for CIFAR ({HE}, section 4.2): cifar_resnet{depth} without shortcuts."
    return constructor(f"cifar_plain{depth}", CifarPlainNet, cifar.BLOCKS_PER_STAGE[depth], summary=summary)


plain18 = _imagenet(18)
plain34 = _imagenet(34)
cifar_plain20 = _cifar(20)
cifar_plain32 = _cifar(32)
cifar_plain44 = _cifar(44)
cifar_plain56 = _cifar(56)

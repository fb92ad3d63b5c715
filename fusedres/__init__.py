"""fusedres: ResNets whose conv, BN, ReLU and shortcut add run as few fused kernels, drop-in for torchvision's."""

from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.dispatch import engine
from fusedres.explain import explain
from fusedres.folding import freeze
from fusedres.layers import FusedConvBNReLU
from fusedres.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__version__ = "0.1.0"

__all__ = [
    "FusedBasicBlock",
    "FusedBottleneck",
    "FusedConvBNReLU",
    "ResNet",
    "engine",
    "explain",
    "freeze",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

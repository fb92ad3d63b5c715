"""fusedres: ResNets whose conv, BN, ReLU and shortcut add run as few fused kernels, drop-in for torchvision's."""

from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.cifar import (
    CifarResNet,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_resnet1202,
)
from fusedres.conversion import NotFusedError, fuse, unfuse
from fusedres.decompositions import decompositions
from fusedres.dispatch import engine
from fusedres.explain import explain
from fusedres.folding import freeze
from fusedres.layers import FusedConvBNReLU
from fusedres.plain import (
    CifarPlainNet,
    PlainNet,
    cifar_plain20,
    cifar_plain32,
    cifar_plain44,
    cifar_plain56,
    plain18,
    plain34,
)
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
from fusedres.tuning import autotune

__version__ = "0.1.0"

__all__ = [
    "CifarPlainNet",
    "CifarResNet",
    "FusedBasicBlock",
    "FusedBottleneck",
    "FusedConvBNReLU",
    "NotFusedError",
    "PlainNet",
    "ResNet",
    "autotune",
    "cifar_plain20",
    "cifar_plain32",
    "cifar_plain44",
    "cifar_plain56",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "cifar_resnet1202",
    "decompositions",
    "engine",
    "explain",
    "freeze",
    "fuse",
    "plain18",
    "plain34",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "unfuse",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

"""fusedres: ResNets whose conv, BN, ReLU and shortcut add run as few fused kernels, drop-in for torchvision's."""

from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.dispatch import engine
from fusedres.explain import explain
from fusedres.folding import freeze
from fusedres.layers import FusedConvBNReLU

__version__ = "0.1.0"

__all__ = ["FusedBasicBlock", "FusedBottleneck", "FusedConvBNReLU", "engine", "explain", "freeze"]

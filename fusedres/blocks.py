"""The residual blocks: torchvision's constructors, attributes and state_dict, and one fused chain for a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from fusedres.functional import ConvBN, chain_reason, residual_chain
from fusedres.inspection import plain_reason
from fusedres.recall import Modules, modules_of
from fusedres.specs import Memory, checked_memory

NormLayer = Callable[..., nn.Module]


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size of the map at stride 1."""
    return nn.Conv2d(in_planes, out_planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class _FusedBlock(nn.Module):
    """What both blocks share: the forward of a chain of convs ``conv<i>``, BNs ``bn<i>`` and a shortcut."""

    expansion: ClassVar[int]
    depth: ClassVar[int]  # convs in the residual branch

    relu: nn.Module
    downsample: nn.Module | None

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = checked_memory(memory)

    @property
    def pairs(self) -> list[ConvBN]:
        """The convs of the residual branch, each with its BN."""
        modules = self._modules
        return [ConvBN(modules[f"conv{i}"], modules[f"bn{i}"]) for i in range(1, self.depth + 1)]  # type: ignore[arg-type]

    @property
    def projection(self) -> ConvBN | None:
        """The shortcut's conv and BN, where the downsample is just that."""
        if self.downsample is None or self.downsample_reason() is not None:
            return None
        return ConvBN(*self.downsample.children())  # type: ignore[arg-type]  # their kinds are known by now

    def downsample_reason(self) -> str | None:
        """Why the downsample runs by itself beside the fused branch, or None."""
        if self.downsample is None:
            return None
        reason = plain_reason(self.downsample, nn.Sequential)
        if reason is not None:
            return reason
        modules = list(self.downsample.children())
        if len(modules) != 2:
            return f"it has {len(modules)} modules, not a conv and its norm"
        return chain_reason([ConvBN(*modules)], ())  # type: ignore[arg-type]  # of which kind they are, it asks

    def modules_of_chain(self) -> Modules:
        """Every module that the block's chain replaces, in order."""
        return modules_of(self.pairs, self.projection, [self.relu])

    def reason(self) -> str | None:
        """Why this block runs its modules one by one instead of fused, or None."""
        return chain_reason(self.pairs, [self.relu])

    def forward(self, x: Tensor) -> Tensor:
        projection = self.projection
        given = self._shortcut(x) if projection is None else None
        return residual_chain(
            x, self.pairs, projection or given, True, self.memory, lambda x: self._unfused(x, given), [self.relu]
        )

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def _unfused(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        y = x
        for i, (conv, bn) in enumerate(self.pairs, 1):
            y = bn(conv(y))
            if i < self.depth:
                y = self.relu(y)
        total = y + (self._shortcut(x) if shortcut is None else shortcut)
        return self.relu(total.to(y.dtype))  # as by the add in place of torchvision


class FusedBasicBlock(_FusedBlock):
    """torchvision's ``BasicBlock``, fused: two 3x3 convolutions and the shortcut (He et al. 2015, figure 5 left).

    x: (N, inplanes, H, W) float64 | float32 | bfloat16 | float16 -> (N, planes, P, Q) of the same dtype.
    ``memory="recompute"`` keeps less for backward and runs the second conv again there.
    Raises ValueError for groups, base_width or dilation that this block does not have, as torchvision does.
    """

    expansion: ClassVar[int] = 1
    depth: ClassVar[int] = 2

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        memory: Memory = "standard",
    ) -> None:
        super().__init__(memory)
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride


class FusedBottleneck(_FusedBlock):
    """torchvision's ``Bottleneck``, fused: 1x1, 3x3 (which carries the stride) and 1x1 convolutions and the shortcut.

    x: (N, inplanes, H, W) float64 | float32 | bfloat16 | float16 -> (N, 4*planes, P, Q) of the same dtype.
    ``memory="recompute"`` keeps less for backward and runs pointwise convs again there. (He et al. 2015, figure 5
    right; the stride on the 3x3 is ResNet v1.5's.)
    """

    expansion: ClassVar[int] = 4
    depth: ClassVar[int] = 3

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        memory: Memory = "standard",
    ) -> None:
        super().__init__(memory)
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride


def chain_of(module: nn.Module) -> Modules | None:
    """The modules of the one chain that ``module`` runs, if it is a block of ours and no more."""
    if not isinstance(module, (FusedBasicBlock, FusedBottleneck)):
        return None
    return module.modules_of_chain() if plain_reason(module, FusedBasicBlock, FusedBottleneck) is None else None

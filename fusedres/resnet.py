"""ResNet and its ten ImageNet constructors, drop-in for torchvision's, on the frame that all networks here share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fusedres.backbone import Backbone
from fusedres.blocks import FusedBasicBlock, FusedBottleneck, NormLayer, conv1x1
from fusedres.models import Constructor, constructor
from fusedres.specs import Memory

WIDTHS = (64, 128, 256, 512)


class StagedNet(Backbone):
    """The frame: stem (conv1 bn1 relu [maxpool]), stages of blocks (layer1, layer2, ...), head (avgpool fc).

    A subclass's constructor makes the three parts in this order, then initialises them.
    """

    def __init__(
        self,
        norm_layer: NormLayer | None = None,
        groups: int = 1,
        width_per_group: int = 64,
        memory: Memory = "standard",
    ) -> None:
        super().__init__()
        self._norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        # Foreign blocks know no memory modes, so only a choice other than the default is passed on.
        self._block_options: dict[str, Any] = {} if memory == "standard" else {"memory": memory}

    def _make_stem(self, conv1: nn.Conv2d, maxpool: nn.Module | None = None) -> None:
        self.inplanes = conv1.out_channels
        self.conv1 = conv1
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = maxpool
        self._add_feature("relu", self.inplanes, conv1.stride[0])

    def _make_stages(
        self, block: Any, layers: Sequence[int], widths: Sequence[int], dilate: Sequence[bool] | None = None
    ) -> None:
        """``layers[i]`` blocks of ``widths[i]`` planes; every stage but the first halves the map, or dilates."""
        dilate = [False, *(dilate or [False] * (len(widths) - 1))]
        pooling = 1 if self.maxpool is None else 2
        for number, (planes, blocks, dilated) in enumerate(zip(widths, layers, dilate, strict=True), start=1):
            stride = 1 if number == 1 else 2
            self.add_module(f"layer{number}", self._make_layer(block, planes, blocks, stride, dilated))
            coarser = pooling if number == 1 else 1 if dilated else stride
            self._add_feature(f"layer{number}", self.inplanes, coarser)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        """One stage: the first block strides, and adapts the shortcut where the shape changes."""
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        outplanes = planes * block.expansion
        downsample = self._make_shortcut(outplanes, stride) if stride != 1 or self.inplanes != outplanes else None
        width = {"groups": self.groups, "base_width": self.base_width}
        options = {**width, "norm_layer": self._norm_layer, **self._block_options}
        stage = [block(self.inplanes, planes, stride, downsample, dilation=previous_dilation, **options)]
        self.inplanes = outplanes
        stage += [block(outplanes, planes, dilation=self.dilation, **options) for _ in range(1, blocks)]
        return nn.Sequential(*stage)

    def _make_shortcut(self, outplanes: int, stride: int) -> nn.Module:
        """The projection (He et al. 2015, section 3.3, option B): 1x1 convolution and norm."""
        return nn.Sequential(conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes))

    def _make_head(self, num_classes: int) -> None:
        self.num_features, self.num_classes = self.inplanes, num_classes
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.num_features, num_classes)

    def _initialise(self, zero_init_residual: bool = False) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if zero_init_residual:
            self._zero_residual_branches()

    def _zero_residual_branches(self) -> None:
        """Start every block as the identity: its last norm has weight 0 (Goyal et al. 2017, section 5.1)."""
        for module in self.modules():
            if isinstance(module, (FusedBasicBlock, FusedBottleneck)):
                last = module.bn3 if isinstance(module, FusedBottleneck) else module.bn2
                if isinstance(last.weight, Tensor):
                    nn.init.zeros_(last.weight)

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> logits (N, num_classes), in the dtype of the parameters or of autocast."""
        return self._forward_impl(x)


class ResNet(StagedNet):
    """ResNet for ImageNet (He et al. 2015, table 1): torchvision's constructor, state_dict and numbers.

    Args:
        block: FusedBasicBlock, FusedBottleneck, or a block with torchvision's constructor.
        layers: how many blocks each of the four stages has.
        num_classes: size of the logits.
        zero_init_residual: start every fused block as the identity (last norm's weight 0).
        groups, width_per_group: cardinality and width of a bottleneck's 3x3 convolution.
        replace_stride_with_dilation: for layer2, layer3, layer4: dilate instead of halving the map.
        norm_layer: makes a norm from a number of channels; default torch.nn.BatchNorm2d.
        memory: "standard", or "recompute" to keep less for the backward.
    """

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        memory: Memory = "standard",
    ) -> None:
        super().__init__(norm_layer, groups, width_per_group, memory)
        if replace_stride_with_dilation is not None and len(replace_stride_with_dilation) != 3:
            raise ValueError(
                f"replace_stride_with_dilation should be None or a 3-element tuple, got {replace_stride_with_dilation}"
            )
        self._make_stem(*imagenet_stem())
        self._make_stages(block, layers, WIDTHS, replace_stride_with_dilation)
        self._make_head(num_classes)
        self._initialise(zero_init_residual)


def imagenet_stem() -> tuple[nn.Conv2d, nn.MaxPool2d]:
    """Quarter the map, 3 -> 64 channels."""
    conv = nn.Conv2d(3, WIDTHS[0], kernel_size=7, stride=2, padding=3, bias=False)
    return conv, nn.MaxPool2d(kernel_size=3, stride=2, padding=1)


class Row(NamedTuple):
    """One row of the table. ``groups``, ``width_per_group``: what the name promises, None where it leaves a choice."""

    title: str
    block: type[FusedBasicBlock] | type[FusedBottleneck]
    layers: tuple[int, int, int, int]
    groups: int | None
    width_per_group: int | None
    enum: str
    paper: str


HE = "He et al. 2015, https://arxiv.org/abs/1512.03385"
XIE = "Xie et al. 2016, https://arxiv.org/abs/1611.05431"
WRN = "Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146"

# fmt: off
VARIANTS = {
    # constructor           title                block            blocks         groups width weights enum, paper
    "resnet18":         Row("ResNet-18",         FusedBasicBlock, (2, 2, 2, 2),  None, None, "ResNet18", HE),
    "resnet34":         Row("ResNet-34",         FusedBasicBlock, (3, 4, 6, 3),  None, None, "ResNet34", HE),
    "resnet50":         Row("ResNet-50",         FusedBottleneck, (3, 4, 6, 3),  None, None, "ResNet50", HE),
    "resnet101":        Row("ResNet-101",        FusedBottleneck, (3, 4, 23, 3), None, None, "ResNet101", HE),
    "resnet152":        Row("ResNet-152",        FusedBottleneck, (3, 8, 36, 3), None, None, "ResNet152", HE),
    "resnext50_32x4d":  Row("ResNeXt-50 32x4d",  FusedBottleneck, (3, 4, 6, 3),  32,   4,    "ResNeXt50_32X4D", XIE),
    "resnext101_32x8d": Row("ResNeXt-101 32x8d", FusedBottleneck, (3, 4, 23, 3), 32,   8,    "ResNeXt101_32X8D", XIE),
    "resnext101_64x4d": Row("ResNeXt-101 64x4d", FusedBottleneck, (3, 4, 23, 3), 64,   4,    "ResNeXt101_64X4D", XIE),
    "wide_resnet50_2":  Row("Wide ResNet-50-2",  FusedBottleneck, (3, 4, 6, 3),  None, 128,  "Wide_ResNet50_2", WRN),
    "wide_resnet101_2": Row("Wide ResNet-101-2", FusedBottleneck, (3, 4, 23, 3), None, 128,  "Wide_ResNet101_2", WRN),
}
# fmt: on


def _constructor(name: str) -> Constructor[ResNet]:
    row = VARIANTS[name]
    summary = f"{row.title} ({row.paper}): {row.block.__name__}, {row.layers} blocks in layer1 to layer4."
    promised = {"groups": row.groups, "width_per_group": row.width_per_group}
    fixed = {keyword: value for keyword, value in promised.items() if value is not None}
    return constructor(name, ResNet, row.block, row.layers, summary=summary, enum=f"{row.enum}_Weights", **fixed)


resnet18 = _constructor("resnet18")
resnet34 = _constructor("resnet34")
resnet50 = _constructor("resnet50")
resnet101 = _constructor("resnet101")
resnet152 = _constructor("resnet152")
resnext50_32x4d = _constructor("resnext50_32x4d")
resnext101_32x8d = _constructor("resnext101_32x8d")
resnext101_64x4d = _constructor("resnext101_64x4d")
wide_resnet50_2 = _constructor("wide_resnet50_2")
wide_resnet101_2 = _constructor("wide_resnet101_2")

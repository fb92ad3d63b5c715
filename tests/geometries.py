"""Blocks as the emulated kernels take them: folded, with their eager twin and the truth in float64."""

from __future__ import annotations

import copy

import torch
from oracles import EAGER_BLOCKS, batch, block_twins, rms, shake
from torch import Tensor, nn

import fusedres

CL = torch.channels_last


def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w in ``dtype``, bias in float32), folded in float64."""
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    w = conv.weight.double() * scale.view(-1, 1, 1, 1)
    return w.to(dtype).contiguous(memory_format=CL), (bn.bias.double() - bn.running_mean.double() * scale).float()


def folded(block: nn.Module, dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """The convs of ``block`` folded, and its projection's weight; the projection's bias is in the last conv's."""
    count = 3 if hasattr(block, "conv3") else 2
    with torch.no_grad():
        convs = [fold(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), dtype) for i in range(1, count + 1)]
        if block.downsample is None:
            return convs, None
        w_shortcut, bias = fold(*block.downsample, dtype)
        convs[-1] = (convs[-1][0], convs[-1][1] + bias)
        return convs, w_shortcut


def eager_block(kind: str, c: int, planes: int, stride: int, dtype: torch.dtype, **kwargs: int) -> nn.Module:
    """torchvision's block in eval with shaken BN, parameters in ``dtype``."""
    fused_kind = {"bottleneck": fusedres.FusedBottleneck, "basic": fusedres.FusedBasicBlock}[kind]
    assert fused_kind in EAGER_BLOCKS
    return block_twins(fused_kind, c, planes, stride, **kwargs)[1].to(dtype).eval()


def eager_stem(c: int, k: int, dtype: torch.dtype) -> nn.Sequential:
    """A ResNet's stem in eval with shaken BN, ``c`` channels in and ``k`` out, parameters in ``dtype``."""
    conv = nn.Conv2d(c, k, 7, 2, 3, bias=False)
    return shake(nn.Sequential(conv, nn.BatchNorm2d(k), nn.ReLU(), nn.MaxPool2d(3, 2, 1))).to(dtype).eval()


def eager_cifar_stem(c: int, k: int, dtype: torch.dtype) -> nn.Sequential:
    """The same of a ResNet for CIFAR."""
    conv = nn.Conv2d(c, k, 3, 1, 1, bias=False)
    return shake(nn.Sequential(conv, nn.BatchNorm2d(k), nn.ReLU())).to(dtype).eval()


def eager_head(c: int, f: int, dtype: torch.dtype, bias: bool = True) -> nn.Sequential:
    """A ResNet's average pool and fully connected layer, ``c`` channels in and ``f`` outputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, f, bias)).to(dtype).eval()


def assert_close_as_eager(ours: Tensor, eager: nn.Module, x: Tensor) -> None:
    """At most twice eager's root-mean-square error against float64, and NaN in the same places."""
    with torch.no_grad():
        theirs, truth = eager(x), copy.deepcopy(eager).double()(x.double())
    assert ours.shape == truth.shape
    assert torch.equal(ours.isnan(), truth.isnan())
    floor = torch.finfo(ours.dtype).eps * rms(truth) / 4
    ours_error, their_error = rms(ours.double() - truth), rms(theirs.double() - truth)
    assert ours_error <= 2 * their_error + floor, f"error {ours_error:.3g}, eager's {their_error:.3g}"


__all__ = [
    "assert_close_as_eager",
    "batch",
    "eager_block",
    "eager_cifar_stem",
    "eager_head",
    "eager_stem",
    "fold",
    "folded",
]

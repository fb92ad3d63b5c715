"""Whole networks for the tests: fused ones and their eager twins, their inputs, and how a step is compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
from oracles import assert_steps_equal, batch, shake, step
from torch import Tensor, nn
from torchvision.models import resnet as eager_resnet

import fusedres

Twins = tuple[nn.Module, nn.Module]  # fused, eager

CHILDREN = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
BLOCKS = {
    "basic": (fusedres.FusedBasicBlock, eager_resnet.BasicBlock),
    "bottleneck": (fusedres.FusedBottleneck, eager_resnet.Bottleneck),
}
SIDE = 33  # of the images: every map is odd, 2x2 in layer4


def as_maps(net: nn.Module) -> nn.Module:
    """``net`` with its logits as (N, num_classes, 1, 1), the shape that the oracles' steps work with."""
    return nn.Sequential(net, nn.Unflatten(1, (-1, 1, 1)))


def shaken(fused: nn.Module, eager: nn.Module, dtype: torch.dtype = torch.float32) -> Twins:
    """Copies of twins, with the same shaken state."""
    eager = shake(copy.deepcopy(eager)).to(dtype)
    fused = copy.deepcopy(fused).to(dtype)
    fused.load_state_dict(eager.state_dict())
    return fused, eager


def small_twins(
    kind: str = "basic", dtype: torch.dtype = torch.float64, memory: Any = "standard", **kwargs: Any
) -> Twins:
    """Shaken networks of one or two blocks a stage."""
    fused_block, eager_block = BLOCKS[kind]
    layers = [2, 1, 1, 1]
    fused = fusedres.ResNet(fused_block, layers, 10, memory=memory, **kwargs)
    return shaken(fused, eager_resnet.ResNet(eager_block, layers, 10, **kwargs), dtype)


def images(n: int = 4, side: int = SIDE, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return batch(n, 3, side, side, dtype=dtype, seed=seed)


def decide_relus(net: nn.Module) -> nn.Module:
    """Bias every BN so far that each channel is on or off throughout; returns ``net``.

    Where a value before a ReLU is near zero, rounding decides whether a gradient passes: among the million ReLUs of a
    network some do, in eager as in fused, and each moves whole gradients by more than all other rounding together.
    """
    for bn in net.modules():
        if isinstance(bn, nn.BatchNorm2d):
            with torch.no_grad():
                bn.bias[::2] += 10
                bn.bias[1::2] -= 10
    return net


def assert_step_equal(fused: nn.Module, eager: nn.Module, x: Tensor) -> None:
    """Logits, every gradient and every buffer after a step agree to ten digits in float64."""
    assert_steps_equal(step(as_maps(fused), x), step(as_maps(eager), x))

"""Field cases of folding: the formula for every bias, eps, group and sign; statistics that half dtypes cannot hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from field_nets import (
    Place,
    assert_all_near,
    assert_near,
    eager_net,
    gradients,
    resnet18,
    same_bits,
    saved,
    small_bottleneck_net,
    small_net,
)
from oracles import batch, block_twins, rms
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import fusedres
from fusedres import FusedBottleneck

EPS = (1e-3, 1e-5, 1e-5, 0.1)


def biased_convs(zoo: object) -> nn.Module:
    """A network whose convs have biases, whose BNs have an eps each, and some channels of which hardly vary."""
    net = small_net(zoo)
    generator = torch.Generator().manual_seed(5)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for i, bn in enumerate(norms):
        bn.eps = EPS[i % len(EPS)]
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d):
            conv.bias = nn.Parameter(torch.randn(conv.out_channels, generator=generator))
    return net


@pytest.mark.case("F04")
def test_every_conv_bias_is_scaled_and_every_norm_keeps_its_eps(drop_in: Callable, place: Place) -> None:
    eager = eager_net(biased_convs).eval()
    for bn in eager.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.running_var[::5] = 0.01  # where eps matters
    fused, eager = place.put(drop_in(biased_convs, eager), eager)
    x = place.put(batch(2, 3, 64, 64))
    with torch.no_grad():
        assert_near(fused(x), eager(x), place.tolerance)
    fused.train()(x).square().sum().backward()
    eager.train()(x).square().sum().backward()
    assert_all_near(gradients(fused), gradients(eager), 100 * place.tolerance)
    assert fused.layer1[0].conv1.bias.grad.abs().max() < 1e-8  # BN takes the bias out again


@pytest.mark.case("F04")
@pytest.mark.kernel
def test_bias_of_one_behind_a_norm_of_gain_two_adds_two(place: Place) -> None:
    layer = fusedres.FusedConvBNReLU(3, 3, bias=True, relu=False).eval()
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.bias.fill_(1)
        layer.bn.weight.fill_(2)
        layer.bn.eps = 0.0
    layer.to(place.device)
    x = torch.zeros(1, 3, 4, 4, device=place.device)
    with torch.no_grad():
        assert torch.equal(layer(x), torch.full_like(x, 2))
    assert torch.equal(layer(x).detach(), torch.full_like(x, 2))  # with gradients, unfolded


def small_resnext(zoo: object) -> nn.Module:
    return zoo.ResNet(zoo.Bottleneck, [1, 1, 1, 1], 10, groups=32, width_per_group=4)  # type: ignore[attr-defined]


@pytest.mark.case("F05")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_grouped_network_computes_eagers_outputs_and_gradients(training: bool, drop_in: Callable, place: Place) -> None:
    eager = eager_net(small_resnext).train(training)
    fused, eager = place.put(drop_in(small_resnext, eager), eager)
    x = place.put(batch(2, 3, 64, 64))
    ours, theirs = fused(x), eager(x)
    assert_near(ours, theirs, place.tolerance)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_all_near(gradients(fused), gradients(eager), 100 * place.tolerance)
    assert fused.layer1[0].conv2.weight.grad.shape == (128, 4, 3, 3)


@pytest.mark.case("F05")
@pytest.mark.kernel
@pytest.mark.parametrize("groups", [2, 6], ids=["groups", "depthwise"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_grouped_block_computes_eagers_outputs_and_gradients(training: bool, groups: int, place: Place) -> None:
    fused, eager = block_twins(FusedBottleneck, 12, 6, groups=groups, base_width=-(-64 // groups))
    fused, eager = place.put(fused.train(training), eager.train(training))
    x = place.put(batch(2, 12, 5, 4))
    ours, theirs = fused(x), eager(x)
    assert_near(ours, theirs, place.tolerance)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_all_near(gradients(fused), gradients(eager), 10 * place.tolerance)


@pytest.mark.case("F08")
@pytest.mark.parametrize("eps", [None, 0.0])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_frozen_norm_keeps_its_eps_and_buffers_in_both_modes(
    training: bool, eps: float | None, drop_in: Callable, place: Place
) -> None:
    norm = FrozenBatchNorm2d if eps is None else partial(FrozenBatchNorm2d, eps=eps)
    make = partial(small_net, norm_layer=norm)
    eager = eager_net(make).train(training)
    for bn in eager.modules():
        if isinstance(bn, FrozenBatchNorm2d):
            bn.running_var[0] = 1e-4
    fused, eager = place.put(drop_in(make, eager), eager)
    before = saved(fused)
    x = place.put(batch(2, 3, 64, 64))
    assert_near(fused(x), eager(x), place.tolerance)
    with torch.no_grad():
        assert_near(fused(x), eager(x), place.tolerance)
    assert same_bits(fused, before)
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in eager.named_parameters()]
    assert not any("bn" in name for name, _ in fused.named_parameters())


def alternate_signs(net: nn.Module) -> nn.Module:
    """+0.7 and -0.7 by turns as the weight of every BN."""
    with torch.no_grad():
        for bn in net.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.weight[::2] = 0.7
                bn.weight[1::2] = -0.7
    return net


@pytest.mark.case("F23")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_negative_norm_weights_keep_their_sign(training: bool, drop_in: Callable, place: Place) -> None:
    eager = alternate_signs(eager_net(resnet18)).train(training)
    fused, eager = place.put(drop_in(resnet18, eager), eager)
    assert torch.equal(fused.bn1.weight.sign(), eager.bn1.weight.sign())
    x = place.put(batch(2, 3, 64, 64))
    ours, theirs = fused(x), eager(x)
    assert_near(ours, theirs, place.tolerance)
    if training:
        ours.square().sum().backward()
        theirs.square().sum().backward()
        assert_all_near(gradients(fused), gradients(eager), 1e3 * place.tolerance)


@pytest.mark.case("F23")
@pytest.mark.kernel
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_block_with_negative_and_zero_norm_weights_equals_eager(training: bool, place: Place) -> None:
    fused, eager = block_twins(FusedBottleneck, 12, 3, norm_layer=nn.BatchNorm2d)
    for block in (fused, eager):
        alternate_signs(block).bn2.weight.data[1] = 0
    fused, eager = place.put(fused.train(training), eager.train(training))
    x = place.put(batch(2, 12, 5, 4))
    ours, theirs = fused(x), eager(x)
    assert_near(ours, theirs, place.tolerance)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_all_near(gradients(fused), gradients(eager), 10 * place.tolerance)


def extreme_statistics(block: nn.Module) -> nn.Module:
    """One channel whose variance is too large for float16, one whose variance is too small."""
    with torch.no_grad():
        block.bn2.running_var[0], block.bn2.running_var[1] = 1e5, 1e-8
        block.conv2.weight[0] *= 1e5**0.5
        block.conv2.weight[1] *= 1e-4
        block.bn2.eps = 1e-9
    return block


@pytest.mark.case("F28")
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_extreme_statistics_are_folded_in_float32_and_cast_once(dtype: torch.dtype, place: Place) -> None:
    fused, eager = (extreme_statistics(block.eval()) for block in block_twins(FusedBottleneck, 16, 4))
    fused, eager = fused.to(place.device), eager.to(place.device)
    x = batch(2, 16, 5, 4).to(place.device)
    with torch.no_grad():
        exact = eager(x)
        with torch.autocast(place.device, dtype):
            half = fused(x)
    assert half.dtype == dtype
    assert half.isfinite().all()
    assert rms(half - exact) <= (1e-2 if dtype == torch.float16 else 2e-2) * rms(exact)


@pytest.mark.case("F28")
def test_bfloat16_networks_err_no_more_than_unfused_ones(drop_in: Callable, place: Place) -> None:
    eager = eager_net(small_bottleneck_net).eval()
    fused = drop_in(small_bottleneck_net, eager).to(place.device).bfloat16()
    x = batch(4, 3, 64, 64).to(place.device)
    with torch.no_grad():
        exact = eager.to(place.device)(x)
        unfused = copy.deepcopy(eager).bfloat16()(x.bfloat16())
        assert rms(fused(x.bfloat16()) - exact) <= 2 * rms(unfused - exact)

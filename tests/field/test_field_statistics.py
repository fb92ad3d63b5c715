"""Field cases of batch statistics: which variance, which average, how few values, how large a mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from field_nets import Place, assert_all_near, assert_near, eager_net, resnet18
from oracles import batch, block_twins, identity_conv_
from torch import nn

from fusedres import FusedBasicBlock


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.case("F14")
def test_running_variance_of_a_network_is_unbiased_where_four_values_remain(drop_in: Callable, place: Place) -> None:
    eager = eager_net(resnet18).train()
    for bn in norms(eager):
        bn.momentum = 1.0
    fused, eager = place.put(drop_in(resnet18, eager), eager)
    x = place.put(batch(4, 3, 32, 32))
    with torch.no_grad():
        fused(x)
        eager(x)
    assert_all_near(fused.named_buffers(), eager.named_buffers(), place.tolerance)
    assert fused.layer4[1].bn2.num_batches_tracked.item() == 1


@pytest.mark.case("F14")
@pytest.mark.kernel
def test_two_values_have_running_variance_two_and_are_normalised_by_one(place: Place) -> None:
    block = FusedBasicBlock(4, 4).train()
    identity_conv_(block.conv1)
    block.bn1.momentum = 1.0
    seen = {}
    block.to(place.device)
    x = torch.tensor([1.0, 3.0], device=place.device).view(2, 1, 1, 1).repeat(1, 4, 1, 1)
    block(x)
    assert torch.equal(block.bn1.running_mean.cpu(), torch.full((4,), 2.0))
    torch.testing.assert_close(block.bn1.running_var.cpu(), torch.full((4,), 2.0))
    block.conv2.register_forward_pre_hook(lambda _, args: seen.update(normalised=args[0].detach()))
    identity_conv_(block.conv2)
    block.bn1.bias.data.fill_(2.0)  # so that the ReLU passes both
    block(x)
    torch.testing.assert_close(seen["normalised"].cpu() - 2, (x.cpu() - 2).sign() * 0.999995, atol=1e-6, rtol=0)
    del seen["normalised"]
    block.conv2._forward_pre_hooks.clear()
    for bn in norms(block):
        bn.bias.data.fill_(2.0)
    # Fused again: conv2 passes relu(bn1) on, whose values are 2 +- 0.999995, so bn2 gives the same, plus the input.
    torch.testing.assert_close(block(x).detach(), x + 2 + (x - 2).sign() * 0.99999, atol=3e-5, rtol=0)


@pytest.mark.case("F15")
def test_momentum_none_averages_all_batches_until_reset(drop_in: Callable, place: Place) -> None:
    eager = eager_net(resnet18).train()
    for bn in norms(eager):
        bn.momentum = None
        bn.reset_running_stats()
    fused, eager = place.put(drop_in(resnet18, eager), eager)
    batches = [place.put(batch(4, 3, 32, 32, seed=i) + i) for i in range(3)]
    with torch.no_grad():
        stem = [fused.conv1(x).transpose(0, 1).flatten(1) for x in batches]
        for x in batches:
            fused(x)
            eager(x)
    assert_all_near(fused.named_buffers(), eager.named_buffers(), place.tolerance)
    torch.testing.assert_close(fused.bn1.running_mean, torch.stack([z.mean(1) for z in stem]).mean(0))
    torch.testing.assert_close(fused.bn1.running_var, torch.stack([z.var(1) for z in stem]).mean(0))
    assert fused.bn1.num_batches_tracked.item() == 3
    for bn in norms(fused):
        bn.reset_running_stats()
    with torch.no_grad():
        fused(batches[2])
    torch.testing.assert_close(fused.bn1.running_mean, stem[2].mean(1))
    torch.testing.assert_close(fused.bn1.running_var, stem[2].var(1))


@pytest.mark.case("F15")
@pytest.mark.kernel
def test_block_with_momentum_none_averages_as_eager_does(place: Place) -> None:
    fused, eager = block_twins(FusedBasicBlock, 4, 4)
    for bn in (*norms(fused), *norms(eager)):
        bn.momentum = None
        bn.reset_running_stats()
    fused, eager = place.put(fused, eager)
    for i in range(3):
        x = place.put(batch(2, 4, 4, 3, seed=i) + i)
        with torch.no_grad():
            assert_near(fused(x), eager(x), place.tolerance)
    assert_all_near(fused.named_buffers(), eager.named_buffers(), place.tolerance)


@pytest.mark.case("F19")
def test_one_value_per_channel_is_refused_and_leaves_no_nan_behind(drop_in: Callable, place: Place) -> None:
    eager = eager_net(resnet18).train()
    fused, eager = place.put(drop_in(resnet18, eager), eager)
    x = place.put(batch(1, 3, 32, 32))
    for model in (fused, eager):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(x)
    assert all(buffer.isfinite().all() for buffer in fused.buffers())
    x = place.put(batch(1, 3, 64, 64))
    fused.load_state_dict(eager.state_dict())  # eager has counted batches in the block that refused
    assert_near(fused(x), eager(x), place.tolerance)
    assert_all_near(fused.named_buffers(), eager.named_buffers(), place.tolerance)


@pytest.mark.case("F21")
@pytest.mark.kernel
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("mean", "spread"), [(1000.0, 0.1), (1e4, 1.0)])
def test_variance_survives_a_mean_ten_thousand_times_the_spread(
    mean: float, spread: float, layout: torch.memory_format, place: Place
) -> None:
    block = FusedBasicBlock(8, 8).train()
    identity_conv_(block.conv1)
    identity_conv_(block.conv2)
    block.bn1.momentum = 1.0
    block.bn1.bias.data.fill_(8.0)  # so that the ReLU passes everything
    block.bn2.requires_grad_(False).eval()  # mean 0, variance 1: passes bn1's output on
    block.to(place.device)
    n, side = (2, 12) if place.is_interpreted else (8, 32)
    x = (mean + spread * batch(n, 8, side, side)).contiguous(memory_format=layout).to(place.device)
    y = block(x).detach() - x - 8
    exact = x.double().var((0, 2, 3))
    torch.testing.assert_close(block.bn1.running_var.double(), exact, rtol=1e-2, atol=0)
    normalised = (x.double() - x.double().mean((0, 2, 3), keepdim=True)) / exact.sqrt().view(1, -1, 1, 1)
    rounding = torch.finfo(torch.float32).eps * mean  # of adding the input again
    assert y.isfinite().all()
    assert (y.double() - normalised).abs().max() <= 2e-2 + rounding

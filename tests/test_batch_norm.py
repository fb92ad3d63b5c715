"""BN's semantics, read from each BN of a block at every call: modes, momenta, eps, affine, statistics."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
from oracles import (
    assert_accurate,
    assert_steps_equal,
    batch,
    block_twins,
    identity_conv_,
    is_fused,
    shake,
    step,
    step_results,
)
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fusedres import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU

pytestmark = pytest.mark.usefixtures("one_thread")

double = torch.float64
kinds = pytest.mark.parametrize("kind", [FusedBasicBlock, FusedBottleneck])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def twins(kind: type[nn.Module], **kwargs: object) -> tuple[nn.Module, nn.Module]:
    """A block with a projection, and eager's, in float64."""
    fused, eager = block_twins(kind, 6, 8, 2, **kwargs)
    return fused.double(), eager.double()


def assert_equal_steps(fused: nn.Module, eager: nn.Module, count: int = 1) -> None:
    """``count`` batches in a row leave equal outputs, gradients and buffers."""
    for i in range(count):
        x = batch(3, 6, 7, 5, dtype=double, seed=i) + i
        assert is_fused(lambda x=x: copy.deepcopy(fused)(x))
        assert_steps_equal(step(fused, x), step(eager, x))
        with torch.no_grad():
            torch.testing.assert_close(fused(x), eager(x), rtol=1e-10, atol=1e-10)
    assert_steps_equal(dict(fused.named_buffers()), dict(eager.named_buffers()))


def batch_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("pattern", list(itertools.product([True, False], repeat=4)), ids=str)
def test_every_mix_of_train_and_eval_among_a_blocks_batch_norms(pattern: tuple[bool, ...], engine: str) -> None:
    fused, eager = twins(FusedBottleneck)
    for module in (fused, eager):
        for bn, training in zip(batch_norms(module), pattern, strict=True):
            bn.train(training)
    assert_equal_steps(fused, eager)


@kinds
@modes
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, None])
def test_momentum(kind: type[nn.Module], training: bool, momentum: float | None, engine: str) -> None:
    fused, eager = (m.train(training) for m in twins(kind, norm_layer=partial(nn.BatchNorm2d, momentum=momentum)))
    assert_equal_steps(fused, eager, count=3)


def test_cumulative_average_restarts_after_a_reset(engine: str) -> None:
    block = FusedBasicBlock(8, 8, norm_layer=partial(nn.BatchNorm2d, momentum=None)).double()
    identity_conv_(block.conv1)
    batches = [batch(4, 8, 5, 5, dtype=double, seed=i) + i for i in range(3)]
    for x in batches:
        block(x)
    torch.testing.assert_close(block.bn1.running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0))
    torch.testing.assert_close(block.bn1.running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))
    assert block.bn1.num_batches_tracked == 3
    block.bn1.reset_running_stats()
    block(batches[2])
    torch.testing.assert_close(block.bn1.running_mean, batches[2].mean((0, 2, 3)))
    torch.testing.assert_close(block.bn1.running_var, batches[2].var((0, 2, 3)))


@kinds
@modes
def test_without_running_statistics(kind: type[nn.Module], training: bool, engine: str) -> None:
    norm_layer = partial(nn.BatchNorm2d, track_running_stats=False)
    fused, eager = (m.train(training) for m in twins(kind, norm_layer=norm_layer))
    assert_equal_steps(fused, eager)
    x = batch(4, 6, 7, 5, dtype=double)
    assert not torch.allclose(fused(x)[:1], fused(x[:2])[:1])  # batch statistics couple the samples


@kinds
@modes
def test_tracking_switched_off_later_leaves_the_buffers_alone(
    kind: type[nn.Module], training: bool, engine: str
) -> None:
    fused, eager = (m.train(training) for m in twins(kind))
    for bn in (*batch_norms(fused), *batch_norms(eager)):
        bn.track_running_stats = False
    before = copy.deepcopy(dict(fused.named_buffers()))
    assert_equal_steps(fused, eager)
    assert all(torch.equal(b, before[name]) for name, b in fused.named_buffers())


@modes
def test_counter_removed(training: bool, engine: str) -> None:
    for momentum in (0.1, None):
        fused, eager = (m.train(training) for m in twins(FusedBottleneck))
        for bn in (*batch_norms(fused), *batch_norms(eager)):
            bn.num_batches_tracked, bn.momentum = None, momentum
        assert_equal_steps(fused, eager)


@kinds
@modes
def test_without_affine_parameters(kind: type[nn.Module], training: bool, engine: str) -> None:
    norm_layer = partial(nn.BatchNorm2d, affine=False)
    assert_equal_steps(*(m.train(training) for m in twins(kind, norm_layer=norm_layer)))


@kinds
@modes
def test_every_batch_norm_has_its_own_eps_and_every_conv_its_bias(
    kind: type[nn.Module], training: bool, engine: str
) -> None:
    fused, eager = block_twins(kind, 6, 8, 2)
    for module in (fused, eager):
        for bn, eps in zip(batch_norms(module), (1e-5, 1e-3, 0.1, 0.01), strict=False):
            bn.eps = eps
            bn.running_var[:2] = 0.01
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d):
                conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels))
    assert_equal_steps(fused.double().train(training), eager.double().train(training))


@modes
def test_conv_bias_is_scaled_by_its_batch_norm(training: bool, engine: str) -> None:
    layer = FusedConvBNReLU(1, 1, 1, bias=True, relu=False).train(training)
    with torch.no_grad():
        layer.conv.weight.fill_(1), layer.conv.bias.fill_(1), layer.bn.weight.fill_(2)
        layer.bn.eps = 0.0
        x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
        y = layer(x).flatten().tolist()
    assert y == ([-2.0, 2.0] if training else [0.0, 4.0])
    if training:
        layer(x).square().sum().backward()
        assert layer.conv.bias.grad.item() == 0  # BN removes the bias


@kinds
@modes
def test_negative_and_zero_weights(kind: type[nn.Module], training: bool, engine: str) -> None:
    fused, eager = block_twins(kind, 6, 8, 2)
    for module in (fused, eager):
        for bn in batch_norms(module):
            with torch.no_grad():
                bn.weight.copy_(torch.tensor([0.7, -0.7, 0.0, -1.3] * bn.num_features)[: bn.num_features])
    assert_equal_steps(fused.double().train(training), eager.double().train(training))


@kinds
@modes
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_frozen_batch_norm(kind: type[nn.Module], training: bool, eps: float, engine: str) -> None:
    fused, eager = (m.train(training) for m in twins(kind, norm_layer=partial(FrozenBatchNorm2d, eps=eps)))
    before = copy.deepcopy(dict(fused.named_buffers()))
    assert_equal_steps(fused, eager)
    assert all(torch.equal(b, before[name]) for name, b in fused.named_buffers())
    assert not [name for name, _ in fused.named_parameters() if "bn" in name]


@kinds
def test_eval_gradients_treat_statistics_as_constants(kind: type[nn.Module], engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(kind, 6, 8, 2))
    before = copy.deepcopy(dict(fused.named_buffers()))
    x = batch(4, 6, 7, 5)
    assert_accurate(step_results(fused, eager, x))
    leaf, one = x.clone().requires_grad_(), x[:1].clone().requires_grad_()
    fused(leaf).square().sum().backward()
    fused(one).square().sum().backward()
    torch.testing.assert_close(leaf.grad[:1], one.grad, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(b, before[name]) for name, b in fused.named_buffers())


def test_running_variance_is_unbiased_and_normalisation_biased(engine: str) -> None:
    block = FusedBasicBlock(8, 8)
    block.bn1.momentum = 1.0
    identity_conv_(block.conv1)
    x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 8, 1, 1)
    block(x)
    assert block.bn1.running_mean.tolist() == [2.0] * 8
    assert block.bn1.running_var.tolist() == [2.0] * 8
    layer = FusedConvBNReLU(8, 8, relu=False)
    identity_conv_(layer.conv)
    expected = torch.tensor([-0.999995, 0.999995]).view(2, 1, 1, 1).expand(2, 8, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel_size", [3, 1])
@pytest.mark.parametrize(("mean", "spread"), [(1000.0, 0.1), (1e4, 1.0)])
def test_large_mean_and_small_spread_keep_their_variance(
    kernel_size: int, mean: float, spread: float, engine: str
) -> None:
    """Also where the statistics of a widening 1x1 conv follow from the moments of its input."""
    widening = 2 if kernel_size == 1 else 1
    layer = FusedConvBNReLU(8, 8 * widening, kernel_size, relu=False)
    layer.bn.momentum = 1.0
    with torch.no_grad():
        layer.conv.weight.zero_()
        for k in range(8 * widening):
            layer.conv.weight[k, k % 8, kernel_size // 2, kernel_size // 2] = 1
    x = (mean + spread * torch.randn(8, 8, 32, 32)).contiguous(memory_format=torch.channels_last)
    y = layer(x)
    exact = x.double()
    variance = exact.var((0, 2, 3)).repeat(widening)
    torch.testing.assert_close(layer.bn.running_var.double(), variance, rtol=1e-2, atol=0)
    normalised = (exact - exact.mean((0, 2, 3), keepdim=True)) / exact.std((0, 2, 3), keepdim=True, unbiased=False)
    scale = (variance / (variance + layer.bn.eps)).sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(y.double(), normalised.repeat(1, widening, 1, 1) * scale, rtol=0, atol=2e-2)


@kinds
def test_one_value_per_channel_is_refused_before_any_statistics_move(kind: type[nn.Module], engine: str) -> None:
    fused, eager = block_twins(kind, 6, 8, 2)
    before = copy.deepcopy(dict(fused.named_buffers()))
    for module in (fused, copy.deepcopy(eager)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            module(batch(1, 6, 1, 1))
    assert all(torch.equal(b, before[name]) for name, b in fused.named_buffers())
    assert_accurate(*(step_results(fused, eager, batch(1, 6, 3, 3, seed=i)) for i in range(9)))
    fused.eval()(batch(1, 6, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extreme_statistics_are_folded_before_the_cast(dtype: torch.dtype, engine: str) -> None:
    """Half convs, float32 BN: a variance beyond float16 and one below it are folded in float32 and cast once."""
    layer = shake(FusedConvBNReLU(8, 8)).eval()
    with torch.no_grad():
        layer.bn.running_var[0], layer.bn.running_var[1] = 1e5, 1e-8
        layer.conv.weight[0] *= 300
        layer.conv.weight[1] *= 1e-3
    x = batch(2, 8, 7, 7)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double())
        layer.conv.to(dtype)
        y = layer(x.to(dtype))
        eager = torch.relu(layer.bn(layer.conv(x.to(dtype))))
    assert y.isfinite().all()
    error, eager_error = ((t.double() - exact).abs().max() for t in (y, eager))
    assert error <= max(2 * eager_error, 1e-2 * exact.abs().max())

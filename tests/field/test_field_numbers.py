"""Field cases of dtypes and layouts: which dtype goes where, NaN, memory formats, and float32 that is float32."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from field_nets import Place, assert_near, eager_net, resnet18, small_bottleneck_net, small_net
from oracles import batch, block_twins, rms
from torch import Tensor, nn

from fusedres import FusedBasicBlock, FusedBottleneck

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
kinds = pytest.mark.parametrize("kind", [FusedBasicBlock, FusedBottleneck])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.mark.case("F26")
def test_autocast_keeps_statistics_and_gradients_in_float32(place: Place) -> None:
    fused, eager = (block.to(place.device) for block in block_twins(FusedBottleneck, 16, 4))
    x = batch(4, 16, 7, 6).to(place.device)
    outputs = []
    for block in (fused, eager):
        with torch.autocast(place.device, torch.bfloat16):
            y = block(x)
        y.float().square().sum().backward()
        outputs.append(y)
    assert outputs[0].dtype == torch.bfloat16
    assert_near(*outputs, 2e-2)
    for (name, mine), (_, other) in zip(fused.named_buffers(), eager.named_buffers(), strict=True):
        assert mine.dtype == other.dtype, name
        assert_near(mine.double(), other.double(), 2e-2, name)
    for name, parameter in fused.named_parameters():
        assert parameter.grad.dtype == torch.float32, name


@pytest.mark.case("F26")
def test_float64_networks_stay_float64(drop_in: Callable, place: Place) -> None:
    eager = eager_net(small_net).double().eval()
    fused, eager = drop_in(small_net, eager).to(place.device), eager.to(place.device)
    x = batch(2, 3, 64, 64, dtype=torch.float64).to(place.device)
    with torch.no_grad():
        assert_near(fused(x), eager(x), 1e-10)


@pytest.mark.case("F26")
def test_bfloat16_networks_keep_the_dtype_of_every_tensor(drop_in: Callable, place: Place) -> None:
    eager = eager_net(small_bottleneck_net).bfloat16().eval()
    fused = drop_in(small_bottleneck_net, eager).to(place.device)
    with torch.no_grad():
        assert fused(batch(2, 3, 64, 64, dtype=torch.bfloat16).to(place.device)).dtype == torch.bfloat16
    for name, tensor in fused.state_dict().items():
        assert tensor.dtype == eager.state_dict()[name].dtype, name


@pytest.mark.case("F26")
@modes
def test_gradcheck_passes_in_float64(training: bool, place: Place) -> None:
    block = block_twins(FusedBottleneck, 4, 1)[0].double().train(training).to(place.device)
    x = batch(2, 4, 3, 3, dtype=torch.float64).to(place.device).requires_grad_()
    assert torch.autograd.gradcheck(block, (x,))


@pytest.mark.case("F29")
@pytest.mark.kernel
@modes
def test_one_nan_reaches_the_neighbourhood_that_it_reaches_in_eager(training: bool, place: Place) -> None:
    fused, eager = (block.train(training).to(place.device) for block in block_twins(FusedBottleneck, 16, 4))
    x = batch(1, 16, 5, 5).to(place.device)
    x[0, 0, 2, 2] = float("nan")
    with torch.no_grad():
        ours, theirs = fused(x), eager(x)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert training or ours.isnan().sum().item() == 144
    with torch.enable_grad():
        assert torch.equal(fused(x).isnan(), theirs.isnan())


@pytest.mark.case("F29")
def test_one_nan_pixel_makes_every_logit_nan(drop_in: Callable, place: Place) -> None:
    fused = drop_in(resnet18, eager_net(resnet18)).to(place.device).eval()
    x = batch(1, 3, 64, 64).to(place.device)
    x[0, 1, 30, 30] = float("nan")
    with torch.no_grad():
        assert fused(x).isnan().all()
    assert fused(x).isnan().all()


def pixels(form: str, place: Place) -> Tensor:
    """Inputs of eight channels whose strides say different things."""
    sizes = {"map": (2, 8, 5, 4), "image": (1, 8, 5, 4), "pixel": (2, 8, 1, 1), "one": (1, 8, 2, 1)}
    return place.put(batch(*sizes[form]))


@pytest.mark.case("F31")
@pytest.mark.kernel
@modes
@pytest.mark.parametrize("form", ["map", "image", "pixel", "one"])
@kinds
def test_input_and_gradient_of_any_memory_formats_give_eagers_numbers(
    kind: type[nn.Module], form: str, training: bool, place: Place
) -> None:
    fused, eager = place.put(*(block.train(training) for block in block_twins(kind, 8, 8 // kind.expansion)))
    x = pixels(form, place)
    pairs = [*itertools.product(FORMATS, FORMATS)]
    for x_format, g_format in pairs[1:3] if place.is_interpreted else pairs:
        results = []
        for block in (copy.deepcopy(fused), copy.deepcopy(eager)):
            leaf = x.clone().contiguous(memory_format=FORMATS[x_format]).requires_grad_()
            y = block(leaf)
            y.backward(
                torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device)
                .view(y.shape)
                .contiguous(memory_format=FORMATS[g_format])
            )
            results.append((y.detach(), leaf.grad, block.conv1.weight.grad, block.bn2.weight.grad))
        for name, mine, other in zip(("y", "dx", "dw", "dgamma"), *results, strict=True):
            assert_near(mine, other, 100 * place.tolerance, f"{name} {x_format} {g_format}")
        if x_format == "channels_last":
            assert results[0][0].is_contiguous(memory_format=torch.channels_last)
            assert results[0][1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.case("F31")
@pytest.mark.kernel
@modes
def test_sliced_input_gives_eagers_numbers(training: bool, place: Place) -> None:
    fused, eager = place.put(*(block.train(training) for block in block_twins(FusedBasicBlock, 8, 8)))
    big = place.put(batch(2, 16, 5, 4))
    leaves = [big.clone().requires_grad_() for _ in range(2)]
    outputs = [block(leaf[:, ::2]) for block, leaf in zip((fused, eager), leaves, strict=True)]
    for y in outputs:
        y.square().sum().backward()
    assert_near(*outputs, place.tolerance)
    assert_near(leaves[0].grad, leaves[1].grad, 10 * place.tolerance)


@pytest.mark.case("F38")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("allowed", "bound"), [(False, 1e-5), (True, 2e-3)], ids=["float32", "tf32"])
def test_float32_obeys_the_flag_for_tf32(allowed: bool, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    fused, eager = (block.cuda() for block in block_twins(FusedBottleneck, 256, 64))
    x = batch(4, 256, 28, 28).cuda()
    for training in (False, True):
        exact = copy.deepcopy(eager).double().train(training)(x.double())
        y = fused.train(training)(x)
        assert rms(y - exact) <= bound * rms(exact)
        with torch.no_grad():
            assert rms(fused(x) - exact) <= bound * rms(exact)

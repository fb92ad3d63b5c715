"""The ``cudnn`` engine: the vendor's convolutions between kernels of our own. On the CPU ATen's stand in for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from launches import launched
from networks import decide_relus
from op_samples import Operands
from oracles import assert_accurate, batch, block_twins, rms
from test_engine import device_step, on
from torch import Tensor, nn

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, dispatch, reference
from fusedres.engines.cudnn import CUDNN
from fusedres.kernels.channel_stats import channel_stats
from fusedres.kernels.tails import drelu_
from fusedres.problem import ConvProblem

HALVES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)

#: kind, inplanes, planes, what else the constructor is told: closed and stored units, both shortcuts, strides, groups.
BLOCKS = {
    "basic-stride": (FusedBasicBlock, 6, 10, {"stride": 2}),
    "bottleneck": (FusedBottleneck, 16, 4, {}),
    "bottleneck-stride": (FusedBottleneck, 12, 5, {"stride": 2}),
    "resnext": (FusedBottleneck, 16, 4, {"groups": 4, "base_width": 32}),
}


@pytest.fixture(autouse=True)
def _cudnn() -> Iterator[None]:
    with fusedres.engine("cudnn"):
        yield


def twins(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    kind, inplanes, planes, kwargs = BLOCKS[name]
    fused, eager = (decide_relus(m).to(dtype) for m in block_twins(kind, inplanes, planes, **kwargs))
    return fused, eager


@halves
def test_its_convs_are_served_and_float32_falls_to_triton(dtype: torch.dtype, device: str) -> None:
    for op in ("conv_fprop", "conv_dgrad", "conv_wgrad", "input_moments", "pointwise_wgrad", "scale_shift_add_relu"):
        assert dispatch.choose(op, device, dtype).engine is CUDNN
    assert dispatch.choose("conv_fprop", device, torch.float32).engine.name != "cudnn"


@halves
@pytest.mark.parametrize("name", BLOCKS)
def test_error_of_a_step_is_at_most_twice_eagers(name: str, dtype: torch.dtype, device: str) -> None:
    fused, eager = twins(name, dtype)
    draws = (batch(2, BLOCKS[name][1], 7, 6, dtype=dtype, seed=seed) for seed in range(5))
    assert_accurate(*(device_step(fused, eager, x, device) for x in draws))


@pytest.mark.parametrize("memory", ["standard", "recompute"])
def test_memory_modes_compute_the_same(memory: str, device: str) -> None:
    fused, eager = (decide_relus(m).bfloat16() for m in block_twins(FusedBottleneck, 12, 5, 2, memory=memory))
    draws = (batch(2, 12, 7, 6, dtype=torch.bfloat16, seed=seed) for seed in range(5))
    assert_accurate(*(device_step(fused, eager, x, device) for x in draws))


def test_our_kernels_of_a_training_step(device: str) -> None:
    """Of an identity bottleneck: conv3 is closed, so one conv is ours and the output of no other is read twice."""
    fused = twins("bottleneck", torch.float16)[0].to(device)
    x = batch(2, 16, 7, 6, dtype=torch.float16).to(device).requires_grad_()
    outputs: list[Tensor] = []
    forward = launched(lambda: outputs.append(fused(x)))
    assert forward["conv_fprop_kernel"] == 1
    assert forward["channel_stats_kernel"] == 2 + 1  # z1, z2 and the pivot of the moments
    assert forward["bn_finalize_kernel"] == 3
    backward = launched(outputs[0].sum().backward)
    assert backward["drelu_dbn_kernel"] == 1 + 2
    assert backward["dbn_kernel"] == 2
    assert backward["conv_dgrad_kernel"] == 1  # conv1's, which adds the shortcut's gradient as it stores
    assert not {"conv_fprop_kernel", "conv_wgrad_kernel"} & set(backward)


@halves
@pytest.mark.parametrize("shape", [(3, 20, 9, 7), (1, 1, 1, 1), (2, 130, 5, 3)], ids=str)
def test_channel_stats(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = (3 + batch(*shape)).to(dtype)
    count, mean, m2 = channel_stats(x.to(device)).cpu().double()
    rows = x.double().permute(1, 0, 2, 3).flatten(1)
    assert (count == rows.shape[1]).all()
    torch.testing.assert_close(mean, rows.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m2, ((rows - rows.mean(1, keepdim=True)) ** 2).sum(1), rtol=1e-5, atol=1e-6)


def test_channel_stats_survive_a_large_mean_and_an_outlier_in_front(device: str) -> None:
    x = 1000 + 0.1 * batch(8, 3, 17, 16)
    x[0, 1, 0, 0] = 3000.0
    x[0, 2, 0, 0] = torch.nan
    _, mean, m2 = channel_stats(x.to(device)).cpu().double()
    rows = x.double().permute(1, 0, 2, 3).flatten(1)
    exact = ((rows - rows.mean(1, keepdim=True)) ** 2).sum(1)
    torch.testing.assert_close(m2[:2], exact[:2], rtol=1e-3, atol=0)
    assert m2[2].isnan()
    assert mean[2].isnan()


def test_no_pixels_have_no_statistics(device: str) -> None:
    assert torch.equal(channel_stats(batch(0, 5, 3, 3).to(device)).cpu(), torch.zeros(3, 5))


@halves
def test_relu_backward_in_place_recomputes_the_mask(dtype: torch.dtype, device: str) -> None:
    make, problem = Operands(dtype), ConvProblem(2, 20, 9, 7, 20, 1, 1)
    dx, z, bn = make.input(problem), make.input(problem), make.bn(20)
    expected, sums = reference._input_gradient(dx.double(), None, (1, 1), z.double(), bn.double())
    ours = dx.to(device).clone(memory_format=torch.channels_last)
    found = drelu_(ours, z.to(device), bn.to(device)).cpu()
    assert torch.equal(ours.cpu().double(), expected)
    torch.testing.assert_close(found.double(), sums, rtol=1e-4, atol=1e-4)


@halves
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_second_moments_survive_a_mean(mean: float, dtype: torch.dtype, device: str) -> None:
    """They are those of the values as stored, also where these are a thousand times further from 0 than apart."""
    x = (mean + batch(4, 6, 9, 8)).to(dtype)
    exact = reference.input_moments(x.double(), None, (1, 1))
    found = CUDNN.input_moments(x.to(device), None, (1, 1)).cpu().double()
    assert rms(found[:-1] - exact[:-1]) <= 4e-3 * rms(exact[:-1])
    torch.testing.assert_close(found[-1], exact[-1], rtol=1e-5, atol=1e-5)


def test_frozen_eval_is_a_launch_of_ours_a_conv(device: str) -> None:
    fused = fusedres.freeze(twins("bottleneck", torch.float16)[0].eval().to(device))
    x = batch(2, 16, 7, 6, dtype=torch.float16).to(device)
    with torch.no_grad():
        fused(x)
        assert launched(lambda: fused(x)) == {"conv_fprop_kernel": 3}
    assert isinstance(on(device, fused), nn.Module)

"""Whole blocks through the ``triton`` engine: numbers against eager's, launches against the budget, repeatability."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from launches import launched, on_activations
from networks import decide_relus
from oracles import assert_accurate, batch, block_twins, output_results, step, step_results
from torch import Tensor, nn

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, dispatch, folding
from fusedres.engines.triton import TRITON
from fusedres.stages import run_stage

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

#: kind, inplanes, planes, what else the constructor is told: ragged channels, both shortcuts, strides, groups.
BLOCKS = {
    "basic": (FusedBasicBlock, 8, 8, {}),
    "basic-stride": (FusedBasicBlock, 6, 10, {"stride": 2}),
    "bottleneck": (FusedBottleneck, 16, 4, {}),
    "bottleneck-stride": (FusedBottleneck, 12, 5, {"stride": 2}),
    "bottleneck-dilated": (FusedBottleneck, 16, 4, {"dilation": 2}),
    "resnext": (FusedBottleneck, 16, 4, {"groups": 4, "base_width": 32}),
}
blocks = pytest.mark.parametrize("name", BLOCKS)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with fusedres.engine("triton"):
        yield


def twins(name: str, training: bool = True) -> tuple[nn.Module, nn.Module]:
    kind, inplanes, planes, kwargs = BLOCKS[name]
    fused, eager = block_twins(kind, inplanes, planes, **kwargs)
    return fused.train(training), eager.train(training)


def images(name: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return batch(2, BLOCKS[name][1], 7, 6, dtype=dtype, seed=seed)


def on(device: str, module: nn.Module) -> nn.Module:
    """A copy of ``module`` on the device; it takes and gives tensors on the CPU, where the oracles compare."""
    return Transfer(copy.deepcopy(module), device)


class Transfer(nn.Module):
    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self.module, self.device = module.to(device), device

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.to(self.device)).cpu()


def stripped(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results of a module on the device under the names and on the device of its twin."""
    return {name.removeprefix("module."): value.cpu() for name, value in results.items()}


def device_step(fused: nn.Module, eager: nn.Module, x: Tensor, device: str) -> tuple:
    _, theirs, exact = step_results(eager, eager, x)
    return stripped(step(on(device, fused), x)), theirs, exact


@pytest.mark.parametrize("op", sorted({"conv_fprop", "conv_dgrad", "conv_wgrad", "drelu_dbn", "bn_finalize"}))
@dtypes
def test_every_part_of_a_block_is_served(op: str, dtype: torch.dtype, device: str) -> None:
    assert dispatch.choose(op, device, dtype).engine is TRITON


@modes
@blocks
def test_error_of_a_step_is_at_most_twice_eagers(name: str, training: bool, device: str) -> None:
    fused, eager = twins(name, training)
    draws = (images(name, torch.float32, seed) for seed in range(3))  # one is at the mercy of how many threads add
    assert_accurate(*(device_step(fused, eager, x, device) for x in draws))


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["basic-stride", "bottleneck"])
def test_error_in_half_is_at_most_twice_eagers(name: str, dtype: torch.dtype, training: bool, device: str) -> None:
    fused, eager = (decide_relus(m).to(dtype) for m in twins(name, training))
    assert_accurate(*(device_step(fused, eager, images(name, dtype, seed), device) for seed in range(3)))


@pytest.mark.parametrize("memory", ["standard", "recompute"])
def test_memory_modes_compute_the_same(memory: str, device: str) -> None:
    fused, eager = block_twins(FusedBottleneck, 12, 5, 2, memory=memory)
    assert_accurate(device_step(fused, eager, batch(2, 12, 7, 6), device))


@blocks
def test_folded_eval_is_as_accurate_as_eager(name: str, device: str) -> None:
    fused, eager = twins(name, training=False)
    x = images(name)
    _, theirs, exact = output_results(eager, eager, x)
    with torch.no_grad():
        assert_accurate(({"y": on(device, fused)(x)}, theirs, exact))


def test_the_stem_pools_what_eager_pools(device: str) -> None:
    model = fusedres.resnet18()
    x = batch(2, 3, 13, 10)
    eager = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    stem = Stem(model)
    _, theirs, exact = step_results(eager, eager, x)
    names = {"conv1": "0", "bn1": "1"}
    ours = {}
    for name, value in stripped(step(on(device, stem), x)).items():
        head, _, tail = name.removeprefix("model.").partition(".")
        ours[f"{names.get(head, head)}.{tail}" if tail else head] = value
    assert_accurate(({name: ours[name] for name in theirs}, theirs, exact))


class Stem(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model._stem(x)


def test_two_steps_are_equal_bit_for_bit(device: str) -> None:
    fused, _ = twins("bottleneck-stride")
    first, second = (step(on(device, fused), images("bottleneck-stride")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_statistics_of_a_large_mean_and_small_spread_are_exact(device: str) -> None:
    conv, bn = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3, momentum=1.0)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(3)[:, :, None, None])
    x = 1000 + 0.1 * batch(4, 3, 16, 16)
    y = fusedres.functional.conv_bn_relu(x.to(device), conv.to(device), bn.to(device), relu=False).cpu()
    exact = x.double().var((0, 2, 3))
    assert ((bn.running_var.cpu() - exact).abs() <= 0.01 * exact).all()
    assert (y.std((0, 2, 3)) - 1).abs().max() < 0.02


def test_training_forward_of_a_bottleneck_is_four_launches_and_three_finalizes(device: str) -> None:
    fused, x = twins("bottleneck")[0].to(device), images("bottleneck").to(device)
    names = launched(lambda: fused(x))
    assert on_activations(names) == Counter(conv_fprop_kernel=3, scale_shift_add_relu_kernel=1)
    assert names["bn_finalize_kernel"] == 3
    assert set(names) - set(on_activations(names)) <= {"bn_finalize_kernel", "merge_statistics_kernel"}


def test_backward_of_a_bottleneck_is_seven_launches(device: str) -> None:
    fused, x = twins("bottleneck")[0].to(device), images("bottleneck").to(device).requires_grad_()
    y = fused(x)
    names = launched(y.sum().backward)
    assert on_activations(names) == Counter(drelu_dbn_kernel=1, conv_wgrad_kernel=3, conv_dgrad_kernel=3)
    assert set(names) - set(on_activations(names)) <= {"merge_sums_kernel", "sum_kernel"}


def test_a_projection_adds_one_launch_forward_and_two_backward(device: str) -> None:
    fused, x = twins("bottleneck-stride")[0].to(device), images("bottleneck-stride").to(device).requires_grad_()
    outputs = []
    names = launched(lambda: outputs.append(fused(x)))
    assert on_activations(names) == Counter(conv_fprop_kernel=4, scale_shift_add_relu_kernel=1)
    assert names["bn_finalize_kernel"] == 4
    names = launched(outputs[0].sum().backward)
    assert on_activations(names) == Counter(drelu_dbn_kernel=1, conv_wgrad_kernel=4, conv_dgrad_kernel=4)


@pytest.mark.parametrize(("engine", "dtype"), [("triton", torch.float32), ("cudnn", torch.float16)], ids=str)
def test_over_the_border_of_two_blocks_no_launch_is_the_tail_s_own(
    engine: str, dtype: torch.dtype, device: str
) -> None:
    blocks = nn.Sequential(*(twins("bottleneck")[0] for _ in range(2))).to(device, dtype)
    x = images("bottleneck").to(device, dtype)
    names, results = [], []
    with dispatch.engine(engine):
        for chained in (True, False):
            y = run_stage(blocks, x.clone().requires_grad_(), chained)
            blocks.zero_grad()
            names.append(launched(y.float().square().sum().backward))
            results.append([p.grad for p in blocks.parameters()])
    joined, apart = names
    tails = 2 if engine == "cudnn" else 0  # of each block's first two units, whose products are the vendor's
    assert joined["drelu_dbn_kernel"] == 1 + 2 * tails
    assert apart["drelu_dbn_kernel"] == 2 + 2 * tails
    assert joined["conv_dgrad_kernel"] == apart["conv_dgrad_kernel"]
    for ours, theirs in zip(*results, strict=True):
        tolerance = 1e-2 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize(("name", "convs"), [("bottleneck", 3), ("basic-stride", 3), ("basic", 2)])
def test_eval_of_a_frozen_block_is_one_launch_a_conv(name: str, convs: int, device: str) -> None:
    fused, x = twins(name, training=False)[0].to(device), images(name).to(device)
    folding.freeze(fused)
    with torch.no_grad():
        first = fused(x)  # folds
        outputs = []
        assert launched(lambda: outputs.append(fused(x))) == Counter(conv_fprop_kernel=convs)
    assert torch.equal(outputs[0], first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: on the CPU the fingerprint sees every change")
def test_eval_of_a_block_that_is_not_frozen_folds_at_every_call_in_two_small_launches_a_conv(device: str) -> None:
    fused, x = twins("bottleneck", training=False)[0].to(device), images("bottleneck").to(device)
    with torch.no_grad():
        fused(x)
        names = launched(lambda: fused(x))
    assert names == Counter(conv_fprop_kernel=3, bn_constants_kernel=3, bn_fold_kernel=3)


def test_nan_survives_as_in_eager(device: str) -> None:
    fused, eager = twins("bottleneck", training=False)
    x = batch(1, 16, 5, 5)
    x[0, 0, 2, 2] = float("nan")
    with torch.no_grad():
        y = on(device, fused)(x)
        assert torch.equal(y.isnan(), eager(x).isnan())
    assert y.isnan().sum() == 144

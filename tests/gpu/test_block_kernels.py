"""The native CUDA kernels on the GPU: as accurate as eager, equal at every call, captured by a graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from geometries import assert_close_as_eager, batch, eager_block, eager_cifar_stem, eager_stem, fold, folded
from networks import shaken
from torch import Tensor, nn
from torchvision.models import resnet as eager_resnet

import fusedres
from fusedres.engines.block_kernels import stem_weight
from fusedres.measure import count_launches

kernels = torch.ops.fusedres_cuda
DTYPES = (torch.float16, torch.bfloat16)
#: (C, planes, stride, side): the bottlenecks of ResNet-50 at their own map sizes, and ragged ones.
BOTTLENECKS = [
    (64, 64, 1, 56),
    (256, 64, 1, 56),
    (256, 128, 2, 56),
    (512, 128, 1, 28),
    (512, 256, 2, 28),
    (1024, 256, 1, 14),
    (72, 24, 2, 13),
    (160, 40, 1, 9),
    (8, 8, 1, 1),
]
#: (C, planes, stride, side): the basic blocks of ResNet-18 that the kernel is for, and ragged ones.
BASIC_BLOCKS = [(64, 64, 1, 56), (64, 128, 2, 56), (128, 128, 1, 28), (24, 40, 1, 13), (24, 40, 2, 9), (8, 8, 1, 1)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def operands(block: nn.Module, dtype: torch.dtype) -> tuple[Tensor | int | None, ...]:
    """What a block's kernel takes behind ``x``, on the GPU."""
    convs, w_shortcut = folded(block, dtype)
    stride = (block.conv2 if hasattr(block, "conv3") else block.conv1).stride[0]
    tensors = [t.cuda() for pair in convs for t in pair]
    return *tensors, None if w_shortcut is None else w_shortcut.cuda(), stride


def assert_kernel_is_as_accurate(kind: str, geometry: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    c, planes, stride, side = geometry
    block = eager_block(kind, c, planes, stride, dtype)
    x = batch(3, c, side, side, dtype=dtype)
    kernel = kernels.bottleneck_fprop if kind == "bottleneck" else kernels.basic_block_fprop
    args = operands(block, dtype)
    first, second = (kernel(x.cuda(), *args) for _ in range(2))
    assert torch.equal(first, second)
    assert_close_as_eager(first.cpu(), block, x)


@dtypes
@pytest.mark.parametrize("geometry", BOTTLENECKS, ids=str)
def test_a_bottleneck_is_as_accurate_as_eager(geometry: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_kernel_is_as_accurate("bottleneck", geometry, dtype)


@dtypes
@pytest.mark.parametrize("geometry", BASIC_BLOCKS, ids=str)
def test_a_basic_block_is_as_accurate_as_eager(geometry: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_kernel_is_as_accurate("basic", geometry, dtype)


@dtypes
@pytest.mark.parametrize(
    ("make", "size"),
    [
        *((eager_stem, size) for size in [(2, 3, 64, 224, 224), (1, 1, 8, 1, 1), (2, 4, 72, 19, 45)]),
        *((eager_cifar_stem, size) for size in [(128, 3, 16, 32, 32), (2, 3, 64, 224, 224), (2, 4, 72, 19, 45)]),
    ],
    ids=lambda parameter: getattr(parameter, "__name__", str(parameter)),
)
def test_the_stem_is_as_accurate_as_eager(
    make: Callable[..., nn.Sequential], size: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    n, c, k, h, w = size
    stem = make(c, k, dtype)
    with torch.no_grad():
        weight, bias = fold(stem[0], stem[1], dtype)
    x = batch(n, c, h, w, dtype=dtype)
    y = kernels.stem_fprop(x.cuda(), stem_weight(weight).cuda(), bias.cuda())
    assert_close_as_eager(y.cpu(), stem, x)


@dtypes
@pytest.mark.parametrize(
    "size", [(1, 2048, 7, 1000), (64, 2048, 7, 1000), (256, 2048, 7, 1000), (70, 136, 3, 37)], ids=str
)
def test_the_head_is_as_accurate_as_eager(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, c, side, f = size
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, f)).to(dtype).eval()
    x, w, bias = batch(n, c, side, side, dtype=dtype), head[2].weight.detach().cuda(), head[2].bias.detach().cuda()
    first, second = (kernels.head_fprop(x.cuda(), w, bias) for _ in range(2))
    assert torch.equal(first, second)
    assert_close_as_eager(first.cpu(), head, x)


def test_nan_spreads_as_in_eager() -> None:
    block = eager_block("bottleneck", 32, 8, 1, torch.float16)
    x = batch(1, 32, 9, 9, dtype=torch.float16)
    x[0, 0, 4, 4] = math.nan
    assert_close_as_eager(kernels.bottleneck_fprop(x.cuda(), *operands(block, torch.float16)).cpu(), block, x)


def test_a_kernel_runs_on_the_current_stream() -> None:
    """Behind a long queue on a stream of its own, the result is that of the values the queue wrote."""
    block = eager_block("bottleneck", 64, 16, 1, torch.float16)
    x, args = batch(2, 64, 28, 28, dtype=torch.float16).cuda(), operands(block, torch.float16)
    expected = kernels.bottleneck_fprop(x, *args)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = kernels.bottleneck_fprop(late, *args)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_eval_of_a_network_is_a_launch_a_served_block_and_can_be_captured(name: str) -> None:
    eager = getattr(eager_resnet, name)(num_classes=10)
    fused, eager = (
        m.eval().to(memory_format=torch.channels_last)
        for m in shaken(getattr(fusedres, name)(num_classes=10), eager, torch.float16)
    )
    x = batch(2, 3, 64, 64, dtype=torch.float16)
    with torch.no_grad():
        reference = copy.deepcopy(eager).double()(x.double())
        theirs = (eager.cuda()(x.cuda()).cpu().double() - reference).abs().max()
        fused, images = fusedres.freeze(fused.cuda()), x.cuda()
        with fusedres.engine("cuda"):
            first = fused(images)  # folds
            ops = count_launches(lambda: fused(images)).forward_ops
            graph, static = torch.cuda.CUDAGraph(), images.clone()
            with torch.cuda.graph(graph):
                captured = fused(static)
        static.copy_(images)
        graph.replay()
    blocks = {"resnet18": ("basic_block_fprop", 2 + 2), "resnet50": ("bottleneck_fprop", 3 + 4 + 6)}
    kernel, count = blocks[name]
    assert (ops["fusedres_cuda::stem_fprop"], ops[f"fusedres_cuda::{kernel}"]) == (1, count)
    assert ops["fusedres_cuda::head_fprop"] == 1
    assert (first.cpu().double() - reference).abs().max() <= 2 * theirs + 1e-3 * reference.abs().max()
    assert torch.equal(captured, first)

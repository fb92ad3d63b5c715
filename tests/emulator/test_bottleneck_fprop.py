"""The bottleneck kernel, emulated: an eval block in one launch, as accurate as eager, whatever the thread order."""

from __future__ import annotations

import math

import emulated
import pytest
import torch
from geometries import assert_close_as_eager, batch, eager_block, folded
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16)
#: (C, planes, stride): the bottlenecks of ResNet-50, -101 and -152 as far as a block's shared memory goes.
RESNET = [(64, 64, 1), (256, 64, 1), (256, 128, 2), (512, 128, 1), (512, 256, 2), (1024, 256, 1), (2048, 512, 1)]
#: Ragged channels, (C, planes, stride); C == 4 * planes has an identity shortcut.
RAGGED = [(8, 8, 1), (32, 8, 1), (24, 40, 1), (72, 24, 2), (160, 40, 1), (136, 72, 2), (352, 88, 1)]
#: (N, H, W): one pixel, one tile, ragged tiles.
SIZES = [(1, 1, 1), (2, 8, 16), (2, 9, 17), (1, 5, 30), (3, 13, 7)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(block: nn.Module, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, dict[str, int]]:
    convs, w_shortcut = folded(block, x.dtype)
    stride = block.conv2.stride[0]
    return emulated.bottleneck_fprop(x, convs, w_shortcut, stride, *args, **kwargs)  # type: ignore[arg-type]


@dtypes
@pytest.mark.parametrize("geometry", RESNET, ids=str)
def test_every_bottleneck_of_resnet_is_as_accurate_as_eager(geometry: tuple[int, int, int], dtype: torch.dtype) -> None:
    c, planes, stride = geometry
    block = eager_block("bottleneck", c, planes, stride, dtype)
    x = batch(1, c, 7, 7, dtype=dtype)
    y, totals = run(block, x, emulated.checked(dtype))
    assert totals["launches"] == 1
    assert_close_as_eager(y, block, x)


@dtypes
@pytest.mark.parametrize("geometry", RAGGED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ragged_sizes_are_as_accurate_as_eager(
    size: tuple[int, int, int], geometry: tuple[int, int, int], dtype: torch.dtype
) -> None:
    c, planes, stride = geometry
    block = eager_block("bottleneck", c, planes, stride, dtype)
    x = batch(size[0], c, *size[1:], dtype=dtype)
    assert_close_as_eager(run(block, x, emulated.checked(dtype))[0], block, x)


@pytest.mark.parametrize(("c", "stride", "tile"), [(64, 1, 0), (64, 1, 1), (32, 2, 0), (32, 2, 1)])
def test_the_order_of_threads_and_the_tile_change_no_bit(c: int, stride: int, tile: int) -> None:
    block = eager_block("bottleneck", c, 16, stride, torch.float16)
    x = batch(2, c, 11, 19, dtype=torch.float16)
    expected, _ = run(block, x)
    for order in emulated.ORDERS:
        y, _ = run(block, x, emulated.options(*order), tile)
        assert torch.equal(y, expected), order


def test_it_takes_the_tile_that_fits() -> None:
    block = eager_block("bottleneck", 64, 16, 1, torch.float16)
    x = batch(1, 64, 8, 16, dtype=torch.float16)
    blocks = {limit: run(block, x, shared_limit=limit << 10)[1]["mma"] for limit in (227, 99)}
    assert blocks[99] > blocks[227], "two small tiles repeat more halo than a large one"
    with pytest.raises(ValueError, match="no tile fits"):
        run(block, x, shared_limit=48 << 10)


def test_an_empty_batch_launches_nothing() -> None:
    block = eager_block("bottleneck", 32, 8, 1, torch.float16)
    y, totals = run(block, batch(0, 32, 5, 5, dtype=torch.float16))
    assert y.shape == (0, 32, 5, 5)
    assert totals["launches"] == 0


def test_nan_spreads_as_in_eager() -> None:
    block = eager_block("bottleneck", 16, 4 * 2, 1, torch.float16)
    x = batch(1, 16, 9, 9, dtype=torch.float16)
    x[0, 0, 4, 4] = math.nan
    y, _ = run(block, x)
    assert_close_as_eager(y, block, x)
    assert y.isnan().sum() == 9 * 32


def test_inputs_are_left_alone() -> None:
    block = eager_block("bottleneck", 32, 8, 1, torch.float16)
    x = batch(1, 32, 5, 5, dtype=torch.float16)
    before = x.clone()
    run(block, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("c", "planes", "stride"), [(256, 64, 1), (256, 64, 2), (64, 64, 1)])
def test_shared_memory_is_read_without_bank_conflicts(c: int, planes: int, stride: int) -> None:
    block = eager_block("bottleneck", c, planes, stride, torch.float16)
    _, totals = run(block, batch(1, c, 10, 18, dtype=torch.float16))
    assert totals["ldmatrix"] > 0
    assert totals["bank_conflicts"] == 0


def test_the_halo_repeats_the_arithmetic_that_the_tile_says() -> None:
    """Of a 16x16 map in 8x16 tiles: conv1 on 192 rows a tile for 128 pixels, conv2 and conv3 on 128."""
    block = eager_block("bottleneck", 256, 64, 1, torch.float16)
    _, totals = run(block, batch(1, 256, 16, 16, dtype=torch.float16))
    conv1, conv2, conv3 = (m // 16 * 64 // 8 * k // 16 for m, k in ((192, 256), (128, 9 * 64), (128, 4 * 64)))
    assert totals["mma"] == 2 * (conv1 + conv2 + conv3)

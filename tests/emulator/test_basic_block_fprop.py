"""The basic-block kernel, emulated: an eval block in one launch, as accurate as eager, whatever the thread order."""

from __future__ import annotations

import emulated
import pytest
import torch
from geometries import assert_close_as_eager, batch, eager_block, folded
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16)
#: (C, planes, stride): the blocks of ResNet-18 and -34.
RESNET = [(64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
RAGGED = [(8, 8, 1), (24, 40, 1), (72, 72, 1), (40, 136, 2)]
#: (N, H, W): one pixel, one tile, ragged tiles.
SIZES = [(1, 1, 1), (2, 8, 16), (2, 9, 17), (1, 5, 30), (3, 13, 7)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(block: nn.Module, x: Tensor, *args: object) -> tuple[Tensor, dict[str, int]]:
    convs, w_shortcut = folded(block, x.dtype)
    return emulated.basic_block_fprop(x, convs, w_shortcut, block.conv1.stride[0], *args)  # type: ignore[arg-type]


@dtypes
@pytest.mark.parametrize("geometry", RESNET, ids=str)
def test_every_basic_block_of_resnet_is_as_accurate_as_eager(
    geometry: tuple[int, int, int], dtype: torch.dtype
) -> None:
    c, planes, stride = geometry
    block, x = eager_block("basic", c, planes, stride, dtype), batch(1, c, 7, 7, dtype=dtype)
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
    block, x = eager_block("basic", c, planes, stride, dtype), batch(size[0], c, *size[1:], dtype=dtype)
    assert_close_as_eager(run(block, x, emulated.checked(dtype))[0], block, x)


@pytest.mark.parametrize(("c", "planes", "stride", "tile"), [(72, 72, 1, 0), (72, 72, 1, 1), (24, 40, 2, 0)])
def test_the_order_of_threads_and_the_tile_change_no_bit(c: int, planes: int, stride: int, tile: int) -> None:
    block, x = eager_block("basic", c, planes, stride, torch.float16), batch(2, c, 11, 19, dtype=torch.float16)
    expected, _ = run(block, x)
    for order in emulated.ORDERS:
        assert torch.equal(run(block, x, emulated.options(*order), tile)[0], expected), order

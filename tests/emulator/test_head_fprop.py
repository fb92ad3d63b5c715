"""The head's kernel, emulated: average pool and fully connected layer in one launch, as accurate as eager."""

from __future__ import annotations

import math

import emulated
import pytest
import torch
from geometries import assert_close_as_eager, batch, eager_head
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16)
#: (N, C, H, W, F): one of everything; a ResNet-18's; CIFAR's; ragged in every dimension, in several tiles of images.
SIZES = [
    (1, 8, 1, 1, 1),
    (1, 512, 7, 7, 1000),
    (2, 64, 8, 8, 10),
    (3, 72, 3, 5, 17),
    (17, 264, 2, 3, 33),
    (70, 136, 9, 8, 37),
]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(head: nn.Sequential, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, dict[str, int]]:
    return emulated.head_fprop(x, head[2].weight, head[2].bias, *args, **kwargs)  # type: ignore[arg-type]


@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_head_is_as_accurate_as_eager(size: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    n, c, h, w, f = size
    head, x = eager_head(c, f, dtype), batch(n, c, h, w, dtype=dtype)
    y, totals = run(head, x, emulated.checked(dtype))
    assert totals["launches"] == 1
    assert_close_as_eager(y, head, x)


def test_a_layer_without_bias_is_served() -> None:
    head, x = eager_head(24, 9, torch.float16, bias=False), batch(2, 24, 3, 3, dtype=torch.float16)
    assert_close_as_eager(run(head, x)[0], head, x)


def test_maps_with_a_large_mean_are_pooled_in_float32() -> None:
    """49 values near 2000 add up to what float16 does not hold."""
    head = eager_head(16, 8, torch.float16)
    x = (2000 + batch(2, 16, 7, 7)).half().contiguous(memory_format=torch.channels_last)
    y, _ = run(head, x)
    assert y.isfinite().all()
    assert_close_as_eager(y, head, x)


@pytest.mark.parametrize("size", [(17, 264, 2, 3, 33), (70, 136, 3, 3, 37)], ids=str)
def test_the_order_of_threads_and_blocks_changes_no_bit(size: tuple[int, int, int, int, int]) -> None:
    n, c, h, w, f = size
    head, x = eager_head(c, f, torch.float16), batch(n, c, h, w, dtype=torch.float16)
    expected, _ = run(head, x)
    for order in emulated.ORDERS:
        assert torch.equal(run(head, x, emulated.options(*order))[0], expected), order


def test_shares_of_several_images_have_the_same_sums() -> None:
    """Of 1030 images of one share of channels each, a block pools two."""
    head, x = eager_head(8, 3, torch.float16), batch(1030, 8, 2, 2, dtype=torch.float16)
    y, totals = run(head, x)
    assert_close_as_eager(y, head, x)
    pool_blocks, tiles = 1030 // 2, math.ceil(1030 / 64)
    assert totals["mma"] == tiles * 8 * 4 * 4  # warps, and products of 16 x 8 x 16 in each one's 64 x 32 outputs
    steps = 1  # of 128 channels
    assert totals["barriers"] == pool_blocks * (1 + 2 + 1) + tiles * (1 + 1 + steps + 1 + 1)


def test_nan_reaches_the_outputs_of_its_image_alone() -> None:
    head, x = eager_head(40, 9, torch.float16), batch(3, 40, 3, 3, dtype=torch.float16)
    x[1, 7, 2, 0] = math.nan
    y, _ = run(head, x)
    assert_close_as_eager(y, head, x)
    assert y.isnan().any(dim=1).tolist() == [False, True, False]


def test_an_empty_batch_launches_nothing() -> None:
    y, totals = run(eager_head(16, 5, torch.float16), batch(0, 16, 3, 3, dtype=torch.float16))
    assert y.shape == (0, 5)
    assert totals["launches"] == 0


def test_shared_memory_is_read_without_bank_conflicts() -> None:
    _, totals = run(eager_head(256, 32, torch.float16), batch(16, 256, 2, 2, dtype=torch.float16))
    assert totals["ldmatrix"] > 0
    assert totals["bank_conflicts"] == 0


@pytest.mark.parametrize("n", [1, 64])
def test_weights_are_read_once_a_tile_of_images(n: int) -> None:
    c, f = 256, 48
    _, totals = run(eager_head(c, f, torch.float16), batch(n, c, 1, 1, dtype=torch.float16))
    image_tiles, output_tiles = math.ceil(n / 16), f // 16
    assert totals["async_bytes"] == 2 * c * (image_tiles * f + output_tiles * n)


def test_a_block_that_waits_for_means_that_nobody_makes_is_reported() -> None:
    head, x = eager_head(16, 5, torch.float16), batch(1, 16, 2, 2, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="waits for one that never comes"):
        run(head, x, emulated.options(patience=0.2), tickets=1)

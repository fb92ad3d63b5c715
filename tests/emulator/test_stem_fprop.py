"""The stem kernel, emulated: conv, BN, ReLU and max pool in one launch, as accurate as eager."""

from __future__ import annotations

import math

import emulated
import pytest
import torch
from geometries import assert_close_as_eager, batch, eager_stem, fold
from torch import Tensor, nn

from fusedres.engines.block_kernels import stem_weight

DTYPES = (torch.float16, torch.bfloat16)
#: (N, C, K, H, W): ResNet's in small; one pixel; ragged in every dimension.
SIZES = [(1, 3, 64, 32, 64), (2, 3, 64, 33, 37), (1, 1, 8, 1, 1), (2, 4, 72, 19, 45), (1, 2, 136, 50, 9)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(stem: nn.Sequential, x: Tensor, *args: object) -> tuple[Tensor, dict[str, int]]:
    with torch.no_grad():
        w, bias = fold(stem[0], stem[1], x.dtype)
    return emulated.stem_fprop(x, stem_weight(w), bias, *args)  # type: ignore[arg-type]


@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_stem_is_as_accurate_as_eager(size: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    n, c, k, h, w = size
    stem, x = eager_stem(c, k, dtype), batch(n, c, h, w, dtype=dtype)
    y, totals = run(stem, x)
    assert totals["launches"] == 1
    assert_close_as_eager(y, stem, x)


def test_the_order_of_threads_changes_no_bit() -> None:
    stem, x = eager_stem(3, 72, torch.float16), batch(1, 3, 21, 40, dtype=torch.float16)
    expected, _ = run(stem, x)
    for order in emulated.ORDERS:
        assert torch.equal(run(stem, x, emulated.options(*order))[0], expected), order


def test_nan_spreads_as_in_eager() -> None:
    stem, x = eager_stem(3, 8, torch.float16), batch(1, 3, 30, 30, dtype=torch.float16)
    x[0, 1, 14, 15] = math.nan
    assert_close_as_eager(run(stem, x)[0], stem, x)

"""The stem kernels, emulated: conv, BN, ReLU, for ImageNet the max pool too, in one launch, as accurate as eager."""

from __future__ import annotations

import math
from collections.abc import Callable

import emulated
import pytest
import torch
from geometries import assert_close_as_eager, batch, eager_cifar_stem, eager_stem, fold
from torch import Tensor, nn

from fusedres.engines.block_kernels import stem_weight

DTYPES = (torch.float16, torch.bfloat16)
#: (N, C, K, H, W): ResNet's in small; one pixel; ragged in every dimension.
SIZES = [(1, 3, 64, 32, 64), (2, 3, 64, 33, 37), (1, 1, 8, 1, 1), (2, 4, 72, 19, 45), (1, 2, 136, 50, 9)]
#: Those of CIFAR's networks; one pixel; ragged, by the narrow tile and by the wide one.
CIFAR_SIZES = [(2, 3, 16, 32, 32), (1, 1, 8, 1, 1), (3, 3, 24, 9, 33), (2, 4, 72, 17, 45), (1, 3, 136, 3, 70)]

Make = Callable[[int, int, torch.dtype], nn.Sequential]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
stems = pytest.mark.parametrize("make", [eager_stem, eager_cifar_stem])


def name_of(parameter: object) -> str:
    return getattr(parameter, "__name__", str(parameter))


def run(stem: nn.Sequential, x: Tensor, *args: object) -> tuple[Tensor, dict[str, int]]:
    with torch.no_grad():
        w, bias = fold(stem[0], stem[1], x.dtype)
    return emulated.stem_fprop(x, stem_weight(w), bias, *args)  # type: ignore[arg-type]


@dtypes
@pytest.mark.parametrize(
    ("make", "size"),
    [*((eager_stem, size) for size in SIZES), *((eager_cifar_stem, size) for size in CIFAR_SIZES)],
    ids=name_of,
)
def test_the_stem_is_as_accurate_as_eager(make: Make, size: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    n, c, k, h, w = size
    stem, x = make(c, k, dtype), batch(n, c, h, w, dtype=dtype)
    y, totals = run(stem, x, emulated.checked(dtype))
    assert totals["launches"] == 1
    assert_close_as_eager(y, stem, x)


@pytest.mark.parametrize(("make", "k"), [(eager_stem, 72), (eager_cifar_stem, 24), (eager_cifar_stem, 72)])
def test_the_order_of_threads_changes_no_bit(make: Make, k: int) -> None:
    stem, x = make(3, k, torch.float16), batch(1, 3, 21, 40, dtype=torch.float16)
    expected, _ = run(stem, x)
    for order in emulated.ORDERS:
        assert torch.equal(run(stem, x, emulated.options(*order))[0], expected), order


@stems
@pytest.mark.parametrize("column", [15, 16])
def test_nan_spreads_as_in_eager(make: Make, column: int) -> None:
    stem, x = make(3, 8, torch.float16), batch(1, 3, 30, 30, dtype=torch.float16)
    x[0, 1, 14, column] = math.nan
    assert_close_as_eager(run(stem, x)[0], stem, x)


@stems
def test_an_empty_batch_launches_nothing(make: Make) -> None:
    stem, x = make(3, 16, torch.float16), batch(0, 3, 8, 8, dtype=torch.float16)
    y, totals = run(stem, x)
    assert y.shape == stem(x).shape
    assert totals["launches"] == 0


@pytest.mark.parametrize("k", [16, 64])
def test_a_patch_in_two_copies_is_read_without_bank_conflicts(k: int) -> None:
    _, totals = run(eager_cifar_stem(3, k, torch.float16), batch(1, 3, 16, 32, dtype=torch.float16))
    assert totals["ldmatrix"] > 0
    assert totals["bank_conflicts"] == 0


@pytest.mark.parametrize("k", [16, 64])
def test_gemm_k_of_a_cifar_stem_is_48(k: int) -> None:
    """Of a 16x32 map: 16 * 32 pixels by k channels by 3 filter rows of 16, in products of 16 x 8 x 16."""
    _, totals = run(eager_cifar_stem(3, k, torch.float16), batch(1, 3, 16, 32, dtype=torch.float16))
    assert totals["mma"] == 16 * 32 // 16 * (k // 8) * 3

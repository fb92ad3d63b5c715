"""The native ``max_abs``: NaN and infinity are never lost, whatever the dtype and wherever they stand."""

from __future__ import annotations

import math

import pytest
import torch

from fusedres import native

pytestmark = pytest.mark.skipif(native.missing is not None, reason=f"needs the native library: {native.missing}")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def activation(dtype: torch.dtype, n: int, c: int, h: int, w: int) -> torch.Tensor:
    return torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 37, 5, 7), (3, 64, 9, 9), (1, 3, 200, 200), (0, 8, 4, 4)])
def test_largest_magnitude_is_exact(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = activation(dtype, *shape)
    expected = x.abs().max().item() if x.numel() else 0.0
    assert torch.ops.fusedres_cpu.max_abs(x).item() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_a_single_special_value_is_seen_at_every_place(dtype: torch.dtype, special: float) -> None:
    for place in range(2 * 5 * 3 * 3):
        x = activation(dtype, 2, 5, 3, 3)
        x.permute(0, 2, 3, 1).view(-1)[place] = special
        seen = torch.ops.fusedres_cpu.max_abs(x).item()
        assert math.isnan(seen) if math.isnan(special) else seen == math.inf


def test_nan_outranks_infinity() -> None:
    x = activation(torch.float32, 1, 4, 3, 3)
    x[0, 0, 0, 0], x[0, 3, 2, 2] = math.nan, math.inf
    assert math.isnan(torch.ops.fusedres_cpu.max_abs(x).item())


def test_other_layouts_are_refused() -> None:
    with pytest.raises(RuntimeError, match="channels_last"):
        torch.ops.fusedres_cpu.max_abs(torch.randn(2, 3, 4, 5))

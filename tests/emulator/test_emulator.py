"""The emulator itself: tensor-core operands as the PTX manual lays them out, conversions, barriers, copies, misuse."""

from __future__ import annotations

import math
import struct
from typing import Any

import emulated
import pytest
import torch
from build_emulator import load
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
ORDERS = emulated.ORDERS

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def probes() -> Any:
    return load("emulator_probes")


def bits(values: Tensor) -> list[int]:
    """The 16-bit patterns of ``values``, in order."""
    return [pattern & 0xFFFF for pattern in values.flatten().view(torch.int16).tolist()]


def pairs(patterns: list[int]) -> list[int]:
    """Two 16-bit patterns a register, the first in the lower half."""
    return [low | high << 16 for low, high in zip(patterns[::2], patterns[1::2], strict=True)]


@dtypes
def test_mma_reads_and_writes_the_fragments_of_the_ptx_manual(probes: Any, dtype: torch.dtype) -> None:
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", written out lane by lane."""
    a, b, c = (torch.randn(shape) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = a.to(dtype), b.to(dtype)
    a_registers, b_registers, c_registers = [], [], []
    for lane in range(32):
        group_id, thread_in_group = lane >> 2, lane % 4
        elements = []
        for i in range(8):
            row = group_id if 0 <= i < 2 or 4 <= i < 6 else group_id + 8
            col = thread_in_group * 2 + (i & 1) if i < 4 else thread_in_group * 2 + (i & 1) + 8
            elements.append(a[row, col])
        a_registers += pairs(bits(torch.stack(elements)))
        elements = []
        for i in range(4):
            row = thread_in_group * 2 + (i & 1) if i < 2 else thread_in_group * 2 + (i & 1) + 8
            elements.append(b[row, group_id])
        b_registers += pairs(bits(torch.stack(elements)))
        for i in range(4):
            row = group_id if i < 2 else group_id + 8
            c_registers.append(c[row, thread_in_group * 2 + (i & 1)].item())
    d_registers = probes.mma(emulated.name_of(dtype), a_registers, b_registers, c_registers)
    d = torch.empty(16, 8)
    for lane in range(32):
        group_id, thread_in_group = lane >> 2, lane % 4
        for i in range(4):
            d[group_id if i < 2 else group_id + 8, thread_in_group * 2 + (i & 1)] = d_registers[lane * 4 + i]
    torch.testing.assert_close(d.double(), a.double() @ b.double() + c.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_hands_out_rows_as_the_ptx_manual_says(probes: Any, transposed: bool) -> None:
    """PTX ISA, "ldmatrix": thread t of each matrix gets row t / 4, elements 2 * (t % 4) and the next."""
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    registers = probes.ldmatrix(pairs(bits(matrices)), transposed)
    for lane in range(32):
        for j in range(4):
            matrix = matrices[j].t() if transposed else matrices[j]
            first = matrix[lane // 4, lane % 4 * 2].item()
            second = matrix[lane // 4, lane % 4 * 2 + 1].item()
            assert registers[lane * 4 + j] == first | second << 16


@dtypes
def test_conversions_are_torchs(probes: Any, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).roll(2**15)
    values = patterns.view(dtype).float()
    ours = torch.tensor(probes.all_values(emulated.name_of(dtype)))
    torch.testing.assert_close(ours, values, rtol=0, atol=0, equal_nan=True)
    # Every value, the middle between it and the next, and a little off that.
    middles = torch.cat([values, (values + values.roll(1)) / 2]).nan_to_num(0, 1e5, -1e5)
    samples = torch.cat([middles, middles * (1 + 2**-20), middles * 1e-3, torch.tensor([math.nan, math.inf, 3e38])])
    rounded = torch.tensor(probes.round_to(emulated.name_of(dtype), samples.tolist())).to(torch.int16).view(dtype)
    torch.testing.assert_close(rounded, samples.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_a_dropped_barrier_shows_under_some_order(probes: Any) -> None:
    expected = [float((i + 1) % 64) for i in range(64)]
    assert all(probes.neighbours(True, *order) == expected for order in ORDERS)
    assert any(probes.neighbours(False, *order) != expected for order in ORDERS)


def test_a_dropped_wait_reads_poison(probes: Any) -> None:
    assert probes.async_sum(True) == sum(range(16))
    assert math.isnan(probes.async_sum(False))


def test_a_wait_brings_its_groups_and_no_later_one(probes: Any) -> None:
    arrived, underway, filled = probes.async_groups()
    assert (arrived, filled) == (1.0, 0.0)
    assert math.isnan(underway)


def test_shared_memory_starts_as_poison(probes: Any) -> None:
    assert all(map(math.isnan, probes.untouched()))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_warps_exchange(probes: Any, order: tuple[str, int]) -> None:
    odd = struct.unpack("i", struct.pack("I", 0xAAAAAAAA))[0]
    for lane, seen in enumerate(probes.shuffles(*order)):
        half = lane ^ 1 if lane < 16 else -(lane ^ 1)
        assert seen == [lane ^ 5, lane + 3 if lane < 29 else lane, 7, odd, 496, half]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_named_barriers_and_atomics(probes: Any, order: tuple[str, int]) -> None:
    assert probes.produce_consume(*order) == [r * 32 + 31 - lane for r in range(10) for lane in range(32)]
    assert probes.atomics(9, *order) == [2016] * 9 + [1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent_shuffle", "deadlock: .*shfl.xor"),
        ("different_collectives", "lanes of one warp are at"),
        ("unfinished_copy", "ends before its cp.async"),
        ("misaligned_copy", "misaligned"),
    ],
)
def test_misuse_is_an_error(probes: Any, fault: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(probes, fault)()


def test_more_shared_memory_than_launched_with_is_an_error(probes: Any) -> None:
    probes.take_shared(1024, 1024)
    with pytest.raises(RuntimeError, match="more shared memory"):
        probes.take_shared(1025, 1024)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("count", [1, 31, 1000])
def test_moments_merge_without_cancellation(probes: Any, mean: float, count: int) -> None:
    values = (mean + torch.randn(count)).float()
    got_count, got_mean, m2 = probes.warp_moments(values.tolist())
    assert got_count == count
    assert got_mean == pytest.approx(values.double().mean().item(), rel=1e-6, abs=1e-6)
    assert m2 == pytest.approx((values.double() - values.double().mean()).square().sum().item(), rel=1e-2, abs=1e-5)

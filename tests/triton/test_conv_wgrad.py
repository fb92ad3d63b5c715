"""``conv_wgrad`` as a Triton kernel, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from conv_cases import NETWORK_PROBLEMS, assert_matches, label, results, wgrad_args
from op_samples import Operands, samples_of

from fusedres.kernels.conv_wgrad import chunk_of, conv_wgrad
from fusedres.problem import ConvProblem

RAGGED = ConvProblem(3, 18, 6, 7, 21, 3, 3, padding=(1, 1))
LONG = ConvProblem(5, 6, 21, 13, 7, 1, 1)  # several chunks, the last one ragged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # float16 in the tests below
def test_samples_match_float64(dtype: torch.dtype, device: str) -> None:
    for sample in samples_of("conv_wgrad", dtype):
        if dtype == torch.float32 or sample.label.endswith("everything"):
            assert_matches(conv_wgrad, sample.args, device, sample.label)


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("form", ["plain", "constant", "batch"])
def test_every_prologue_of_both_operands(form: str, prologue: bool, device: str) -> None:
    for problem in (RAGGED, LONG):
        assert_matches(conv_wgrad, wgrad_args(Operands(torch.float16), problem, form, prologue), device)


@pytest.mark.parametrize("problem", NETWORK_PROBLEMS, ids=label)
def test_problems_of_the_networks(problem: ConvProblem, device: str) -> None:
    assert_matches(conv_wgrad, wgrad_args(Operands(torch.float16), problem, "batch", True), device)


def test_chunks_follow_from_shapes_and_cover_all_pixels() -> None:
    for pixels, tiles, programs, block in ((1365, 1, 8, 32), (7, 3, 8, 32), (802816, 9, 528, 64)):
        chunk = chunk_of(pixels, tiles, programs, block)
        assert chunk % block == 0
        assert -(-pixels // chunk) * tiles <= max(programs, tiles)


def test_empty_batch_gives_zeros(device: str) -> None:
    problem = ConvProblem(0, 4, 5, 5, 6, 3, 3)
    (dw,) = results(conv_wgrad, wgrad_args(Operands(torch.float32), problem, "plain", True), device)
    assert torch.equal(dw, torch.zeros(6, 4, 3, 3))


def test_two_runs_are_equal_bit_for_bit(device: str) -> None:
    args = wgrad_args(Operands(torch.float16), LONG, "batch", True)
    assert torch.equal(results(conv_wgrad, args, device)[0], results(conv_wgrad, args, device)[0])


def test_offsets_of_64_bits_give_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = wgrad_args(Operands(torch.float32), RAGGED, "batch", True)
    narrow = results(conv_wgrad, args, device)
    monkeypatch.setattr("fusedres.kernels.conv_wgrad.is_wide", lambda *tensors: True)
    assert torch.equal(narrow[0], results(conv_wgrad, args, device)[0])

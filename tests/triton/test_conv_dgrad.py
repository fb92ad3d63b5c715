"""``conv_dgrad`` as a Triton kernel, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from conv_cases import NETWORK_PROBLEMS, assert_matches, dgrad_args, label, results
from op_samples import Operands, samples_of

from fusedres.kernels.conv_dgrad import conv_dgrad, conv_dgrad_drelu_dbn
from fusedres.problem import ConvProblem

RAGGED = ConvProblem(3, 18, 6, 7, 21, 3, 3, stride=(2, 2), padding=(1, 1))

#: Strides and dilations with and without a common divisor, and classes of pixels that no tap reaches.
GEOMETRIES = [
    ConvProblem(2, 5, 11, 10, 6, 3, 3, stride=(3, 2), padding=(1, 0), dilation=(2, 2)),
    ConvProblem(2, 5, 13, 9, 6, 3, 2, stride=(2, 4), padding=(2, 1), dilation=(2, 6)),
    ConvProblem(1, 3, 9, 12, 4, 2, 5, stride=(4, 3), padding=(0, 4), dilation=(3, 1)),
    ConvProblem(2, 4, 7, 8, 5, 1, 1, stride=(3, 3), padding=(1, 2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_match_float64(dtype: torch.dtype, device: str) -> None:
    for sample in samples_of("conv_dgrad", dtype):
        if dtype == torch.float32 or sample.label.endswith("everything"):
            assert_matches(conv_dgrad, sample.args, device, sample.label)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_borders_of_blocks_match_float64(dtype: torch.dtype, device: str) -> None:
    for sample in samples_of("conv_dgrad_drelu_dbn", dtype):
        if dtype == torch.float32 or sample.label.endswith("both"):
            assert_matches(conv_dgrad_drelu_dbn, sample.args, device, sample.label)


@pytest.mark.parametrize("epilogue", ["nothing", "residual", "strided", "drelu"])
@pytest.mark.parametrize("form", ["plain", "constant", "batch"])
def test_every_prologue_with_every_epilogue(form: str, epilogue: str, device: str) -> None:
    assert_matches(conv_dgrad, dgrad_args(Operands(torch.float16), RAGGED, form, epilogue), device)


@pytest.mark.parametrize("problem", GEOMETRIES, ids=label)
def test_parity_classes_of_any_stride_and_dilation(problem: ConvProblem, device: str) -> None:
    assert_matches(conv_dgrad, dgrad_args(Operands(torch.float32), problem, "batch", "drelu"), device)


@pytest.mark.parametrize("problem", NETWORK_PROBLEMS, ids=label)
def test_problems_of_the_networks(problem: ConvProblem, device: str) -> None:
    assert_matches(conv_dgrad, dgrad_args(Operands(torch.float16), problem, "batch", "drelu"), device)


def test_nan_in_z_stays_out_where_statistics_are_constants(device: str) -> None:
    args = list(dgrad_args(Operands(torch.float32), RAGGED, "constant", "nothing"))
    args[1][:] = torch.nan
    args[3][:] = torch.nan
    assert not results(conv_dgrad, args, device)[0].isnan().any()


def test_empty_batch(device: str) -> None:
    problem = ConvProblem(0, 4, 5, 5, 6, 3, 3)
    args = dgrad_args(Operands(torch.float32), problem, "plain", "drelu")
    dx, sums = results(conv_dgrad, args, device)
    assert dx.shape == (0, 4, 5, 5)
    assert torch.equal(sums, torch.zeros(2, 4))


def test_nan_in_the_output_of_a_block_lets_its_gradient_through(device: str) -> None:
    args = list(next(s for s in samples_of("conv_dgrad_drelu_dbn") if s.label.endswith("bare")).args)
    args[12] = torch.full_like(args[12], torch.nan)
    g, sums, _ = results(conv_dgrad_drelu_dbn, args, device)
    dx, _ = results(conv_dgrad, [*args[:12], (1, 1), None, None], device)
    assert torch.equal(g, dx)
    torch.testing.assert_close(sums[0], dx.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_two_runs_are_equal_bit_for_bit(device: str) -> None:
    args = dgrad_args(Operands(torch.float16), RAGGED, "batch", "drelu")
    for first, second in zip(results(conv_dgrad, args, device), results(conv_dgrad, args, device), strict=True):
        assert torch.equal(first, second)


def test_offsets_of_64_bits_give_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = dgrad_args(Operands(torch.float32), RAGGED, "batch", "strided")
    narrow = results(conv_dgrad, args, device)
    monkeypatch.setattr("fusedres.kernels.conv_dgrad.is_wide", lambda *tensors: True)
    assert torch.equal(narrow[0], results(conv_dgrad, args, device)[0])

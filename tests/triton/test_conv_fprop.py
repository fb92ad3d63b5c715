"""``conv_fprop`` as a Triton kernel, against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from conv_cases import NETWORK_PROBLEMS, assert_matches, fprop_args, label, results
from op_samples import Operands, samples_of

from fusedres.kernels.conv_fprop import conv_fprop
from fusedres.problem import ConvProblem

RAGGED = ConvProblem(3, 18, 6, 7, 21, 3, 3, padding=(1, 1))
FORMS = ["+".join(form) for form in itertools.product(("", "prologue"), ("", "bias", "bias+residual"), ("", "relu"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # float16 in the tests below
def test_samples_match_float64(dtype: torch.dtype, device: str) -> None:
    for sample in samples_of("conv_fprop", dtype):
        if dtype == torch.float32 or sample.label.endswith("everything"):
            assert_matches(conv_fprop, sample.args, device, sample.label)


@pytest.mark.parametrize("form", FORMS)
def test_every_prologue_with_every_epilogue(form: str, device: str) -> None:
    for genstats in ("", "+genstats"):
        assert_matches(conv_fprop, fprop_args(Operands(torch.float16), RAGGED, form + genstats), device)


@pytest.mark.parametrize("problem", NETWORK_PROBLEMS, ids=label)
def test_problems_of_the_networks(problem: ConvProblem, device: str) -> None:
    assert_matches(conv_fprop, fprop_args(Operands(torch.float16), problem, "prologue+genstats"), device)


def test_padding_is_zero_after_the_prologue(device: str) -> None:
    x, bn = torch.zeros(1, 16, 3, 3, device=device), torch.zeros(4, 16, device=device)
    bn[3] = 1.0  # relu(shift) = 1 wherever there is a pixel
    w = torch.ones(16, 16, 3, 3, device=device)
    y, _ = conv_fprop(x, w, None, None, bn, (1, 1), (1, 1), (1, 1), 1, False, False)
    assert y[0, 0].tolist() == [[64.0, 96.0, 64.0], [96.0, 144.0, 96.0], [64.0, 96.0, 64.0]]


def test_statistics_survive_a_large_mean(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (1000 + 0.1 * torch.randn(8, 8, 17, 16, generator=generator)).contiguous(memory_format=torch.channels_last)
    w = torch.eye(8).view(8, 8, 1, 1)
    args = (x, w, None, None, None, (1, 1), (0, 0), (1, 1), 1, False, True)
    y, stats = results(conv_fprop, args, device)
    rows = y.double().permute(1, 0, 2, 3).flatten(1)
    variance = stats[2].double() / stats[0].double()
    torch.testing.assert_close(variance, rows.var(1, unbiased=False), rtol=1e-2, atol=0)
    torch.testing.assert_close(stats[1].double(), rows.mean(1), rtol=1e-6, atol=0)


def test_nan_survives_the_relus(device: str) -> None:
    args = list(fprop_args(Operands(torch.float32), RAGGED, "prologue+bias+relu"))
    args[0][1, 3, 2, 2] = torch.nan
    assert_matches(conv_fprop, tuple(args), device)


@pytest.mark.parametrize("genstats", [False, True])
def test_empty_batch(genstats: bool, device: str) -> None:
    problem = ConvProblem(0, 4, 5, 5, 6, 3, 3)
    args = fprop_args(Operands(torch.float32), problem, "prologue" + "+genstats" * genstats)
    y, stats = results(conv_fprop, args, device)
    assert y.shape == (0, 6, 3, 3)
    assert torch.equal(stats, torch.zeros(3, 6) if genstats else torch.zeros(0))


def test_two_runs_are_equal_bit_for_bit(device: str) -> None:
    args = fprop_args(Operands(torch.float16), RAGGED, "prologue+genstats")
    for first, second in zip(results(conv_fprop, args, device), results(conv_fprop, args, device), strict=True):
        assert torch.equal(first, second)


def test_offsets_of_64_bits_give_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = fprop_args(Operands(torch.float32), RAGGED, "prologue+bias+residual+genstats")
    narrow = results(conv_fprop, args, device)
    monkeypatch.setattr("fusedres.kernels.conv_fprop.is_wide", lambda *tensors: True)
    for first, second in zip(narrow, results(conv_fprop, args, device), strict=True):
        assert torch.equal(first, second)


def test_an_expanded_bias_is_one_value(device: str) -> None:
    args = list(fprop_args(Operands(torch.float32), RAGGED, "bias"))
    args[2] = args[2][:1].expand(RAGGED.K)
    assert_matches(conv_fprop, tuple(args), device)


def test_operands_of_other_shapes_are_refused(device: str) -> None:
    args = list(fprop_args(Operands(torch.float32), RAGGED, "bias"))
    args[2] = args[2][:-1]
    with pytest.raises(RuntimeError, match="bias must be"):
        results(conv_fprop, args, device)

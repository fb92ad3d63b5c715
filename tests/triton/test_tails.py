"""The tails, BN's vectors and the pool as Triton kernels, against the reference in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from op_samples import Operands, Sample, samples_of
from oracles import rms
from torch import Tensor

import fusedres
from fusedres import reference
from fusedres.engines.triton import TRITON
from fusedres.layout import BN

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = ("scale_shift_add_relu", "drelu_dbn", "dbn", "bn_finalize", "bn_constants", "bn_fold", "bn_relu_maxpool")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def results_of(function: object, args: tuple, device: str = "cpu") -> list[Tensor]:
    """Every tensor that ``function(*args)`` returns or changes, on the CPU."""
    args = tuple(copy.deepcopy(a).to(device) if isinstance(a, Tensor) else a for a in args)
    results = function(*args)
    results = [results] if isinstance(results, Tensor) else list(results)
    if function.__name__ == "bn_finalize":
        results += [a for a in args[3:6] if a is not None]
    return [t.cpu() for t in results]


def exact_args(sample: Sample) -> tuple:
    """The operands in float64; integers (taps, counters) and dtypes that an op is told stay what they are."""
    wider = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in sample.args]
    return tuple(torch.float64 if a == torch.float32 else a for a in wider)


def assert_close(sample: Sample, device: str) -> None:
    """The error against float64 is at most twice that of the reference in the sample's dtype, or a few roundings.

    A sum over many tiles is rounded once a tile and once a merge, ATen's fewer times, depending on its threads.
    """
    ours = results_of(getattr(TRITON, sample.op), sample.args, device)
    theirs = results_of(getattr(reference, sample.op), sample.args)
    exact = results_of(getattr(reference, sample.op), exact_args(sample))
    for i, (a, b, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        where = f"{sample.op} {sample.label}, result {i}"
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        if not a.is_floating_point():
            assert torch.equal(a, b), where
            continue
        error, allowed = (
            rms(a.double() - truth),
            2 * rms(b.double() - truth) + 4 * torch.finfo(a.dtype).eps * rms(truth),
        )
        assert error <= allowed, f"{where}: error {error:.3g}, allowed {allowed:.3g}"


@dtypes
@pytest.mark.parametrize("op", OPS)
def test_error_is_at_most_twice_the_references(op: str, dtype: torch.dtype, device: str) -> None:
    for sample in samples_of(op, dtype):
        assert_close(sample, device)


@dtypes
def test_pool_backward_agrees_where_float64_pools_the_same_pixels(dtype: torch.dtype, device: str) -> None:
    """dz in float64 from the taps that the dtype itself chose, so that rounding moves no gradient to another pixel."""
    for sample in samples_of("bn_relu_maxpool_backward", dtype):
        assert_close(sample, device)


@dtypes
@pytest.mark.parametrize("channels", [130, 24, 3])
def test_many_tiles_and_programs_of_ragged_size(channels: int, dtype: torch.dtype, device: str) -> None:
    make = Operands(dtype)
    size = (3, channels, 13, 11)
    dy, y, z, other = (make.activation(*size) for _ in range(4))
    bn, other_bn, sums = make.bn(channels), make.bn(channels), make.sums(channels)
    assert_close(Sample("scale_shift_add_relu", "large", (z, bn, other, other_bn, True)), device)
    assert_close(Sample("drelu_dbn", "large", (dy, y, z, bn, other, other_bn)), device)
    assert_close(Sample("dbn", "large", (dy, z, bn, sums, 1 / 429)), device)


def test_nan_passes_every_relu(device: str) -> None:
    make = Operands(torch.float32)
    z, dy, bn = make.activation(2, 5, 3, 3), make.activation(2, 5, 3, 3), make.bn(5)
    z[0, 1, 2, 0] = y = float("nan")
    y = results_of(TRITON.scale_shift_add_relu, (z, bn, None, None, True), device)[0]
    assert torch.equal(y.isnan(), z.isnan())
    g, sums, _ = results_of(TRITON.drelu_dbn, (dy, y, z, bn, None, None), device)
    assert g[0, 1, 2, 0] == dy[0, 1, 2, 0]
    assert sums.isnan().nonzero().tolist() == [[1, 1]]  # dgamma of that channel alone


def test_constant_statistics_keep_nan_in_z_and_sums_out_of_dz(device: str) -> None:
    make = Operands(torch.float32)
    g, z, bn, sums = make.activation(2, 5, 3, 3), make.activation(2, 5, 3, 3), make.bn(5), make.sums(5)
    z[0, 1, 2, 0] = sums[0, 3] = float("nan")
    (dz,) = results_of(TRITON.dbn, (g, z, bn, sums, 0.0), device)
    torch.testing.assert_close(dz, g * BN.rows(bn).scale.view(1, -1, 1, 1))


def test_sums_around_a_large_mean_do_not_cancel(device: str) -> None:
    make = Operands(torch.float32)
    z = 1000 + 0.1 * make.activation(3, 4, 16, 16)
    dy, bn = make.activation(*z.shape), make.bn(4)
    bn[0], bn[1] = z.mean((0, 2, 3)), 10
    dgamma = results_of(TRITON.drelu_dbn, (dy, None, z, bn, None, None), device)[1][1]
    terms = 10 * dy.double() * (z.double() - bn[0].double().view(1, -1, 1, 1))
    bound = 4 * torch.finfo(torch.float32).eps * terms.abs().sum((0, 2, 3))
    assert ((dgamma - terms.sum((0, 2, 3))).abs() <= bound).all()


def test_first_of_equal_values_wins_and_nan_wins_over_any(device: str) -> None:
    z = torch.ones(1, 1, 4, 4).contiguous(memory_format=torch.channels_last)
    bn = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    z[0, 0, 3, 3], z[0, 0, 2, 0] = float("nan"), float("inf")
    y, tap = results_of(TRITON.bn_relu_maxpool, (z, bn, 2, 2, 0), device)
    assert tap.flatten().tolist() == [0, 0, 0, 3]
    assert y.flatten().tolist()[:3] == [1, 1, float("inf")]
    assert y[0, 0, 1, 1].isnan()


def test_empty_batches_give_empty_activations_and_zero_sums(device: str) -> None:
    make = Operands(torch.float16)
    nothing, bn, sums = make.activation(0, 5, 4, 4), make.bn(5), make.sums(5)
    assert results_of(TRITON.scale_shift_add_relu, (nothing, bn, None, None, True), device)[0].shape == nothing.shape
    assert results_of(TRITON.dbn, (nothing, nothing, bn, sums, 0.5), device)[0].shape == nothing.shape
    g, found, other = results_of(TRITON.drelu_dbn, (nothing, nothing, nothing, bn, nothing, bn), device)
    assert g.shape == nothing.shape
    assert torch.equal(found, torch.zeros(2, 5))
    assert torch.equal(other, torch.zeros(2, 5))
    y, tap = results_of(TRITON.bn_relu_maxpool, (nothing, bn, 3, 2, 1), device)
    assert y.shape == tap.shape == (0, 5, 2, 2)
    dz, found = results_of(TRITON.bn_relu_maxpool_backward, (y, tap, nothing, bn, 3, 2, 1, 0.5), device)
    assert dz.shape == nothing.shape
    assert torch.equal(found, torch.zeros(2, 5))


def test_operands_of_another_memory_format_are_read_right(device: str) -> None:
    make = Operands(torch.float32)
    z, r, bn = make.normal(2, 5, 4, 3).float(), make.normal(2, 10, 4, 3).float()[:, ::2], make.bn(5)
    (y,) = results_of(TRITON.scale_shift_add_relu, (z, bn, r, None, True), device)
    torch.testing.assert_close(y, reference.scale_shift_add_relu(z, bn, r, None, True))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_two_runs_are_equal_bit_for_bit(device: str) -> None:
    for op in (*OPS, "bn_relu_maxpool_backward"):
        sample = samples_of(op)[-1]
        first, second = (results_of(getattr(TRITON, op), sample.args, device) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), op


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_running_statistics_of_any_dtype_move_as_batch_norms(
    dtype: torch.dtype, momentum: float | None, device: str
) -> None:
    channels = 1030  # more than one block of the kernel
    bn = torch.nn.BatchNorm2d(channels, momentum=momentum).to(dtype)
    x = torch.randn(4, channels, 2, 3, dtype=torch.float64)
    stats = reference.channel_stats(x).float().to(device)
    running = [t.clone().to(device) for t in (bn.running_mean, bn.running_var, bn.num_batches_tracked)]
    for step in (1, 2):
        TRITON.bn_finalize(stats, None, None, *running, momentum, bn.eps)
        bn(x.to(dtype))
        assert running[2].item() == step
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(running[0].cpu(), bn.running_mean, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(running[1].cpu(), bn.running_var, rtol=4 * eps, atol=4 * eps)


def test_running_statistics_with_gaps_move_in_place(device: str) -> None:
    stats = reference.channel_stats(torch.randn(4, 3, 2, 3)).to(device)
    buffer = torch.zeros(3, 2, device=device)
    TRITON.bn_finalize(stats, None, None, buffer[:, 0], None, None, 1.0, 1e-5)
    torch.testing.assert_close(buffer[:, 0], stats[1])
    assert not buffer[:, 1].any()


@dtypes
@pytest.mark.parametrize("op", [*OPS, "bn_relu_maxpool_backward"])
def test_op_passes_opcheck(op: str, dtype: torch.dtype, device: str) -> None:
    sample = samples_of(op, dtype)[0]
    args = tuple(copy.deepcopy(a).to(device) if isinstance(a, Tensor) else a for a in sample.args)
    with fusedres.engine("triton"):
        torch.library.opcheck(getattr(torch.ops.fusedres, op).default, args)

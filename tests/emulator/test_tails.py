"""The tails and statistics of a training step, emulated: as accurate as eager, whatever the thread order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import emulated
import emulated_tails as kernels
import pytest
import torch
from build_emulator import load
from op_samples import Operands
from oracles import assert_accurate
from torch import Tensor

from fusedres import reference
from fusedres.layout import BN

CL = torch.channels_last
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: (N, C, H, W): every width of access, ragged in rows and channels; one pixel; many parts of a sum, more than a warp
#: adds up at once, and as many as there may be.
SIZES = [
    (3, 1, 13, 11),
    (3, 3, 13, 11),
    (2, 7, 9, 5),
    (5, 8, 3, 31),
    (3, 24, 13, 11),
    (2, 64, 11, 7),
    (2, 100, 5, 3),
    (1, 2048, 1, 3),
    (1, 24, 1, 1),
]
LARGE = [(2, 8, 200, 201), (1, 2048, 37, 35)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)

Arguments = tuple[Any, ...]


def as_double(arguments: Arguments) -> Arguments:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def rows(outputs: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Named results; the rows of statistics and sums, which differ in magnitude, apart."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {f"{i}.{j}": row for i, out in enumerate(outputs) for j, row in enumerate(out if out.dim() == 2 else [out])}


def moments(stats: Tensor) -> tuple[Tensor, Tensor]:
    """(count (K,), mean and standard deviation (2*K,)): the two share a scale, which a mean near 0 alone has not."""
    count, mean, m2 = stats
    return count, torch.cat([mean, (m2 / count).sqrt()])


def check(
    op: str, arguments: Callable[[int], Arguments], view: Callable[..., Any] = lambda outputs: outputs, draws: int = 3
) -> None:
    """The kernel ``op`` changes no argument and obeys the rule of accuracy with the reference as eager."""
    results = []
    for seed in range(draws):
        given = arguments(seed)
        before = [a.clone() for a in given if isinstance(a, Tensor)]
        outputs = getattr(kernels, op)(*given)
        assert all(map(torch.equal, before, (a for a in given if isinstance(a, Tensor))))
        theirs, exact = (getattr(reference, op)(*a) for a in (given, as_double(given)))
        results.append(tuple(rows(view(r)) for r in (outputs, theirs, exact)))
    assert_accurate(*results)


@dtypes
@sizes
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("shortcut", ["none", "identity", "projection"])
def test_scale_shift_add_relu(size: tuple[int, ...], shortcut: str, relu: bool, dtype: torch.dtype) -> None:
    def arguments(seed: int) -> Arguments:
        make = Operands(dtype, seed)
        residual = None if shortcut == "none" else make.activation(*size)
        residual_bn = make.bn(size[1]) if shortcut == "projection" else None
        return make.activation(*size), make.bn(size[1]), residual, residual_bn, relu

    check("scale_shift_add_relu", arguments)


@dtypes
@sizes
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("branches", ["none", "main", "side", "both"])
def test_drelu_dbn(size: tuple[int, ...], branches: str, relu: bool, dtype: torch.dtype) -> None:
    check("drelu_dbn", lambda seed: backward_tail(Operands(dtype, seed), size, branches, relu))


def backward_tail(make: Operands, size: tuple[int, ...], branches: str = "both", relu: bool = True) -> Arguments:
    dy, y = make.activation(*size), make.activation(*size) if relu else None
    main = (make.activation(*size), make.bn(size[1])) if branches in ("main", "both") else (None, None)
    side = (make.activation(*size), make.bn(size[1])) if branches in ("side", "both") else (None, None)
    return dy, y, *main, *side


@dtypes
@sizes
@pytest.mark.parametrize("statistics", ["batch", "constant", "constant alone"])
def test_dbn(size: tuple[int, ...], statistics: str, dtype: torch.dtype) -> None:
    def arguments(seed: int) -> Arguments:
        make = Operands(dtype, seed)
        g, z, bn, sums = make.activation(*size), make.activation(*size), make.bn(size[1]), make.sums(size[1])
        if statistics == "constant alone":
            return g, None, bn, None, 0.0
        return g, z, bn, sums, 1 / 143 if statistics == "batch" else 0.0

    check("dbn", arguments)


@dtypes
@sizes
def test_channel_stats(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check("channel_stats", lambda seed: (Operands(dtype, seed).activation(*size),), moments)


@dtypes
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_sums_of_many_parts(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check("drelu_dbn", lambda seed: backward_tail(Operands(dtype, seed), size), draws=1)
    check("channel_stats", lambda seed: (Operands(dtype, seed).activation(*size),), moments, draws=1)


@pytest.mark.parametrize("channels", [8, 2048, 1 << 20])
def test_a_sum_has_a_bounded_number_of_parts(channels: int) -> None:
    """Partials stay small for any number of pixels, also for more than 32 bits count."""
    parts = load("fusedres_emulator").reduction_parts("float16", 1 << 40, channels)
    assert all(1 <= count * channels <= max(512 * 256, channels) for count in parts)


@dtypes
@pytest.mark.parametrize("channels", [3, 64])
def test_a_large_mean_leaves_the_variance_right(channels: int, dtype: torch.dtype) -> None:
    z = (1000 + 0.1 * Operands(dtype).normal(4, channels, 29, 31)).to(dtype).contiguous(memory_format=CL)
    exact, (_, mean, m2) = reference.channel_stats(z.double()), kernels.channel_stats(z)
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(m2.double(), exact[2], rtol=1e-2, atol=0)


def test_an_outlier_in_the_first_pixel_leaves_the_variance_right() -> None:
    z = Operands(torch.float32).activation(2, 5, 29, 31)
    z[0, :, 0, 0] = 1e4
    (_, exact), (_, ours) = moments(reference.channel_stats(z.double())), moments(kernels.channel_stats(z))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * exact[5:].min().item())  # of a deviation


def test_sums_around_a_large_mean_do_not_cancel() -> None:
    make = Operands(torch.float32)
    z = (1000 + 0.1 * make.activation(3, 4, 16, 16)).contiguous(memory_format=CL)
    dy, bn = make.activation(*z.shape), make.bn(4)
    bn[0], bn[1] = z.mean((0, 2, 3)), 10
    dgamma = kernels.drelu_dbn(dy, None, z, bn, None, None)[1][1]
    terms = 10 * dy.double() * (z.double() - bn[0].double().view(1, -1, 1, 1))
    bound = 4 * torch.finfo(torch.float32).eps * terms.abs().sum((0, 2, 3))
    assert ((dgamma - terms.sum((0, 2, 3))).abs() <= bound).all()


def calls(size: tuple[int, ...], dtype: torch.dtype) -> list[tuple[str, Arguments]]:
    """A call of every kernel with everything it takes."""
    make, c = Operands(dtype), size[1]
    z, r = make.activation(*size), make.activation(*size)
    bn, residual_bn, sums = make.bn(c), make.bn(c), make.sums(c)
    stats = reference.channel_stats(z.float())
    vectors = [make.vector(c) for _ in range(2)]
    return [
        ("scale_shift_add_relu", (z, bn, r, residual_bn, True)),
        ("drelu_dbn", backward_tail(make, size)),
        ("dbn", (z, r, bn, sums, 1 / 7)),
        ("channel_stats", (z,)),
        ("bn_finalize", (stats, *vectors, None, None, None, 0.1, 1e-5)),
    ]


@pytest.mark.parametrize("size", [(3, 3, 13, 11), (3, 24, 13, 11), (1, 2048, 5, 4)], ids=str)
def test_the_order_of_threads_changes_no_bit_and_a_second_run_neither(size: tuple[int, ...]) -> None:
    for op, arguments in calls(size, torch.float16):
        expected = rows(getattr(kernels, op)(*arguments))
        for order in (("forward", 0), *emulated.ORDERS):
            found = rows(getattr(kernels, op)(*arguments, run=emulated.options(*order)))
            assert all(map(torch.equal, found.values(), expected.values())), (op, order)


@pytest.mark.parametrize("op", ["scale_shift_add_relu", "dbn", "bn_finalize"])
@pytest.mark.parametrize("n", [0, 2])
def test_a_pass_is_a_launch(op: str, n: int) -> None:
    (arguments,) = (a for name, a in calls((n, 24, 3, 5), torch.float16) if name == op)
    totals: kernels.Totals = []
    getattr(kernels, op)(*arguments, totals=totals)
    assert totals[0]["launches"] == (1 if n or op == "bn_finalize" else 0)


@pytest.mark.parametrize("op", ["drelu_dbn", "channel_stats"])
@pytest.mark.parametrize("n", [0, 2])
def test_a_sum_is_a_launch_and_a_small_one_that_merges(op: str, n: int) -> None:
    (arguments,) = (a for name, a in calls((n, 24, 3, 5), torch.float16) if name == op)
    totals: kernels.Totals = []
    getattr(kernels, op)(*arguments, totals=totals)
    assert totals[0]["launches"] == (2 if n else 1)


@dtypes
@pytest.mark.parametrize("channels", [5, 8])
def test_an_empty_batch_gives_empty_activations_and_zero_sums(channels: int, dtype: torch.dtype) -> None:
    make = Operands(dtype)
    nothing, bn, sums = make.activation(0, channels, 4, 4), make.bn(channels), make.sums(channels)
    assert kernels.scale_shift_add_relu(nothing, bn, nothing, bn, True).shape == nothing.shape
    assert kernels.dbn(nothing, nothing, bn, sums, 0.5).shape == nothing.shape
    g, found, other = kernels.drelu_dbn(nothing, nothing, nothing, bn, nothing, bn)
    assert g.shape == nothing.shape
    for t in (found, other):
        assert torch.equal(t, torch.zeros(2, channels))
    assert torch.equal(kernels.channel_stats(nothing), torch.zeros(3, channels))


def test_no_channels_launch_nothing_but_the_counter() -> None:
    totals: kernels.Totals = []
    nothing, bn = torch.empty(2, 0, 3, 3).contiguous(memory_format=CL), torch.empty(4, 0)
    kernels.drelu_dbn(nothing, None, nothing, bn, None, None, totals=totals)
    kernels.channel_stats(nothing, totals=totals)
    kernels.scale_shift_add_relu(nothing, bn, None, None, True, totals=totals)
    assert [of_launch["launches"] for of_launch in totals] == [0, 0, 0]
    counter = torch.tensor(3)
    kernels.bn_finalize(torch.empty(3, 0), None, None, None, None, counter, 0.1, 1e-5)
    assert counter == 4


@pytest.mark.parametrize("channels", [5, 8])
def test_nan_passes_every_relu(channels: int) -> None:
    make, size = Operands(torch.float32), (2, channels, 3, 3)
    z, dy, bn = make.activation(*size), make.activation(*size), make.bn(channels)
    z[0, 1, 2, 0] = math.nan
    y = kernels.scale_shift_add_relu(z, bn, None, None, True)
    assert torch.equal(y.isnan(), z.isnan())
    g, sums, _ = kernels.drelu_dbn(dy, y, z, bn, None, None)
    assert g[0, 1, 2, 0] == dy[0, 1, 2, 0]
    assert sums.isnan().nonzero().tolist() == [[1, 1]]  # dgamma of that channel alone
    assert kernels.channel_stats(z).isnan().nonzero().tolist() == [[1, 1], [2, 1]]


def test_constant_statistics_keep_nan_in_z_and_sums_out_of_dz() -> None:
    make = Operands(torch.float32)
    g, z, bn, sums = make.activation(2, 5, 3, 3), make.activation(2, 5, 3, 3), make.bn(5), make.sums(5)
    z[0, 1, 2, 0] = sums[0, 3] = math.nan
    torch.testing.assert_close(kernels.dbn(g, z, bn, sums, 0.0), g * BN.rows(bn).scale.view(1, -1, 1, 1))


@dtypes
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
def test_bn_finalize(affine: bool, momentum: float | None, dtype: torch.dtype) -> None:
    """Two steps of more channels than the block has threads."""
    k = 1030
    make = Operands(dtype)
    stats = reference.channel_stats(make.normal(4, k, 2, 3)).float()
    weight, bias = (make.vector(k), make.vector(k)) if affine else (None, None)
    start = make.vector(k), make.vector(k).abs()

    def steps(function: Callable[..., Tensor], wider: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        mean, var, counter = *(wider(t.clone()) for t in start), torch.tensor(3)
        affine = [None if t is None else wider(t) for t in (weight, bias)]
        bn = [function(wider(stats), *affine, mean, var, counter, momentum, 1e-5) for _ in range(2)][-1]
        return {"counter": counter, "mean": mean, "var": var, **rows(bn)}

    kernel, eager = (steps(f, lambda t: t) for f in (kernels.bn_finalize, reference.bn_finalize))
    exact = steps(reference.bn_finalize, lambda t: t.double())
    assert kernel["counter"] == 5
    assert_accurate((kernel, eager, exact))


def test_without_running_statistics_or_counter_nothing_else_moves() -> None:
    stats = reference.channel_stats(Operands(torch.float32).activation(4, 5, 2, 3))
    torch.testing.assert_close(
        kernels.bn_finalize(stats, None, None, None, None, None, None, 1e-5),
        reference.bn_finalize(stats, None, None, None, None, None, None, 1e-5),
    )
    mean = torch.zeros(5)
    kernels.bn_finalize(stats, None, None, mean, None, None, None, 1e-5)  # a mean over all batches, and nobody counts
    assert not mean.any()


def test_one_value_a_channel_has_no_unbiased_variance() -> None:
    stats, var = torch.tensor([[1.0], [2.0], [0.0]]), torch.ones(1)
    kernels.bn_finalize(stats, None, None, None, var, None, 0.1, 1e-5)
    assert var.isnan()

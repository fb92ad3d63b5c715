"""The native tails, statistics and pooling against the reference in float64, at most twice as far from it as eager."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_accurate, batch, needs_native
from torch import Tensor

from fusedres import ops, reference
from fusedres.layout import acc_dtype

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

kernels = torch.ops.fusedres_cpu
CL = torch.channels_last

#: Ragged channels and maps; no images; one pixel; several tiles, blocks and panels of channels.
SIZES = [(2, 1, 5, 7), (3, 3, 13, 11), (1, 8, 3, 1), (0, 8, 4, 4), (4, 6, 1, 1), (2, 17, 1, 9), (3, 64, 40, 41)]
SIZES += [(1, 130, 15, 13), (2, 1043, 13, 6)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: kernel_size, stride, padding
POOLS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)]

sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pools = pytest.mark.parametrize("pool", POOLS, ids=str)


def bn_like(x: Tensor, seed: int = 3) -> Tensor:
    """A ``bn`` (4, C) for ``x`` with every row its own: mean, a positive invstd, scale of both signs, shift."""
    bn = torch.randn(4, x.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bn[1] = bn[1].abs() + 0.5
    return bn.to(acc_dtype(x.dtype))


def as_double(arguments: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def results(outputs: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Named results; the rows of statistics and sums, which differ in magnitude, apart."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {f"{i}.{j}": row for i, out in enumerate(outputs) for j, row in enumerate(out if out.dim() == 2 else [out])}


def draw(kernel: Callable, oracle: Callable, arguments: tuple) -> tuple[dict[str, Tensor], ...]:
    """The results (of the kernel, of eager, in float64); the kernel changes no argument, its maps are channels_last."""
    before = [a.clone() for a in arguments if isinstance(a, Tensor)]
    ours = results(kernel(*arguments))
    assert all(map(torch.equal, before, (a for a in arguments if isinstance(a, Tensor))))
    assert all(out.is_contiguous(memory_format=CL) for out in ours.values() if out.dim() == 4)
    return ours, results(oracle(*arguments)), results(oracle(*as_double(arguments)))


def check(kernel: Callable, oracle: Callable, arguments: Callable[[int], tuple]) -> None:
    """``kernel`` obeys the rule of accuracy with ``oracle`` as eager on ``arguments(seed)``.

    Small problems are drawn several times, for a single sum of eager's may be exact by luck. In float64, where eager is
    the measure itself, both agree up to rounding.
    """
    small = arguments(0)[0].numel() < 1000
    draws = [draw(kernel, oracle, arguments(seed)) for seed in range(0, 70 if small else 10, 10)]
    if all(result.dtype == torch.float64 for result in draws[0][0].values()):
        torch.testing.assert_close(draws[0][0], draws[0][2], rtol=1e-13, atol=1e-13, equal_nan=True)
    else:
        assert_accurate(*draws)


def moments(stats: Tensor) -> tuple[Tensor, Tensor]:
    """(count (K,), mean and standard deviation (2*K,)): the two share a scale, which a mean near 0 alone has not."""
    count, mean, m2 = stats
    return count, torch.cat([mean, (m2 / count).sqrt()])


@sizes
@dtypes
def test_channel_stats(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check(
        lambda z: moments(kernels.channel_stats(z)),
        lambda z: moments(reference.channel_stats(z)),
        lambda seed: (batch(*size, dtype=dtype, seed=seed),),
    )


@pytest.mark.parametrize("outlier", [None, 1e4], ids=["large mean", "outlier"])
def test_variance_survives_a_large_mean(outlier: float | None) -> None:
    z = batch(4, 19, 61, 60) * 0.1 + 1000
    if outlier is not None:
        z[0, :, 0, 0] = outlier
    _, mean, m2 = kernels.channel_stats(z)
    rows = z.double().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2.double(), (rows - rows.mean(0)).square().sum(0), rtol=1e-2, atol=0)


def test_statistics_of_infinity_and_nan_stay_in_their_channels() -> None:
    z = batch(2, 20, 13, 11)
    expected = kernels.channel_stats(z)
    z[1, 3, 4, 4], z[0, 18, 2, 1], z[0, 5, 0, 0] = torch.inf, -torch.inf, torch.nan
    _, mean, m2 = kernels.channel_stats(z)
    assert (mean[3], mean[18]) == (torch.inf, -torch.inf)
    assert mean.isnan().nonzero().flatten().tolist() == [5]
    assert m2.isnan().nonzero().flatten().tolist() == [3, 5, 18]
    clean = [c for c in range(20) if c not in (3, 5, 18)]
    assert torch.equal(torch.stack([mean, m2])[:, clean], expected[1:, clean])


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bn_finalize(dtype: torch.dtype, momentum: float | None) -> None:
    def arguments(given: bool, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        rows = torch.randn(7, 21, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        stats = torch.stack([torch.full((21,), 12, dtype=dtype), rows[0], 5 * rows[1].square()])
        counter = torch.tensor(4)
        return stats, *((*rows[2:5], rows[5].square(), counter) if given else (None,) * 5)

    for given in (False, True):
        native, oracle = arguments(given, dtype), arguments(given, torch.float64)
        bn = kernels.bn_finalize(*native, momentum, 1e-3)
        torch.testing.assert_close(bn.double(), reference.bn_finalize(*oracle, momentum, 1e-3), rtol=2e-7, atol=1e-6)
        for actual, expected in zip(native[3:] if given else (), oracle[3:], strict=given):
            torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("place", [slice(None, None, 2), slice(None)], ids=["gaps", "float16"])
def test_statistics_that_the_native_op_does_not_take_move_all_the_same(place: slice) -> None:
    """Running statistics with gaps, or of another dtype than the batch's."""
    stats = torch.tensor([[4.0, 4.0], [1.0, 2.0], [3.0, 6.0]])
    mean = torch.zeros(4) if place.step else torch.zeros(2, dtype=torch.float16)
    ops.bn_finalize(stats, None, None, mean[place], None, None, 0.5, 1e-5)
    assert mean[place].tolist() == [0.5, 1.0]


@sizes
@dtypes
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("branch", ["none", "residual", "downsample"])
def test_scale_shift_add_relu(size: tuple[int, ...], dtype: torch.dtype, branch: str, relu: bool) -> None:
    def arguments(seed: int) -> tuple:
        z, r = (batch(*size, dtype=dtype, seed=seed + i) for i in range(2))
        residual = None if branch == "none" else r
        return z, bn_like(z), residual, bn_like(r, 4) if branch == "downsample" else None, relu

    check(kernels.scale_shift_add_relu, reference.scale_shift_add_relu, arguments)


@sizes
@dtypes
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("branches", ["none", "main", "downsample", "both"])
def test_drelu_dbn(size: tuple[int, ...], dtype: torch.dtype, branches: str, relu: bool) -> None:
    def arguments(seed: int) -> tuple:
        dy, z, r = (batch(*size, dtype=dtype, seed=seed + i) for i in range(3))
        main = (z, bn_like(z)) if branches in ("main", "both") else (None, None)
        downsample = (r, bn_like(r, 4)) if branches in ("downsample", "both") else (None, None)
        return dy, (z + r).clamp_min(0) if relu else None, *main, *downsample

    def in_place(dy: Tensor, y: Tensor, *branches: Tensor | None) -> tuple[Tensor, ...]:
        masked = dy.clone(memory_format=torch.preserve_format)
        return masked, *kernels.drelu_dbn_by_output_(masked, y, *branches)

    check(kernels.drelu_dbn, reference.drelu_dbn, arguments)
    if relu:
        check(in_place, reference.drelu_dbn, arguments)


@sizes
@dtypes
def test_drelu_dbn_in_place(size: tuple[int, ...], dtype: torch.dtype) -> None:
    def kernel(dx: Tensor, z: Tensor, bn: Tensor) -> tuple[Tensor, Tensor]:
        masked = dx.clone(memory_format=torch.preserve_format)
        return masked, kernels.drelu_dbn_(masked, z, bn)

    def arguments(seed: int) -> tuple:
        dx, z = (batch(*size, dtype=dtype, seed=seed + i) for i in range(2))
        return dx, z, bn_like(z)

    check(kernel, reference._drelu, arguments)


@sizes
@dtypes
def test_dbn(size: tuple[int, ...], dtype: torch.dtype) -> None:
    def arguments(seed: int) -> tuple:
        g, z = (batch(*size, dtype=dtype, seed=seed + i) for i in range(2))
        return g, z, bn_like(z), bn_like(z, 6)[:2].contiguous(), 1 / 37

    check(kernels.dbn, reference.dbn, arguments)


@sizes
@dtypes
@pools
def test_bn_relu_maxpool(size: tuple[int, ...], dtype: torch.dtype, pool: tuple[int, int, int]) -> None:
    kernel_size, _, padding = pool

    def arguments(seed: int) -> tuple:
        z = batch(*size, dtype=dtype, seed=seed)
        return z, bn_like(z), *pool

    def backward_arguments(seed: int) -> tuple:
        y, tap = kernels.bn_relu_maxpool(*arguments(seed))
        return batch(*y.shape, dtype=dtype, seed=seed + 1), tap, *arguments(seed), 1 / 41

    if min(size[2:]) + 2 * padding < kernel_size:
        with pytest.raises(RuntimeError, match="smaller than the kernel"):
            kernels.bn_relu_maxpool(*arguments(0))
        return
    check(lambda *a: kernels.bn_relu_maxpool(*a)[0], lambda *a: reference.bn_relu_maxpool(*a)[0], arguments)
    check(kernels.bn_relu_maxpool_backward, reference.bn_relu_maxpool_backward, backward_arguments)


@dtypes
@pools
def test_first_of_equal_taps_wins_and_padding_never(dtype: torch.dtype, pool: tuple[int, int, int]) -> None:
    z = torch.randint(-3, 3, (2, 19, 14, 13)).to(dtype).contiguous(memory_format=CL)
    bn = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=acc_dtype(dtype))[:, None].repeat(1, 19)
    for ours, theirs in zip(
        kernels.bn_relu_maxpool(z, bn, *pool), reference.bn_relu_maxpool(z, bn, *pool), strict=True
    ):
        assert torch.equal(ours, theirs)


@dtypes
def test_nan_infinity_and_signed_zero_are_those_of_eager(dtype: torch.dtype) -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.5, -1.5], dtype=dtype)
    z = values[torch.randint(0, 7, (2, 21, 9, 8))].contiguous(memory_format=CL)
    bn = torch.tensor([0.0, 1.0, 1.0, -0.0], dtype=acc_dtype(dtype))[:, None].repeat(1, 21)
    y = kernels.scale_shift_add_relu(z, bn, None, None, True)
    torch.testing.assert_close(y, F.relu(z), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(y) & ~y.isnan(), torch.signbit(F.relu(z)) & ~y.isnan())
    dy = batch(*z.shape, dtype=dtype)
    masked, _, _ = kernels.drelu_dbn(dy, z, None, None, None, None)
    assert torch.equal(masked, torch.ops.aten.threshold_backward(dy, z, 0))
    assert torch.equal(masked, kernels.drelu_dbn(dy, y, None, None, None, None)[0])
    kernels.drelu_dbn_(dy, z, bn)
    assert torch.equal(masked, dy)
    pooled, _ = kernels.bn_relu_maxpool(z, bn, 3, 2, 1)
    torch.testing.assert_close(pooled, F.max_pool2d(F.relu(z), 3, 2, 1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_dtypes_round_to_nearest_even(dtype: torch.dtype) -> None:
    """Every finite value of the dtype, and the points between: half-way ones go to even, overflow to infinity."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()].view(1, 2, -1, 1).contiguous(memory_format=CL)
    for factor in (1.0, 1 + 2**-9, 1 + 2**-12, 1.9999, 0.5, 0.75, 2.0**-9):
        bn = torch.tensor([0.0, 1.0, factor, 0.0])[:, None].repeat(1, 2)
        y = kernels.scale_shift_add_relu(every, bn, None, None, False)
        assert torch.equal(y, (every.float() * factor).to(dtype))


def everything(size: tuple[int, ...]) -> list[Tensor]:
    """Every result of every kernel on one problem."""
    dy, z, r = (batch(*size, seed=seed) for seed in (1, 2, 3))
    bn, y = bn_like(z), (z + r).clamp_min(0)
    pooled, tap = kernels.bn_relu_maxpool(z, bn, 3, 2, 1)
    return [
        kernels.channel_stats(z),
        kernels.scale_shift_add_relu(z, bn, r, bn, True),
        *kernels.drelu_dbn(dy, y, z, bn, r, bn),
        kernels.drelu_dbn_(dy.clone(memory_format=torch.preserve_format), z, bn),
        kernels.dbn(dy, z, bn, bn[:2].contiguous(), 0.01),
        pooled,
        tap,
        *kernels.bn_relu_maxpool_backward(pooled, tap, z, bn, 3, 2, 1, 0.01),
        kernels.fingerprint([dy, z, r]),
    ]


def test_results_are_bitwise_equal_for_any_number_of_threads() -> None:
    serial = everything((3, 70, 61, 60))
    torch.set_num_threads(2)
    for _ in range(2):
        assert all(map(torch.equal, serial, everything((3, 70, 61, 60))))


def test_strides_of_axes_of_one_mean_nothing() -> None:
    z = batch(5, 6, 1, 1)
    strange = z.as_strided(z.shape, (6, 1, 77, 3))
    assert torch.equal(kernels.channel_stats(z), kernels.channel_stats(strange))
    image = batch(1, 1, 4, 5)
    assert torch.equal(
        kernels.channel_stats(image), kernels.channel_stats(image.as_strided((1, 1, 4, 5), (9, 9, 5, 1)))
    )


def bad_calls() -> dict[str, tuple[Callable, ...]]:
    z = batch(2, 8, 5, 4)
    bn, sums = bn_like(z), bn_like(z)[:2].contiguous()
    pooled, tap = z[:, :, :3, :2].contiguous(memory_format=CL), torch.zeros(2, 8, 3, 2, dtype=torch.uint8)
    stats, finalize = bn[:3].contiguous(), kernels.bn_finalize
    tail, drelu = kernels.scale_shift_add_relu, kernels.drelu_dbn
    return {
        "3-D": (kernels.channel_stats, z[0]),
        "integers": (kernels.channel_stats, z.int()),
        "not channels_last": (kernels.channel_stats, z.contiguous()),
        "gaps": (kernels.channel_stats, z[:, :, ::2]),
        "short bn": (tail, z, bn[:, :7].contiguous(), None, None, True),
        "three rows": (tail, z, bn[:3].contiguous(), None, None, True),
        "strided bn": (tail, z, bn.t().contiguous().t(), None, None, True),
        "bn in float64": (tail, z, bn.double(), None, None, True),
        "bn in float16": (tail, z.half(), bn.half(), None, None, True),
        "other size": (tail, z, bn, z[:1], None, True),
        "other dtype": (tail, z, bn, z.double(), None, True),
        "residual not channels_last": (tail, z, bn, z.contiguous(), None, True),
        "residual_bn alone": (tail, z, bn, None, bn, True),
        "z without bn": (drelu, z, None, z, None, None, None),
        "y of another size": (drelu, z, z[:1], None, None, None, None),
        "residual_z without its bn": (drelu, z, None, None, None, z, None),
        "in place, other size": (kernels.drelu_dbn_, z, z[:1], bn),
        "in place, y of another size": (kernels.drelu_dbn_by_output_, z, z[:1], None, None, None, None),
        "in place, z without bn": (kernels.drelu_dbn_by_output_, z, z, z, None, None, None),
        "short sums": (kernels.dbn, z, z, bn, sums[:, :3].contiguous(), 0.1),
        "stats of one row": (finalize, sums[0], None, None, None, None, None, 0.1, 0.0),
        "stats in float16": (finalize, stats.half(), None, None, None, None, None, 0.1, 0.0),
        "short running_mean": (finalize, stats, None, None, bn[0, :7], None, None, 0.1, 0.0),
        "BN weight in float64": (finalize, stats, bn[0].double(), None, None, None, None, 0.1, 0.0),
        "running_var with gaps": (finalize, stats, None, None, None, bn.t().contiguous()[:, 0], None, 0.1, 0.0),
        "counter in float32": (finalize, stats, None, None, None, None, torch.tensor(0.0), 0.1, 0.0),
        "large kernel": (kernels.bn_relu_maxpool, z, bn, 17, 1, 1),
        "large padding": (kernels.bn_relu_maxpool, z, bn, 3, 1, 2),
        "no stride": (kernels.bn_relu_maxpool, z, bn, 3, 0, 1),
        "tap not channels_last": (kernels.bn_relu_maxpool_backward, pooled, tap, z, bn, 3, 2, 1, 0.1),
        "dy of another size": (kernels.bn_relu_maxpool_backward, z, z.byte(), z, bn, 3, 2, 1, 0.1),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_input_raises_before_memory_is_touched(case: str) -> None:
    kernel, *arguments = bad_calls()[case]
    with pytest.raises(RuntimeError, match=r"^fusedres: .*(expected|go together|without a residual)"):
        kernel(*arguments)


def held_to(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    """``python *command`` where the native library may use no more than ``isa``."""
    environment = {**os.environ, "FUSEDRES_CPU_ISA": isa}
    root = Path(__file__).parent.parent
    run = [sys.executable, *command]
    return subprocess.run(run, env=environment, cwd=root, capture_output=True, text=True, check=False)


PROBE = ("-c", "import torch, fusedres; torch.ops.fusedres_cpu.channel_stats(torch.zeros(1, 1, 1, 1))")
LACKS = "this CPU does not have it"


@pytest.mark.parametrize(("isa", "next_isa"), [("baseline", "avx2"), ("avx2", "avx512")])
def test_every_lower_instruction_set(isa: str, next_isa: str) -> None:
    """This file once more, in a process that is held to ``isa``."""
    if LACKS in held_to(next_isa, *PROBE).stderr:
        pytest.skip(f"needs a CPU with {next_isa}: {isa} is what all other tests run")
    run = held_to(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "not instruction_set")
    assert run.returncode == 0, run.stdout[-3000:]


def test_unknown_instruction_set_raises() -> None:
    assert "RuntimeError: FUSEDRES_CPU_ISA=sse9: expected baseline, avx2 or avx512" in held_to("sse9", *PROBE).stderr

"""The native weight gradients and second moments against float64, at most twice as far from it as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from op_samples import PROBLEMS, Operands
from oracles import needs_native, rms
from test_native import LACKS, PROBE, held_to
from torch import Tensor

from fusedres.layout import acc_dtype, per_channel, pixel_matrix
from fusedres.problem import ConvProblem

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

kernels = torch.ops.fusedres_cpu
CL = torch.channels_last

#: Ragged in every dimension, and beyond one tile, one block of pixels and one chunk of blocks in each.
CONVS = {name: problem for name, problem in PROBLEMS.items() if problem.groups == 1} | {
    "many pixels": ConvProblem(2, 12, 40, 37, 9, 3, 3, padding=(1, 1)),
    "many images": ConvProblem(150, 17, 3, 2, 18, 3, 3, padding=(1, 1)),
    "long rows": ConvProblem(2, 5, 3, 1000, 7, 1, 3, stride=(1, 2), padding=(0, 1)),
    "long columns": ConvProblem(1, 4, 700, 2, 9, 5, 1, stride=(3, 1), padding=(2, 0), dilation=(2, 1)),
    "many channels": ConvProblem(2, 130, 7, 9, 70, 3, 3, padding=(1, 1)),
    "many outputs": ConvProblem(2, 33, 6, 5, 150, 3, 3, stride=(2, 2), padding=(1, 1)),
    "pointwise": ConvProblem(3, 270, 9, 7, 300, 1, 1),
    "pointwise s3": ConvProblem(2, 300, 11, 13, 65, 1, 1, stride=(3, 3)),
    "stem": ConvProblem(2, 3, 30, 37, 64, 7, 7, stride=(2, 2), padding=(3, 3)),
    "5x3": ConvProblem(2, 20, 17, 14, 21, 5, 3, stride=(3, 1), padding=(4, 0), dilation=(2, 1)),
    "s2d3": ConvProblem(1, 9, 19, 20, 11, 3, 3, stride=(2, 2), padding=(3, 3), dilation=(3, 3)),
    "s2d4": ConvProblem(2, 6, 21, 19, 8, 3, 3, stride=(2, 2), padding=(1, 4), dilation=(4, 4)),
    "wide padding": ConvProblem(2, 5, 4, 3, 6, 3, 3, padding=(5, 7)),
    "one output": ConvProblem(5, 40, 6, 6, 1, 3, 3, padding=(1, 1)),
    "two outputs": ConvProblem(3, 64, 7, 7, 2, 1, 1),
}
#: Sizes (N, C, H, W) and strides of an input.
INPUTS = {
    "pixel": ((1, 1, 1, 1), (1, 1)),
    "ragged": ((2, 13, 7, 5), (1, 1)),
    "strided": ((3, 30, 15, 12), (2, 3)),
    "many pixels": ((2, 20, 40, 37), (1, 1)),
    "many channels": ((2, 300, 6, 5), (1, 1)),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

convs = pytest.mark.parametrize("problem", CONVS.values(), ids=CONVS)
inputs = pytest.mark.parametrize(("size", "stride"), INPUTS.values(), ids=INPUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
prologues = pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])


class WgradArgs(NamedTuple):
    """The arguments of ``conv_wgrad``."""

    g: Tensor
    z: Tensor | None
    bn: Tensor | None
    sums: Tensor | None
    inv_count: float
    x: Tensor
    in_bn: Tensor | None
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, problem: ConvProblem, dtype: torch.dtype = torch.float32, prologue: bool = False) -> WgradArgs:
        make = Operands(dtype)
        z, bn, sums, in_bn = None, None, None, None
        if prologue:
            z, bn, sums, in_bn = make.output(problem), make.bn(problem.K), make.sums(problem.K), make.bn(problem.C)
        kernel_size = (problem.R, problem.S)
        geometry = (kernel_size, problem.stride, problem.padding, problem.dilation)
        return cls(make.output(problem), z, bn, sums, 1 / problem.gemm_m, make.input(problem), in_bn, *geometry)

    def double(self) -> WgradArgs:
        return self._make(value.double() if isinstance(value, Tensor) else value for value in self)


def activated(x: Tensor, in_bn: Tensor | None) -> Tensor:
    """The prologue on the side of the input, in the dtype of ``x``."""
    return x if in_bn is None else (per_channel(in_bn[2]) * x + per_channel(in_bn[3])).relu().to(x.dtype)


def eager(args: WgradArgs) -> Tensor:
    """What ATen makes of both prologues, materialised in the dtype of ``x``."""
    dz = args.g
    if args.z is not None and args.bn is not None and args.sums is not None:
        mean, invstd, scale, _ = map(per_channel, args.bn)
        dbeta, dgamma = map(per_channel, args.sums * args.inv_count)
        dz = (scale * (args.g - dbeta - (args.z - mean) * invstd * dgamma)).to(args.g.dtype)
    w = args.x.new_empty(args.g.shape[1], args.x.shape[1], *args.kernel_size)
    geometry = (args.stride, args.padding, args.dilation, False, (0, 0), 1)
    mask = (False, True, False)
    return torch.ops.aten.convolution_backward(dz, activated(args.x, args.in_bn), w, None, *geometry, mask)[1]


def assert_as_accurate_as_eager(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """At most twice eager's error, as root mean square; the floor is one rounding of the result itself.

    In float64, where eager is the truth itself, both agree to rounding.
    """
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-13 * exact.abs().max().item())
        return
    error, eager_error = (rms(result.double() - exact) for result in (ours, theirs))
    floor = torch.finfo(ours.dtype).eps * rms(exact)
    assert error <= 2 * eager_error + floor


def eager_moments(x: Tensor, in_bn: Tensor | None, stride: tuple[int, int]) -> Tensor:
    rows = pixel_matrix(activated(x, in_bn), stride).to(acc_dtype(x.dtype))
    centred = rows - rows.mean(0)
    return torch.cat([centred.t() @ centred, rows.mean(0, keepdim=True)])


def eager_product(g: Tensor, x: Tensor, in_bn: Tensor | None, mean: Tensor, stride: tuple[int, int]) -> Tensor:
    rows = pixel_matrix(activated(x, in_bn), stride).to(mean.dtype)
    return pixel_matrix(g).to(mean.dtype).t() @ (rows - mean)


@convs
@prologues
@dtypes
def test_conv_wgrad_is_as_accurate_as_eager(problem: ConvProblem, prologue: bool, dtype: torch.dtype) -> None:
    args = WgradArgs.of(problem, dtype, prologue)
    dw = kernels.conv_wgrad(*args)
    assert dw.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate_as_eager(dw, eager(args), eager(args.double()))


@dtypes
@prologues
@pytest.mark.parametrize("size", [(2, 0, 3, 3), (0, 4, 3, 3), (2, 4, 0, 3), (0, 0, 0, 0)], ids=str)
def test_the_moments_of_nothing_are_zero(size: tuple[int, ...], prologue: bool, dtype: torch.dtype) -> None:
    make = Operands(dtype)
    moments = kernels.input_moments(make.activation(*size), make.bn(size[1]) if prologue else None, (2, 1))
    assert torch.equal(moments, torch.zeros(size[1] + 1, size[1], dtype=acc_dtype(dtype)))


@inputs
@prologues
@dtypes
def test_input_moments_are_as_accurate_as_eager(
    size: tuple[int, ...], stride: tuple[int, int], prologue: bool, dtype: torch.dtype
) -> None:
    make = Operands(dtype)
    x, in_bn = make.activation(*size), make.bn(size[1]) if prologue else None
    exact = eager_moments(x.double(), in_bn.double() if in_bn is not None else None, stride)
    ours, theirs = kernels.input_moments(x, in_bn, stride), eager_moments(x, in_bn, stride)
    for rows in (slice(None, -1), slice(-1, None)):
        assert_as_accurate_as_eager(ours[rows], theirs[rows], exact[rows])
    assert torch.equal(ours[:-1], ours[:-1].t())


@inputs
@prologues
@dtypes
def test_centered_wgrad_is_as_accurate_as_eager(
    size: tuple[int, ...], stride: tuple[int, int], prologue: bool, dtype: torch.dtype
) -> None:
    make = Operands(dtype)
    x, in_bn = make.activation(*size), make.bn(size[1]) if prologue else None
    mean = pixel_matrix(activated(x, in_bn), stride).to(make.acc).mean(0)
    g = make.activation(size[0], 21, *x[:, :, :: stride[0], :: stride[1]].shape[2:])
    exact = eager_product(g.double(), x.double(), in_bn.double() if in_bn is not None else None, mean.double(), stride)
    ours, theirs = kernels.centered_wgrad(g, x, in_bn, mean, stride), eager_product(g, x, in_bn, mean, stride)
    assert_as_accurate_as_eager(ours, theirs, exact)


def test_moments_of_a_large_mean_are_exact_to_the_rounding_of_the_input() -> None:
    x = 1000 + Operands(torch.float64).activation(4, 10, 30, 30)
    x = x.float().contiguous(memory_format=torch.channels_last)
    ours, exact = kernels.input_moments(x, None, (1, 1)), eager_moments(x.double(), None, (1, 1))
    assert_as_accurate_as_eager(ours[:-1], eager_moments(x, None, (1, 1))[:-1], exact[:-1])
    torch.testing.assert_close(ours[:-1].double(), exact[:-1], rtol=0, atol=1e-6 * exact[:-1].max().item())


@dtypes
def test_padding_is_zero_after_the_prologue(dtype: torch.dtype) -> None:
    """relu(0*x + 1) = 1 inside, so every tap counts the outputs that meet it there."""
    problem = ConvProblem(2, 9, 5, 6, 10, 3, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    args = WgradArgs.of(problem, dtype)
    constants = [torch.zeros(9), torch.ones(9), torch.zeros(9), torch.ones(9)]
    in_bn = torch.stack(constants).to(acc_dtype(dtype))
    args = args._replace(g=torch.ones_like(args.g), in_bn=in_bn)
    expected = eager(args._replace(x=torch.ones_like(args.x), in_bn=None).double())
    assert torch.equal(kernels.conv_wgrad(*args).double(), expected)


@pytest.mark.parametrize("channels", [2, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_contributes_not_even_zero_times_nan(value: float, channels: int) -> None:
    args = WgradArgs.of(ConvProblem(2, channels, 6, 7, 12, 3, 3, padding=(1, 1)), prologue=True)
    args.g[1, 4, 0, 0] = value  # its taps in the first row and column lie in the padding
    dw = kernels.conv_wgrad(*args)
    assert dw[torch.arange(12) != 4].isfinite().all()
    assert dw[4, :, 0, :].isfinite().all()
    assert dw[4, :, :, 0].isfinite().all()
    assert not dw[4, :, 1:, 1:].isfinite().any()


@pytest.mark.parametrize("channels", [3, 17])
def test_nan_reaches_its_channel_and_no_other(channels: int) -> None:
    args = WgradArgs.of(ConvProblem(2, channels, 6, 7, 12, 3, 3, padding=(1, 1)), prologue=True)
    args.x[0, 1, 3, 3] = float("nan")
    dw = kernels.conv_wgrad(*args)
    assert dw[:, 1].isnan().all()
    assert dw[:, torch.arange(channels) != 1].isfinite().all()

    moments = kernels.input_moments(args.x, args.in_bn, (1, 1))
    hit = torch.zeros(channels + 1, channels, dtype=torch.bool)
    hit[1] = hit[:, 1] = True
    assert torch.equal(moments.isnan(), hit)

    product = kernels.centered_wgrad(args.g, args.x, args.in_bn, torch.zeros(channels), (1, 1))
    assert torch.equal(product.isnan(), hit[0].expand(12, channels))


@pytest.mark.parametrize("name", ["many pixels", "many channels", "pointwise", "stem"])
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    args = WgradArgs.of(CONVS[name], prologue=True)
    results = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        results.append(
            (
                kernels.conv_wgrad(*args),
                kernels.input_moments(args.x, args.in_bn, args.stride),
                kernels.centered_wgrad(args.x, args.x, args.in_bn, torch.ones(args.x.shape[1]), (1, 1)),
            )
        )
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@prologues
def test_an_empty_batch_gives_zeros(prologue: bool) -> None:
    args = WgradArgs.of(ConvProblem(1, 5, 6, 7, 9, 3, 3, padding=(1, 1)), prologue=prologue)
    empty = args._replace(g=args.g[:0], x=args.x[:0], z=None if args.z is None else args.z[:0])
    assert torch.equal(kernels.conv_wgrad(*empty), torch.zeros(9, 5, 3, 3))
    assert torch.equal(kernels.input_moments(empty.x, empty.in_bn, (2, 1)), torch.zeros(6, 5))
    product = kernels.centered_wgrad(empty.g, empty.x, empty.in_bn, torch.ones(5), (1, 1))
    assert torch.equal(product, torch.zeros(9, 5))


def _changed(**changes: Callable[[WgradArgs], object]) -> WgradArgs:
    args = WgradArgs.of(ConvProblem(2, 5, 6, 7, 9, 3, 3, padding=(1, 1)), prologue=True)
    return args._replace(**{name: change(args) for name, change in changes.items()})


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (
            r"g is float32 \(2, 9, 5, 7\).*height and width \(6, 7\)",
            {"g": lambda a: a.g[:, :, 1:].contiguous(memory_format=CL)},
        ),
        (r"g is float64 .*expected one dtype", {"g": lambda a: a.g.double()}),
        ("g is .*dense channels_last", {"g": lambda a: a.g.contiguous()}),
        ("g is .*batch size", {"g": lambda a: a.g[:1]}),
        ("x is Long", {"x": lambda a: a.x.long()}),
        ("x is .*dense channels_last", {"x": lambda a: a.x[:, :, :, :6]}),
        ("x is .*dense channels_last", {"x": lambda a: a.x[0]}),
        ("z is .*sizes and dtype of g", {"z": lambda a: a.z[:1]}),
        ("z, bn and sums go together", {"z": lambda a: None}),
        ("z, bn and sums go together", {"sums": lambda a: None}),
        (r"bn is float32 \(3, 9\)", {"bn": lambda a: a.bn[:3]}),
        (r"sums is float64 \(2, 9\)", {"sums": lambda a: a.sums.double()}),
        (r"in_bn is float32 \(4, 4\)", {"in_bn": lambda a: a.in_bn[:, 1:]}),
        ("kernel_size is", {"kernel_size": lambda a: (3, 0)}),
        ("kernel_size is", {"kernel_size": lambda a: (3, 3, 3)}),
        ("size 7 does not fit kernel_size 10", {"kernel_size": lambda a: (3, 10)}),
        ("stride is", {"stride": lambda a: (0, 1)}),
        ("padding is", {"padding": lambda a: (1, -1)}),
        ("padding is", {"padding": lambda a: (1, 2**62)}),
        ("dilation is", {"dilation": lambda a: (1, 0)}),
    ],
)
def test_bad_input_raises_and_names_what_is_wrong(
    message: str, changes: dict[str, Callable[[WgradArgs], object]]
) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels.conv_wgrad(*_changed(**changes))


def test_bad_input_of_the_pointwise_ops_raises() -> None:
    make = Operands(torch.float32)
    x, g, mean = make.activation(2, 5, 6, 7), make.activation(2, 9, 6, 7), torch.zeros(5)
    with pytest.raises(RuntimeError, match="stride is"):
        kernels.input_moments(x, None, (0, 1))
    with pytest.raises(RuntimeError, match=r"in_bn is float32 \(4, 9\)"):
        kernels.input_moments(x, make.bn(9), (1, 1))
    with pytest.raises(RuntimeError, match=r"x is .*dense channels_last"):
        kernels.input_moments(x.contiguous(), None, (1, 1))
    with pytest.raises(RuntimeError, match="height and width"):
        kernels.centered_wgrad(g, x, None, mean, (2, 2))
    with pytest.raises(RuntimeError, match=r"mean is float64 \(5,\)"):
        kernels.centered_wgrad(g, x, None, mean.double(), (1, 1))
    with pytest.raises(RuntimeError, match=r"mean is float32 \(4,\)"):
        kernels.centered_wgrad(g, x, None, mean[1:], (1, 1))


@pytest.mark.parametrize(("isa", "next_isa"), [("baseline", "avx2"), ("avx2", "avx512")])
def test_every_lower_instruction_set_is_as_accurate_as_eager(isa: str, next_isa: str) -> None:
    if LACKS in held_to(next_isa, *PROBE).stderr:
        pytest.skip(f"needs a CPU with {next_isa}: {isa} is what all other tests run")
    select = ("-k", "accurate and float32 and not instruction_set")
    run = held_to(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, *select)
    assert run.returncode == 0, run.stdout[-3000:]

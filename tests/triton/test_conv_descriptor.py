"""Convolutions through tensor descriptors: the numbers of the convs by pointers, where descriptors can serve at all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conv_cases import assert_matches, dgrad_args, fprop_args, results, wgrad_args
from launches import launched
from op_samples import Operands

from fusedres.kernels import configs, conv_descriptor
from fusedres.kernels.configs import Tile, trying
from fusedres.kernels.conv_dgrad import conv_dgrad
from fusedres.kernels.conv_fprop import conv_fprop
from fusedres.kernels.conv_wgrad import conv_wgrad
from fusedres.problem import ConvProblem

#: Ragged in N, H, W, C and K; the others are each of another geometry.
RAGGED = ConvProblem(3, 24, 6, 7, 40, 3, 3, padding=(1, 1))
PROBLEMS = {
    "ragged": RAGGED,
    "1x1": ConvProblem(3, 40, 5, 7, 24, 1, 1),
    "1x1 padded": ConvProblem(2, 16, 4, 5, 40, 1, 1, padding=(1, 2)),
    "dilated": ConvProblem(2, 16, 9, 6, 16, 3, 3, padding=(2, 1), dilation=(2, 3)),
    "unpadded": ConvProblem(2, 8, 9, 5, 72, 3, 2),
    "padded beyond the kernel": ConvProblem(1, 16, 3, 4, 16, 3, 3, padding=(4, 3)),
    "images of one pixel": ConvProblem(70, 16, 1, 1, 32, 3, 3, padding=(1, 1)),
    "small images": ConvProblem(9, 32, 3, 3, 32, 3, 3, padding=(1, 1)),
    "5x1": ConvProblem(2, 16, 7, 3, 8, 5, 1, padding=(2, 0)),
}
FORMS = ["+".join(form) for form in itertools.product(("", "bias"), ("", "residual"), ("relu", "genstats"))]
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


@pytest.fixture(params=["map first", "weight first"])
def _order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both orders of a box and its weight in a dot, whichever the machine has."""
    for name, machine in list(configs.TABLE.items()):
        monkeypatch.setitem(configs.TABLE, name, machine._replace(swaps_boxes=request.param == "weight first"))


both_orders = pytest.mark.usefixtures("_order")


@pytest.fixture
def tile(device: str) -> Iterator[Tile]:
    """A tile that is small where the tests are interpreted; within the test it is tried."""
    tiles = configs.machine(torch.device(device)).descriptors
    if not tiles:
        pytest.skip("needs tensor descriptors: compute capability 9.0")
    with trying(tiles[0]):
        yield tiles[0]


def named(function: Callable[..., Any], kernel: str) -> Callable[..., Any]:
    """``function``, which must launch ``kernel``."""

    def call(*args: Any) -> Any:
        values: list[Any] = []
        assert kernel in launched(lambda: values.append(function(*args)))
        return values[0]

    call.__name__ = function.__name__
    return call


def through_descriptors(function: Callable[..., Any], args: tuple[Any, ...], device: str) -> None:
    assert_matches(named(function, "conv_descriptor_kernel"), args, device)


@both_orders
@problems
def test_fprop_of_every_geometry(problem: ConvProblem, device: str, tile: Tile) -> None:
    through_descriptors(conv_fprop, fprop_args(Operands(torch.float16), problem, "bias+relu+genstats"), device)


@pytest.mark.parametrize("form", FORMS)
def test_fprop_with_every_epilogue(form: str, device: str, tile: Tile) -> None:
    through_descriptors(conv_fprop, fprop_args(Operands(torch.bfloat16), RAGGED, form), device)


@both_orders
@problems
def test_dgrad_of_every_geometry(problem: ConvProblem, device: str, tile: Tile) -> None:
    through_descriptors(conv_dgrad, dgrad_args(Operands(torch.float16), problem, "plain", "residual"), device)


def test_dgrad_that_adds_nothing(device: str, tile: Tile) -> None:
    through_descriptors(conv_dgrad, dgrad_args(Operands(torch.bfloat16), RAGGED, "plain", "nothing"), device)


@pytest.mark.parametrize("name", ["ragged", "1x1", "small images"])
def test_persistent_programs_change_no_bit(name: str, device: str, tile: Tile) -> None:
    make, problem = Operands(torch.float16), PROBLEMS[name]
    calls = [
        (conv_fprop, fprop_args(make, problem, "bias+residual+relu+genstats")),
        (conv_dgrad, dgrad_args(make, problem, "plain", "residual")),
    ]
    for function, args in calls:
        once = results(function, args, device)
        for programs in (1, 1000):
            with trying(tile._replace(programs=programs)):
                again = results(function, args, device)
            assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("name", ["ragged", "1x1", "unpadded", "5x1"])
def test_fprop_equals_that_by_pointers_bit_for_bit(name: str, device: str, tile: Tile) -> None:
    """On whole numbers, whose sums are exact: otherwise how a matrix product groups them is that of BLAS or the GPU."""
    drawn = fprop_args(Operands(torch.float16), PROBLEMS[name], "bias+residual+relu")
    args = tuple((4 * arg).round() if isinstance(arg, torch.Tensor) else arg for arg in drawn)
    y, _ = results(conv_fprop, args, device)
    with trying(tile._replace(descriptors=False)):
        by_pointers, _ = results(named(conv_fprop, "conv_fprop_kernel"), args, device)
    assert y.unique().numel() > 20
    assert torch.equal(y, by_pointers)


@both_orders
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ["ragged", "unpadded", "1x1"])
def test_what_is_not_finite_stays_in_its_windows_and_channels(name: str, device: str, tile: Tile) -> None:
    """Blocks of channels reach past the last one of a tap, and boxes past the map: nothing of that may count."""
    x, w, *rest = fprop_args(Operands(torch.float16), PROBLEMS[name], "bias+residual")
    x[0, -1, 0, 0], x[-1, 0, -1, -1], w[2, -1, -1, -1], w[-1, 0, 0, 0] = torch.nan, torch.inf, torch.inf, torch.nan
    through_descriptors(conv_fprop, (x, w, *rest), device)


def test_an_expanded_bias_is_one_value(device: str, tile: Tile) -> None:
    args = list(fprop_args(Operands(torch.float16), RAGGED, "bias"))
    args[2] = args[2][:1].expand(RAGGED.K)
    through_descriptors(conv_fprop, tuple(args), device)


def test_other_layouts_are_copied_first(device: str, tile: Tile) -> None:
    x, w, bias, residual, *rest = fprop_args(Operands(torch.float16), RAGGED, "bias+residual")
    args = x.contiguous(), w.contiguous(), bias, residual.contiguous(), *rest
    through_descriptors(conv_fprop, args, device)


def test_empty_batch(device: str, tile: Tile) -> None:
    y, _ = results(conv_fprop, fprop_args(Operands(torch.float16), ConvProblem(0, 8, 5, 5, 8, 3, 3), "bias"), device)
    assert y.shape == (0, 8, 3, 3)


def misaligned(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` with their first operand two bytes behind an address of 16."""
    n, c, h, w = args[0].shape
    memory = torch.zeros(args[0].numel() + 1, dtype=args[0].dtype)[1:]
    x = memory.view(n, h, w, c).permute(0, 3, 1, 2).copy_(args[0])
    return x, *args[1:]


def not_served() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Calls that run by pointers, whatever the tile."""
    half, single = Operands(torch.float16), Operands(torch.float32)
    pointwise = ConvProblem(2, 16, 5, 4, 24, 1, 1)
    yield "prologue", conv_fprop, fprop_args(half, pointwise, "prologue")
    yield "float32", conv_fprop, fprop_args(single, pointwise, "bias")
    yield "stride", conv_fprop, fprop_args(half, ConvProblem(2, 16, 5, 4, 24, 1, 1, (1, 2)), "bias")
    yield "groups", conv_fprop, fprop_args(half, ConvProblem(2, 16, 5, 4, 32, 3, 3, groups=2), "bias")
    yield "channels in", conv_fprop, fprop_args(half, ConvProblem(2, 20, 5, 4, 24, 3, 3), "bias")
    yield "channels out", conv_fprop, fprop_args(half, ConvProblem(2, 16, 5, 4, 20, 1, 1), "bias")
    yield "address", conv_fprop, misaligned(fprop_args(half, pointwise, "bias"))
    for form, epilogue in (("batch", "nothing"), ("constant", "residual"), ("plain", "drelu"), ("plain", "strided")):
        yield f"dgrad {form} {epilogue}", conv_dgrad, dgrad_args(half, pointwise, form, epilogue)


def test_what_descriptors_cannot_serve_goes_by_pointers(device: str, tile: Tile) -> None:
    for name, function, args in not_served():
        if name != "address" or device == "cpu":  # a copy to the GPU is aligned
            assert_matches(named(function, f"{function.__name__}_kernel"), args, device, name)


def test_other_ops_take_the_sizes_of_such_a_tile(device: str, tile: Tile) -> None:
    args = wgrad_args(Operands(torch.float16), PROBLEMS["1x1"], "plain", prologue=False)
    assert_matches(conv_wgrad, args, device)


@pytest.mark.parametrize("block_m", [32, 64, 128, 256])
@pytest.mark.parametrize("size", [(256, 56, 56), (256, 28, 28), (256, 14, 14), (256, 7, 7), (1, 1, 1), (1, 1, 10**6)])
def test_boxes_cover_a_map_with_the_fewest(size: tuple[int, int, int], block_m: int) -> None:
    box = conv_descriptor.box(*size, block_m)
    assert math.prod(box) == block_m
    assert max(box) <= 256  # the most that hardware takes
    powers = [1 << i for i in range(9)]
    others = [other for other in itertools.product(powers, repeat=3) if math.prod(other) == block_m]
    assert count(size, box) == min(count(size, other) for other in others)


def count(size: tuple[int, int, int], box: tuple[int, int, int]) -> int:
    return math.prod(-(-length // edge) for length, edge in zip(size, box, strict=True))


def test_boxes_span_images_where_these_are_small() -> None:
    assert conv_descriptor.box(256, 56, 56, 64) == (1, 8, 8)
    assert conv_descriptor.box(3, 7, 7, 128) == (2, 8, 8)
    assert conv_descriptor.box(1, 1, 10**6, 128) == (1, 1, 128)

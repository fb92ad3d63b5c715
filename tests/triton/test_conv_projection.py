"""``conv_projection`` as a Triton kernel, against the reference in float64; and the blocks that end in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conv_cases import assert_matches, results
from launches import launched
from op_samples import Operands, samples_of
from oracles import assert_accurate, batch, block_twins, output_results
from torch import Tensor, nn

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, dispatch, measure, ops
from fusedres.kernels.conv_projection import conv_projection
from fusedres.plan import walk
from fusedres.problem import ConvProblem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
#: The source: N, C_d, H, W -> K, with its stride; and the channels of the other operand.
SOURCES = {
    "ragged": (ConvProblem(3, 18, 7, 6, 21, 1, 1, (2, 2)), 13),
    "stride 1": (ConvProblem(2, 20, 5, 7, 50, 1, 1), 33),
    "strides differ": (ConvProblem(2, 16, 9, 8, 32, 1, 1, (3, 2)), 16),
    "many tiles": (ConvProblem(2, 64, 11, 13, 96, 1, 1, (2, 2)), 48),
    "one channel": (ConvProblem(1, 1, 4, 4, 1, 1, 1, (2, 2)), 1),
}


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with fusedres.engine("triton"):
        yield


def args_of(name: str, dtype: torch.dtype, biases: str = "both", relu: bool = True) -> tuple[Any, ...]:
    make, (source, c) = Operands(dtype), SOURCES[name]
    last = ConvProblem(source.N, c, source.P, source.Q, source.K, 1, 1)
    bias = make.vector(source.K) if biases in ("both", "last") else None
    bias_d = make.vector(source.K) if biases in ("both", "source") else None
    own = make.input(last), make.weight(last), bias
    return *own, make.input(source), make.weight(source), bias_d, source.stride, relu


@dtypes
def test_samples_match_float64(dtype: torch.dtype, device: str) -> None:
    for sample in samples_of("conv_projection", dtype):
        assert_matches(conv_projection, sample.args, device, sample.label)


@dtypes
@pytest.mark.parametrize("name", SOURCES)
def test_ragged_in_every_dimension(name: str, dtype: torch.dtype, device: str) -> None:
    assert_matches(conv_projection, args_of(name, dtype), device)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("biases", ["both", "last", "source", "none"])
def test_every_epilogue(biases: str, relu: bool, device: str) -> None:
    assert_matches(conv_projection, args_of("ragged", torch.float16, biases, relu), device)


def test_biases_are_added_in_float32_before_one_rounding(device: str) -> None:
    """In float16 1 is less than half a step at 2048, so that each alone, and both one by one, would be lost."""
    x = torch.full((1, 16, 2, 2), 16.0, dtype=torch.float16)
    w, bias = torch.full((16, 16, 1, 1), 8.0, dtype=torch.float16), torch.ones(16, dtype=torch.float16)
    zero = torch.zeros_like(w)
    (y,) = results(conv_projection, (x, w, bias, x, zero, bias, (1, 1), False), device)
    assert (y == 2050).all()


def test_other_layouts_and_an_expanded_bias(device: str) -> None:
    x, w, bias, x_d, w_d, bias_d, *rest = args_of("ragged", torch.float32)
    args = x.contiguous(), w, bias[:1].expand(21), x_d.contiguous(), w_d, bias_d[:1].expand(21), *rest
    assert_matches(conv_projection, args, device)


def test_nan_of_either_operand_survives_the_relu(device: str) -> None:
    args = args_of("ragged", torch.float32)
    args[0][0, 3, 1, 1] = torch.nan
    args[3][1, 2, 2, 2] = torch.nan
    assert_matches(conv_projection, args, device)
    (y,) = results(conv_projection, args, device)
    assert y[0, :, 1, 1].isnan().all()
    assert y[1, :, 1, 1].isnan().all()
    assert y.isnan().sum() == 2 * y.shape[1]


def test_empty_batch(device: str) -> None:
    x, w, bias, x_d, w_d, bias_d, *rest = args_of("ragged", torch.float32)
    (y,) = results(conv_projection, (x[:0], w, bias, x_d[:0], w_d, bias_d, *rest), device)
    assert y.shape == (0, 21, 4, 3)


def test_offsets_of_64_bits_give_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = args_of("many tiles", torch.float16)
    narrow = results(conv_projection, args, device)
    monkeypatch.setattr("fusedres.kernels.conv_projection.is_wide", lambda *tensors: True)
    assert torch.equal(narrow[0], results(conv_projection, args, device)[0])


@pytest.mark.parametrize("i", range(6))
def test_operands_of_other_shapes_are_refused(i: int, device: str) -> None:
    args = list(args_of("ragged", torch.float32))
    args[i] = args[i][:, :-1] if i in (0, 1, 3, 4) else args[i][:-1]
    with pytest.raises(RuntimeError, match="must be"):
        results(conv_projection, args, device)


BLOCKS = {
    "bottleneck": (FusedBottleneck, {"stride": 2}),
    "resnext": (FusedBottleneck, {"stride": 2, "groups": 4, "base_width": 32}),
    "basic": (FusedBasicBlock, {"stride": 2}),
}


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    kind, options = BLOCKS[name]
    fused, eager = block_twins(kind, 12, 5 if "groups" not in options else 4, **options)
    return fused.eval(), eager.eval()


@dtypes
def test_a_folded_bottleneck_is_as_accurate_as_eager(dtype: torch.dtype, device: str) -> None:
    fused, eager = (module.to(dtype) for module in twins("bottleneck"))
    draws = []
    for seed in range(3):
        x = batch(2, 12, 7, 6, dtype=dtype, seed=seed)
        _, theirs, exact = output_results(eager, eager, x)
        with torch.no_grad():
            draws.append(({"y": fused.to(device)(x.to(device)).cpu()}, theirs, exact))
    assert_accurate(*draws)


@pytest.mark.parametrize(
    ("name", "engine", "expected"),
    [
        ("bottleneck", "triton", Counter(conv_fprop_kernel=2, conv_projection_kernel=1)),
        ("resnext", "triton", Counter(conv_fprop_kernel=2, conv_projection_kernel=1)),
        ("basic", "triton", Counter(conv_fprop_kernel=3)),  # its last conv is no matrix product
        ("bottleneck", "cudnn", Counter(conv_fprop_kernel=4)),
    ],
)
def test_launches_of_a_frozen_block(name: str, engine: str, expected: Counter[str], device: str) -> None:
    fused = fusedres.freeze(twins(name)[0].half().to(device))
    x = batch(2, 12, 7, 6, dtype=torch.float16).to(device)
    outputs: list[Tensor] = []
    with fusedres.engine(engine), torch.no_grad():
        fused(x)
        assert launched(lambda: outputs.append(fused(x))) == expected
        counted = measure.count_launches(lambda: fused(x))
    assert sum(counted.forward_ops.values()) == sum(expected.values())
    if engine == "triton":
        with fusedres.engine("cudnn"), torch.no_grad():
            torch.testing.assert_close(outputs[0], fused(x), rtol=4e-3, atol=4e-3)


def test_a_plan_has_the_launch_and_less_traffic(device: str) -> None:
    with torch.device("meta"):
        block = FusedBottleneck(12, 5, 2, nn.Sequential(nn.Conv2d(12, 20, 1, 2, bias=False), nn.BatchNorm2d(20)))
        x = torch.empty(2, 12, 7, 6).contiguous(memory_format=torch.channels_last)
    with dispatch.meta_as(device):
        together = walk(block, {"block": block}, x)
        with fusedres.engine("reference"):
            apart = walk(block, {"block": block}, x)
    assert [launch.ops for launch in together] == [("fusedres::conv_fprop",)] * 2 + [("fusedres::conv_projection",)]
    assert len(apart) == 4
    assert sum(launch.flops for launch in together) == sum(launch.flops for launch in apart)
    projected = 2 * 20 * 4 * 3 * 4  # bytes of the map that is neither written nor read
    moved = [sum(launch.bytes for launch in launches) for launches in (apart, together)]
    assert moved[0] - moved[1] == 2 * projected


def test_the_cpu_engine_runs_the_two_convs_one_by_one() -> None:
    args = args_of("ragged", torch.float64)
    with fusedres.engine("cpu"):
        torch.testing.assert_close(ops.conv_projection(*args), fusedres.reference.conv_projection(*args))

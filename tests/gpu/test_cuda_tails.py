"""The tails and statistics of a training step on the GPU: as accurate as eager, equal at every call, captured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_samples import Operands, samples_of
from oracles import assert_accurate, batch, block_twins, shake
from torch import Tensor

import fusedres
from fusedres import dispatch, reference, replay

kernels = torch.ops.fusedres_cuda
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("scale_shift_add_relu", "drelu_dbn", "dbn", "bn_finalize")
BLOCKS = {"basic": fusedres.FusedBasicBlock, "bottleneck": fusedres.FusedBottleneck}
#: (N, C, H, W): those of ResNet-50; every width of access, ragged; one pixel.
SIZES = [
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 2048, 7, 7),
    (32, 64, 112, 112),
    (7, 100, 13, 11),
    (33, 3, 29, 31),
    (5, 7, 9, 5),
    (1, 24, 1, 1),
    (2, 1, 101, 97),
]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)

Arguments = tuple[Any, ...]


def on_gpu(arguments: Arguments) -> Arguments:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in arguments)


def as_double(arguments: Arguments) -> Arguments:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def rows(outputs: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Named results on the CPU; the rows of statistics and sums, which differ in magnitude, apart."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = tuple(t.cpu() for t in outputs)
    return {f"{i}.{j}": row for i, out in enumerate(outputs) for j, row in enumerate(out if out.dim() == 2 else [out])}


def moments(stats: Tensor) -> tuple[Tensor, Tensor]:
    """(count (K,), mean and standard deviation (2*K,)): the two share a scale, which a mean near 0 alone has not."""
    count, mean, m2 = stats
    return count, torch.cat([mean, (m2 / count).sqrt()])


def check(op: str, arguments: Arguments, view: Callable[..., Any] = lambda outputs: outputs) -> None:
    """The kernel gives the same twice and obeys the rule of accuracy with the reference on the GPU as eager."""
    given = on_gpu(arguments)
    first, second = (rows(view(getattr(kernels, op)(*given))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
    theirs, exact = (rows(view(getattr(reference, op)(*a))) for a in (given, as_double(given)))
    assert_accurate((first, theirs, exact))


@dtypes
@sizes
def test_tails_are_as_accurate_as_eager(size: tuple[int, ...], dtype: torch.dtype) -> None:
    make, c = Operands(dtype), size[1]
    z, r, dy, y = (make.activation(*size) for _ in range(4))
    bn, residual_bn, sums = make.bn(c), make.bn(c), make.sums(c)
    for relu in (True, False):
        for residual in ((None, None), (r, None), (r, residual_bn)):
            check("scale_shift_add_relu", (z, bn, *residual, relu))
        for side in ((None, None), (r, residual_bn)):
            check("drelu_dbn", (dy, y if relu else None, z, bn, *side))
    check("dbn", (dy, z, bn, sums, 1 / 143))
    check("dbn", (dy, None, bn, None, 0.0))
    check("channel_stats", (z,), moments)


@dtypes
def test_a_large_mean_leaves_the_variance_right(dtype: torch.dtype) -> None:
    z = (1000 + 0.1 * Operands(dtype).normal(16, 64, 56, 56)).to(dtype).contiguous(memory_format=torch.channels_last)
    exact, ours = reference.channel_stats(z.double()), kernels.channel_stats(z.cuda()).cpu().double()
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[2], exact[2], rtol=1e-2, atol=0)


@dtypes
@pytest.mark.parametrize("op", OPS)
def test_samples_and_opcheck(op: str, dtype: torch.dtype) -> None:
    with fusedres.engine("cuda"):
        for i, sample in enumerate(samples_of(op, dtype)):
            given = copy.deepcopy(on_gpu(sample.args))
            assert dispatch.choose(op, "cuda", given[0].dtype).engine.name == "cuda"
            ours = rows(getattr(torch.ops.fusedres, op)(*copy.deepcopy(given)))
            theirs, exact = (rows(getattr(reference, op)(*copy.deepcopy(a))) for a in (given, as_double(given)))
            assert_accurate((ours, theirs, exact), slack=dict.fromkeys(ours, 1e-6))
            if i == 0:
                torch.library.opcheck(getattr(torch.ops.fusedres, op).default, given)


def test_more_elements_than_32_bits_count() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory")
    z = torch.zeros(1, 64, 5800, 5800, dtype=torch.float16, device="cuda").contiguous(memory_format=torch.channels_last)
    z[0, :, -1, -1] = 2
    bn = torch.ones(4, 64, device="cuda")
    y = kernels.scale_shift_add_relu(z, bn, None, None, True)
    assert (y[0, :, -1, -1] == 3).all()
    assert (y[0, :, -1, -2] == 1).all()
    assert torch.equal(kernels.drelu_dbn(z, z, None, None, None, None)[1], torch.full((1, 64), 2.0, device="cuda"))
    del y
    count, mean, _ = kernels.channel_stats(z)
    assert (count == 5800 * 5800).all()
    torch.testing.assert_close(mean, torch.full_like(mean, 2 / 5800**2), rtol=1e-4, atol=0)


def test_bad_arguments_are_refused() -> None:
    make = Operands(torch.float16)
    z, bn = make.activation(2, 8, 4, 3).cuda(), make.bn(8).cuda()
    other = make.activation(2, 8, 4, 5).cuda()
    shifted = torch.empty(z.numel() + 1, dtype=z.dtype, device="cuda")[1:].view(2, 4, 3, 8).permute(0, 3, 1, 2)
    stats, counter = torch.ones(3, 8, device="cuda"), torch.tensor(0, device="cuda")
    for op, arguments in (
        ("scale_shift_add_relu", (z.contiguous(), bn, None, None, True)),
        ("scale_shift_add_relu", (z.double(), bn.double(), None, None, True)),
        ("scale_shift_add_relu", (z[0], bn, None, None, True)),
        ("scale_shift_add_relu", (shifted, bn, None, None, True)),
        ("scale_shift_add_relu", (z, bn[:, :4], None, None, True)),
        ("scale_shift_add_relu", (z, bn.half(), None, None, True)),
        ("scale_shift_add_relu", (z, bn.cpu(), None, None, True)),
        ("scale_shift_add_relu", (z, bn, other, None, True)),
        ("scale_shift_add_relu", (z, bn, z.float(), None, True)),
        ("scale_shift_add_relu", (z, bn, None, bn, True)),
        ("drelu_dbn", (z, other, z, bn, None, None)),
        ("drelu_dbn", (z, z, z, None, None, None)),
        ("drelu_dbn", (z, z, None, None, z, None)),
        ("dbn", (z, other, bn, bn[:2], 0.5)),
        ("dbn", (z, z, bn, bn, 0.5)),
        ("channel_stats", (z.contiguous(),)),
        ("channel_stats", (z.to(torch.int32),)),
        ("bn_finalize", (stats[:2], None, None, None, None, None, 0.1, 1e-5)),
        ("bn_finalize", (stats, stats[0, :4], None, None, None, None, 0.1, 1e-5)),
        ("bn_finalize", (stats, stats[0], stats[1].half(), None, None, None, 0.1, 1e-5)),
        ("bn_finalize", (stats, None, None, None, None, counter.float(), 0.1, 1e-5)),
        ("bn_finalize", (stats, None, None, None, None, torch.tensor(0), 0.1, 1e-5)),
    ):
        with pytest.raises(RuntimeError):
            getattr(kernels, op)(*arguments)
    assert counter == 0


def test_a_kernel_runs_on_the_current_stream() -> None:
    """Behind a long queue on a stream of its own, the sums are of the values the queue wrote."""
    make = Operands(torch.float16)
    dy, z, bn = make.activation(8, 64, 28, 28).cuda(), make.activation(8, 64, 28, 28).cuda(), make.bn(64).cuda()
    expected = kernels.drelu_dbn(dy, z, z, bn, None, None)
    late = torch.zeros_like(dy)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(dy)
        found = kernels.drelu_dbn(late, z, z, bn, None, None)
    stream.synchronize()
    assert all(map(torch.equal, found, expected))


def step(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of a step, on the CPU."""
    module = copy.deepcopy(module)
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device, y.dtype)
    (y * weights).sum().backward()
    results = {"y": y.detach(), "x.grad": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    return {name: t.cpu() for name, t in {**results, **dict(module.named_buffers())}.items()}


@dtypes
@pytest.mark.parametrize(
    ("kind", "planes", "stride"), [("basic", 64, 1), ("basic", 32, 2), ("bottleneck", 16, 1), ("bottleneck", 24, 2)]
)
def test_a_block_trains_as_accurately_as_eager(kind: str, planes: int, stride: int, dtype: torch.dtype) -> None:
    fused, eager = block_twins(BLOCKS[kind], 64, planes, stride)
    fused, eager = (m.to(dtype).cuda().to(memory_format=torch.channels_last).train() for m in (fused, eager))
    draws = []
    for seed in range(9):
        x = batch(8, 64, 14, 14, dtype=dtype, seed=seed).cuda()
        with fusedres.engine("cuda"):
            ours = step(fused, x)
        draws.append((ours, step(eager, x), step(copy.deepcopy(eager).double(), x.double())))
    assert_accurate(*draws)


def train(model: torch.nn.Module, x: Tensor, steps: int) -> list[Tensor]:
    """The gradients and buffers after ``steps`` steps without an optimizer, on the CPU."""
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        model(x).float().square().sum().backward()
    return [*(p.grad.cpu() for p in model.parameters()), *(b.cpu() for b in model.buffers())]


def network(dtype: torch.dtype) -> torch.nn.Module:
    return shake(fusedres.resnet18(num_classes=10)).to(dtype).cuda().to(memory_format=torch.channels_last).train()


@dtypes
def test_recorded_steps_of_a_network_equal_called_ones(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_met", {})
    recorded = network(dtype)
    called = copy.deepcopy(recorded)
    x = batch(8, 3, 64, 64, dtype=dtype).cuda()
    with fusedres.engine("cuda"):
        got = train(recorded, x, 4)
        assert any(met.program is not None for met in replay._met.values())
        monkeypatch.setattr(replay, "_may_replay", lambda first: False)
        assert all(map(torch.equal, got, train(called, x, 4)))


def test_a_training_step_can_be_captured() -> None:
    launched, x = network(torch.float16), batch(8, 3, 64, 64, dtype=torch.float16).cuda()
    captured = copy.deepcopy(launched)
    with fusedres.engine("cuda"):
        expected = train(launched, x, 4)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            train(captured, x, 3)
        torch.cuda.current_stream().wait_stream(side)
        captured.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured(x).float().square().sum().backward()
    graph.replay()
    found = [*(p.grad.cpu() for p in captured.parameters()), *(b.cpu() for b in captured.buffers())]
    assert all(map(torch.equal, found, expected))

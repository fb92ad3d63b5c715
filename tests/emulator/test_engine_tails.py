"""Training through the ``cuda`` engine with emulated tails between another engine's convs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated_engine import EmulatedCUDA, emulated_engine
from op_samples import Operands, samples_of
from oracles import assert_accurate, assert_steps_equal, batch, block_twins, step_results
from torch import Tensor, nn

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, dispatch, reference, replay
from fusedres.engines.cuda import CUDA
from fusedres.engines.reference import REFERENCE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("scale_shift_add_relu", "drelu_dbn", "dbn", "bn_finalize")
#: kind, inplanes, planes, stride: both shortcuts of both blocks, channels that 16 bytes divide and that they do not.
BLOCKS = {
    "basic": (FusedBasicBlock, 8, 8, 1),
    "basic-projection": (FusedBasicBlock, 8, 12, 2),
    "bottleneck": (FusedBottleneck, 16, 4, 1),
    "bottleneck-projection": (FusedBottleneck, 12, 5, 2),
}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
blocks = pytest.mark.parametrize("name", BLOCKS)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedCUDA]:
    """Around convs that store their outputs: a closed unit has no tail."""
    monkeypatch.setattr(REFERENCE, "flops_per_byte", 0)
    monkeypatch.setattr(replay, "_met", {})
    with emulated_engine() as engine, fusedres.engine("cuda"):
        yield engine


@pytest.fixture
def calls(engine: EmulatedCUDA, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the engine has been asked for what."""
    counted: Counter[str] = Counter()

    def counting(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counted[op] += 1
            return function(*args)

        return call

    for op in (*OPS, "channel_stats"):
        monkeypatch.setattr(engine, op, counting(op, getattr(engine, op)))
    return counted


def twins(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    fused, eager = block_twins(*BLOCKS[name])
    return fused.to(dtype).train(), eager.to(dtype).train()


def images(name: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return batch(4, BLOCKS[name][1], 9, 7, dtype=dtype, seed=seed)


@dtypes
@blocks
def test_a_training_step_is_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    fused, eager = twins(name, dtype)
    assert_accurate(*(step_results(fused, eager, images(name, dtype, seed)) for seed in range(9)))


@pytest.mark.parametrize("name", ["basic-projection", "bottleneck"])
def test_a_training_step_under_autocast_is_as_accurate_as_eager(name: str) -> None:
    fused, eager = twins(name)
    with torch.autocast("cpu", torch.bfloat16):
        draws = [step_results(fused, eager, images(name, seed=seed)) for seed in range(9)]
    assert_accurate(*draws, stored=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "convs"), [("basic", 2), ("basic-projection", 3), ("bottleneck", 3), ("bottleneck-projection", 4)]
)
def test_a_block_has_one_tail_each_way_and_statistics_of_every_conv(name: str, convs: int, calls: Counter[str]) -> None:
    twins(name)[0](images(name).requires_grad_()).sum().backward()
    assert calls == {"scale_shift_add_relu": 1, "drelu_dbn": 1, "channel_stats": convs, "bn_finalize": convs}


def test_convs_that_want_their_operands_materialised_get_them_from_the_engine(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(REFERENCE, "fuses_prologue", False)
    fused, eager = twins("bottleneck")
    assert_accurate(*(step_results(fused, eager, images("bottleneck", seed=seed)) for seed in range(9)))
    assert (calls["scale_shift_add_relu"], calls["dbn"]) == (9 * 3, 9 * 3)


def test_closed_units_take_statistics_from_their_input(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REFERENCE, "flops_per_byte", 100)
    fused, eager = twins("bottleneck")
    assert_accurate(*(step_results(fused, eager, images("bottleneck", seed=seed)) for seed in range(9)))
    assert calls == {"drelu_dbn": 9, "channel_stats": 9 * 2, "bn_finalize": 9 * 3}


def test_a_network_trains() -> None:
    net = fusedres.cifar.CifarResNet(1).train().to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    losses = {}
    for engine, model in (("cuda", net), ("reference", other)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses[engine] = []
        for step in range(3):
            optimizer.zero_grad()
            with fusedres.engine(engine):
                loss = nn.functional.cross_entropy(model(batch(4, 3, 16, 16, seed=step)), torch.arange(4))
                loss.backward()
            optimizer.step()
            losses[engine].append(loss.item())
    assert losses["cuda"] == pytest.approx(losses["reference"], rel=1e-3)


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of a step, and which buffers autograd knows to have changed."""
    versions = [b._version for b in module.buffers()]
    x = x.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = module(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    moved = torch.tensor([b._version > before for b, before in zip(module.buffers(), versions, strict=True)])
    return [y.detach(), x.grad, *(p.grad for p in module.parameters()), *map(Tensor.clone, module.buffers()), moved]


@blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_replayed_steps_equal_called_ones(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed, _ = twins(name, dtype)
    called = copy.deepcopy(replayed)
    monkeypatch.setattr(REFERENCE, "replays", True)
    got = [results(replayed, images(name, dtype, seed)) for seed in range(4)]
    assert [met.program is not None for met in replay._met.values()] == [True, True]  # forward and backward
    monkeypatch.setattr(REFERENCE, "replays", False)
    for step, right in zip(got, (results(called, images(name, dtype, seed)) for seed in range(4)), strict=True):
        assert all(map(torch.equal, step, right))


@dtypes
@pytest.mark.parametrize("op", OPS)
def test_op_passes_opcheck(op: str, dtype: torch.dtype) -> None:
    sample = samples_of(op, dtype)[0]
    assert dispatch.choose(op, "cpu", sample.args[0].dtype).engine.name == "cuda"
    torch.library.opcheck(getattr(torch.ops.fusedres, op).default, copy.deepcopy(sample.args))


@dtypes
@pytest.mark.parametrize("channels", [5, 8])
def test_activations_of_any_strides_are_read_right(channels: int, dtype: torch.dtype, engine: EmulatedCUDA) -> None:
    """NCHW, every second channel, every pixel the same, and a view that begins in the middle of 16 bytes."""
    make, size = Operands(dtype), (2, channels, 4, 3)
    z, bn, sums = make.activation(*size), make.bn(channels), make.sums(channels)
    shifted = torch.empty(z.numel() + 1, dtype=dtype)[1:].view(2, 4, 3, channels).permute(0, 3, 1, 2).copy_(z)
    views = {
        "NCHW": z.contiguous(),
        "gaps": make.normal(2, 2 * channels, 4, 3).to(dtype)[:, ::2],
        "expanded": make.normal(2, channels, 1, 1).to(dtype).expand(size),
        "shifted": shifted,
    }
    for name, view in views.items():
        for op, args in (
            ("scale_shift_add_relu", (view, bn, view, None, True)),
            ("drelu_dbn", (view, view, view, bn, None, None)),
            ("dbn", (view, view, bn, sums, 0.25)),
        ):
            ours, dense = (getattr(engine, op)(*a) for a in (args, [_dense(a) for a in args]))
            ours, dense = ((r,) if isinstance(r, Tensor) else r for r in (ours, dense))
            assert all(map(torch.equal, ours, dense)), (name, op)
            assert ours[0].is_contiguous(memory_format=torch.channels_last)


def _dense(argument: Any) -> Any:
    is_map = isinstance(argument, Tensor) and argument.dim() == 4
    return (
        argument.clone(memory_format=torch.contiguous_format).contiguous(memory_format=torch.channels_last)
        if is_map
        else argument
    )


@pytest.mark.parametrize("vectors", ["gaps", "several dtypes"])
def test_vectors_that_the_kernel_does_not_take_move_in_place(vectors: str, engine: EmulatedCUDA) -> None:
    stats = reference.channel_stats(torch.randn(4, 3, 2, 3))
    mean = torch.zeros(3, 2)[:, 0] if vectors == "gaps" else torch.zeros(3)
    weight = torch.ones(3, dtype=torch.float16 if vectors == "several dtypes" else torch.float32)
    counter = torch.tensor(0)
    bn = engine.bn_finalize(stats, weight, None, mean, None, counter, 1.0, 1e-5)
    torch.testing.assert_close(mean, stats[1])
    torch.testing.assert_close(bn[0], stats[1])
    assert counter == 1


def test_float64_is_left_to_another_engine() -> None:
    assert dispatch.choose("drelu_dbn", "cpu", torch.float64).passed_over == (
        ("cuda", "it has no kernels for torch.float64"),
    )
    ours, _, exact = step_results(*twins("basic", torch.float64), images("basic", torch.float64))
    assert_steps_equal(ours, exact)


def test_the_tails_serve_by_name_alone_and_explain_says_so() -> None:
    (row,) = fusedres.explain(FusedBottleneck(16, 4))
    assert row.engine == "reference"
    assert "cuda: it has kernels for whole blocks in eval and for tails in training, none for this alone" in row.reason
    assert "cuda computes scale_shift_add_relu, drelu_dbn" in row.reason
    with fusedres.engine(None):
        (row,) = fusedres.explain(FusedBottleneck(16, 4))
        assert dispatch.choose("drelu_dbn", "cpu", torch.float32).engine is REFERENCE
    assert "cuda: nobody has measured its tails on a GPU" in row.reason
    assert "cuda computes" not in row.reason
    assert CUDA.only_by_name("cuda") == "nobody has measured its tails on a GPU"

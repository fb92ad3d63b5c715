"""SyncBatchNorm: what several processes compute of their shares equals what one computes of the joined batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from networks import as_maps, images, small_twins
from oracles import batch, block_twins, ops_called, rms, shake
from processes import run_processes
from torch import Tensor, nn

import fusedres
from fusedres.distributed import join_stats

needs_processes = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

#: How many pictures each process has. They are uneven, and one of three has none.
SHARES = {2: (3, 2), 3: (2, 0, 3)}
Case = tuple[nn.Module, Tensor]


def _block(kind: type[nn.Module], inplanes: int, dtype: torch.dtype = torch.float64, **kwargs: object) -> Case:
    fused, _ = block_twins(kind, inplanes, 4, **kwargs)
    return fused.to(dtype), batch(5, inplanes, 7, 6, dtype=dtype)


def _with_frozen_affine(case: Case) -> Case:
    case[0].bn2.weight.requires_grad_(False)
    case[0].conv1.weight.requires_grad_(False)
    return case


def _with_large_means(case: Case) -> Case:
    module, x = case
    return module, x + 1000 * torch.arange(5, dtype=x.dtype).view(-1, 1, 1, 1)


def _with_few_values() -> Case:
    """Maps of a single pixel: a process with one picture has one value a channel."""
    fused, _ = block_twins(fusedres.FusedBasicBlock, 8, 8, 2)
    return fused.double(), batch(5, 8, 2, 1, dtype=torch.float64)


CASES: dict[str, Callable[[], Case]] = {
    "basic block": lambda: _block(fusedres.FusedBasicBlock, 4),
    "basic block with large means": lambda: _with_large_means(_block(fusedres.FusedBasicBlock, 4)),
    "bottleneck": lambda: _block(fusedres.FusedBottleneck, 16),
    "bottleneck with downsample": lambda: _block(fusedres.FusedBottleneck, 6, stride=2),
    "bottleneck, recompute": lambda: _block(fusedres.FusedBottleneck, 6, memory="recompute"),
    "bottleneck, partly frozen": lambda: _with_frozen_affine(_block(fusedres.FusedBottleneck, 6)),
    "single pixels": _with_few_values,
    "conv-BN-ReLU": lambda: (
        shake(fusedres.FusedConvBNReLU(3, 6, 3)).double(),
        batch(5, 3, 6, 5, dtype=torch.float64),
    ),
    "network": lambda: (as_maps(small_twins()[0]), images(5)),
    "block in float32": lambda: _block(fusedres.FusedBottleneck, 6, torch.float32, stride=2),
    "network in bfloat16": lambda: (as_maps(small_twins(dtype=torch.bfloat16)[0]), images(5, dtype=torch.bfloat16)),
}


def _case(name: str) -> Case:
    """The same parameters in every process."""
    torch.manual_seed(0)
    return CASES[name]()


def _step(module: nn.Module, x: Tensor, share: slice) -> dict[str, Tensor]:
    """Output, gradients and buffers of a step on ``x[share]``; that at the output is the whole ``x``'s."""
    module, mine = copy.deepcopy(module), x[share].clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(mine)
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn((len(x), *y.shape[1:]), generator=generator, dtype=torch.float64).to(y.dtype)
    y.backward(dy[share])
    gradients = {f"{name}.grad": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x.grad": mine.grad, **gradients, **dict(module.named_buffers())}


def _member_steps() -> dict[str, dict[str, Tensor]]:
    """On each process: a step of every case on its share."""
    shares, rank = SHARES[dist.get_world_size()], dist.get_rank()
    share = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    results = {}
    for name in CASES:
        module, x = _case(name)
        results[name] = _step(nn.SyncBatchNorm.convert_sync_batchnorm(module), x, share)
    return results


@pytest.fixture(scope="module", params=list(SHARES), ids=lambda size: f"{size} processes")
def member_steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_processes(_member_steps, request.param, tmp_path_factory.mktemp("group"))


def _joined(members: list[dict[str, Tensor]], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the processes computed together: outputs in a row, gradients of parameters added, buffers of the first."""
    joined = {}
    for name in whole:
        parts = [results[name] for results in members]
        if name in ("y", "x.grad"):
            joined[name] = torch.cat(parts)
        else:
            joined[name] = sum(parts[1:], parts[0]) if name.endswith(".grad") else parts[0]
    return joined


@needs_processes
@pytest.mark.parametrize("case", CASES)
def test_processes_equal_one_on_the_joined_batch(member_steps: list[dict], case: str) -> None:
    module, x = _case(case)
    everything = slice(None)
    exact = _step(copy.deepcopy(module).double(), x.double(), everything)
    members = [results[case] for results in member_steps]
    joined = _joined(members, exact)
    alone = _step(module, x, everything)
    for name, truth in exact.items():
        if not truth.is_floating_point():
            assert torch.equal(joined[name], truth), name
            continue
        assert joined[name].dtype == alone[name].dtype
        floor = (1e-10 if x.dtype == torch.float64 else torch.finfo(x.dtype).eps) * max(rms(truth), 1e-3)
        assert rms(joined[name].double() - truth) <= 2 * rms(alone[name].double() - truth) + floor, name


@needs_processes
@pytest.mark.parametrize("case", CASES)
def test_every_process_holds_the_same_statistics_to_the_bit(member_steps: list[dict], case: str) -> None:
    buffers = [name for name, _ in _case(case)[0].named_buffers()]
    assert buffers
    for results in member_steps[1:]:
        assert all(torch.equal(results[case][name], member_steps[0][case][name]) for name in buffers)


def _member_calls() -> dict[str, int]:
    """The calls of a step of a bottleneck with a projection: four BN."""
    module, x = _case("bottleneck with downsample")
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    forward = ops_called(lambda: module(x))
    y = module(x.requires_grad_())
    backward = ops_called(lambda: y.sum().backward())
    module.eval()
    evaluated = ops_called(lambda: module(x))
    collectives = [
        sum(count for name, count in calls.items() if name.startswith("_c10d_functional::all_"))
        for calls in (forward, backward, evaluated)
    ]
    unfused = [name for name in (*forward, *backward) if name in ("aten::convolution", "aten::native_batch_norm")]
    waits_for_device = [name for name in (*forward, *backward) if name == "aten::_local_scalar_dense"]
    names = "forward", "backward", "evaluated", "unfused", "waits"
    return dict(zip(names, [*collectives, len(unfused), len(waits_for_device)], strict=True))


@needs_processes
def test_one_collective_a_bn_forward_and_one_backward_and_nothing_waits(tmp_path: Path) -> None:
    expected = {"forward": 4, "backward": 4, "evaluated": 0, "unfused": 0, "waits": 0}
    assert run_processes(_member_calls, 2, tmp_path) == [expected] * 2


def _member_compiled() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module, x = _case("bottleneck with downsample")
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    share = slice(0, 2) if dist.get_rank() == 0 else slice(2, 5)
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True, backend="aot_eager")
    return _step(module, x, share), _step(compiled, x, share)


@needs_processes
def test_compiled_whole_equals_uncompiled(tmp_path: Path) -> None:
    for plain, compiled in run_processes(_member_compiled, 2, tmp_path):
        assert list(plain) == list(compiled)
        for name, expected in plain.items():
            torch.testing.assert_close(compiled[name], expected, msg=name)


def _step_in_group_of_one() -> dict[str, Tensor]:
    module, x = _case("bottleneck")
    return _step(nn.SyncBatchNorm.convert_sync_batchnorm(module), x, slice(None))


@needs_processes
def test_alone_it_is_batch_norm(tmp_path: Path) -> None:
    module, x = _case("bottleneck")
    expected = _step(module, x, slice(None))
    for results in (*run_processes(_step_in_group_of_one, 1, tmp_path), _step_in_group_of_one()):
        assert all(torch.equal(results[name], value) for name, value in expected.items())


def test_joined_statistics_are_those_of_the_whole_for_any_mean() -> None:
    rows = torch.randn(60, 4, dtype=torch.float64) + torch.tensor([0, 1e3, -1e6, 1e9])
    parts = [rows[:1], rows[1:1], rows[1:40], rows[40:]]
    stats = [torch.stack([torch.full((4,), len(p)), *_moments(p)]) for p in parts]
    expected = torch.stack([torch.full((4,), 60.0), *_moments(rows)])
    torch.testing.assert_close(join_stats(torch.stack(stats)), expected, rtol=1e-6, atol=0)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.mean(0) if len(rows) else torch.zeros(rows.shape[1], dtype=rows.dtype)
    return mean, (rows - mean).square().sum(0)


def test_its_subclass_stays_with_its_own_forward() -> None:
    class Other(nn.SyncBatchNorm):
        pass

    block = fusedres.FusedBasicBlock(4, 4, norm_layer=Other)
    assert "Other is not exactly BatchNorm2d or SyncBatchNorm" in (block.reason() or "")

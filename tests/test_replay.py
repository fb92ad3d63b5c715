"""Recorded programs on the CPU: bit for bit what the calls compute, and nothing that a call does is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import batch, needs_native, projection, shake
from torch import Tensor, nn

from fusedres import FusedBasicBlock, FusedBottleneck, replay
from fusedres.engines.cpu import CPU
from fusedres.recorder import Recorder

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_native]

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: FusedBasicBlock(12, 12),
    "bottleneck": lambda: FusedBottleneck(12, 3),
    "projection": lambda: FusedBottleneck(12, 4, 2, projection(12, 16, 2)),
    "groups": lambda: FusedBottleneck(12, 3, groups=3, base_width=64),
    "recompute": lambda: FusedBottleneck(12, 3, memory="recompute"),
}


def steps(name: str, dtype: torch.dtype) -> list[list[Tensor]]:
    """Outputs, gradients and buffers of four steps on a block."""
    torch.manual_seed(0)
    block, results = shake(BLOCKS[name]()), []
    for seed in range(4):
        x = batch(3, 12, 9, 7, seed=seed).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = block(x)
        block.zero_grad()
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in block.parameters()), *map(Tensor.clone, block.buffers())])
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_replayed_steps_equal_called_ones(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    replay._met.clear()
    replayed = steps(name, dtype)
    assert sum(met.program is not None for met in replay._met.values()) == 2  # forward and backward
    monkeypatch.setattr(CPU, "replays", False)
    for ours, theirs in zip(replayed, steps(name, dtype), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_an_op_that_gives_back_its_argument_is_called_again() -> None:
    """As ``wait_tensor`` of a collective does, which by its schema changes nothing."""
    x = batch(1, 2, 3, 3)
    recorder = Recorder([x])
    with recorder:
        doubled = 2 * x
        waited = torch.ops._c10d_functional.wait_tensor(doubled)
        y = waited + 1
    program = recorder.program((y,))
    assert program is not None
    targets = [node.target for node in program.__self__.graph.nodes]
    assert torch.ops._c10d_functional.wait_tensor.default in targets
    assert torch.equal(program(x)[0], 2 * x + 1)


def test_a_tensor_that_was_neither_given_nor_made_there_is_refused() -> None:
    x, other = batch(1, 2, 3, 3), batch(1, 2, 3, 3, seed=2)
    recorder = Recorder([x])
    with recorder:
        y = x + other
    assert recorder.program((y,)) is None
    assert recorder.reason is not None

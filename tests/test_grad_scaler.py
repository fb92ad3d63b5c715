"""GradScaler with float16 on the CPU: scaled steps, skipped steps and the scale itself are those of eager."""

from __future__ import annotations

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from networks import images, small_twins
from oracles import rms
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3


class Run(NamedTuple):
    state: dict[str, Tensor]
    scales: list[float]  # after each step
    moved: list[int]  # how many parameters each step changed


def trained(net: nn.Module, overflow: int | None) -> Run:
    """Steps under autocast, or the exact ones of a network in float64, which needs no scale.

    In the step ``overflow`` the scale is so large that gradients in float16 are not finite: that one is skipped.
    """
    is_exact = next(net.parameters()).dtype == torch.float64
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=not is_exact)
    scales, moved = [], []
    for number in range(STEPS):
        if overflow is not None and not is_exact:
            scale = 2.0**40 if number == overflow else 256.0
            scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=not is_exact):
            loss = net(images(4, dtype=before[0].dtype, seed=number)).to(before[0].dtype).square().mean()
        scaler.scale(loss).backward()
        assert all(p.grad.dtype == p.dtype for p in net.parameters())
        if number != overflow or not is_exact:
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(sum(not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)))
    return Run(dict(net.state_dict()), scales, moved)


@functools.cache
def twins(memory: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return small_twins("bottleneck", torch.float32, memory)


@functools.cache
def expected(overflow: int | None) -> tuple[Run, Run]:
    """(eager's run, the exact one)."""
    _, eager = twins("standard")
    return trained(copy.deepcopy(eager), overflow), trained(copy.deepcopy(eager).double(), overflow)


@pytest.mark.parametrize("overflow", [None, 1])
@pytest.mark.parametrize("memory", ["standard", "recompute"])
def test_scaled_training_takes_eagers_steps(memory: str, overflow: int | None, engine: str) -> None:
    theirs, exact = expected(overflow)
    ours = trained(copy.deepcopy(twins(memory)[0]), overflow)
    assert (ours.scales, ours.moved) == (theirs.scales, theirs.moved)
    assert [number for number, count in enumerate(ours.moved) if not count] == [1] * (overflow == 1)
    for name, truth in exact.state.items():
        mine, other = ours.state[name], theirs.state[name]
        assert mine.dtype == other.dtype, name
        if not mine.is_floating_point():
            assert torch.equal(mine, other), name
            continue
        error, eagers = rms(mine.double() - truth), rms(other.double() - truth)
        assert error <= 2 * eagers + torch.finfo(torch.float16).eps * rms(truth), (name, error, eagers)

"""As near to the truth as eager, or as a few roundings of the inputs allow: the tolerance of problems nobody chose."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from oracles import Results, assert_accurate, rms
from torch import Tensor, nn

#: What a module computes of an input: an output, gradients, buffers afterwards.
Run = Callable[[nn.Module, Tensor], Results]


def outputs(module: nn.Module, x: Tensor) -> Results:
    """The output without gradients, and the buffers after it."""
    with torch.no_grad():
        return {"y": module(x), **{name: buffer.clone() for name, buffer in module.named_buffers()}}


def assert_as_eager(
    fused: nn.Module, eager: nn.Module, x: Tensor, run: Run, *, wiggle: float, stored: torch.dtype | None = None
) -> None:
    """Every result of ``run(fused, x)`` is as accurate as eager's, or as its own ``_slack``."""
    exact, moved = copy.deepcopy(eager).double(), copy.deepcopy(eager).double()
    with torch.autocast("cpu", enabled=False):
        truth = run(exact, x.double())
        slack = _slack(truth, run(_wiggled_(moved, wiggle), _wiggled(x, wiggle)), wiggle)
    assert_accurate((run(fused, x), run(eager, x), truth), stored=stored, slack=slack)


def _slack(truth: Results, moved: Results, wiggle: float) -> dict[str, float]:
    """How far each result moves when input and parameters do, by ``wiggle`` of each entry.

    A BN that sees few values may divide by next to nothing, and eager's own error is small by luck at times. A gradient
    that is zero but for rounding (a conv bias under BN) is allowed as much as the largest gradient is.
    """
    largest = max((rms(t) for name, t in truth.items() if name.endswith(".grad")), default=0.0)
    return {
        name: 4 * rms(moved[name].double() - t.double()) + wiggle * max(rms(t), largest * name.endswith(".grad"))
        for name, t in truth.items()
    }


def _wiggled_(module: nn.Module, wiggle: float) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(_wiggled(p, wiggle, seed=i))
    return module


def _wiggled(t: Tensor, wiggle: float, seed: int = 99) -> Tensor:
    noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return t.double() * (1 + wiggle * noise)

"""Proof before timing: the fused network's numbers are as near to the exact ones as eager PyTorch's.

Exact is the eager network in float64. Errors are relative, in the Euclidean norm of each tensor, and the worst tensor
of a kind counts. Fused may err twice as far as the worse of eager's two layouts. ReLU turns rounding into flipped
masks, so that gradients in float32 agree only to some per cent, eager's own too; therefore the fused network is run
in float64 as well, where a wrong formula has nothing to hide behind. Of a peer the output alone is compared.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fusedres.cli import console
from fusedres.cli.contest import CHANNELS_LAST, EAGER, FUSED, NCHW, Contest, layout, told
from fusedres.cli.peers import EVAL, TRAIN, Run

ALLOWED = 2.0
#: In float64 there is nothing more exact to compare with: half of its digits must agree.
FLOAT64_BOUND = torch.finfo(torch.float64).eps ** 0.5

Results = dict[str, dict[str, Tensor]]  # kind -> name -> float64 tensor


class NotEqualError(Exception):
    """Fused computes something else than eager."""


@dataclass(frozen=True)
class Verdict:
    """One line of the proof: a contestant's error, eager's, and the bound."""

    mode: str
    batch: int
    dtype: str
    what: str
    error: float
    eager_error: float | None
    bound: float
    contestant: str = FUSED

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # false for NaN

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def prove(contest: Contest, mode: str, x: Tensor, target: Tensor) -> list[Verdict]:
    """Compare outputs and, in "train" mode, gradients and running statistics. The contestants stay unchanged."""
    compute = _train_results if mode == "train" else _eval_results
    exact = compute(_double(contest.models[NCHW]), x.double(), target)
    found = {name: compute(copy.deepcopy(model), layout(name, x), target) for name, model in contest.models.items()}
    floor = torch.finfo(x.dtype).eps
    dtype = str(x.dtype).removeprefix("torch.")
    verdicts = []
    if x.dtype != torch.float64:
        for kind in exact:
            eager_error = max(_worst(found[name][kind], exact[kind]) for name in EAGER)
            error = _worst(found[FUSED][kind], exact[kind])
            verdicts.append(Verdict(mode, len(x), dtype, kind, error, eager_error, ALLOWED * eager_error + floor))
        found[FUSED] = compute(_double(contest.models[FUSED]), layout(FUSED, x.double()), target)
    for kind in exact:
        error = _worst(found[FUSED][kind], exact[kind])
        verdicts.append(Verdict(mode, len(x), "float64", kind, error, None, FLOAT64_BOUND))
    return verdicts


def admit(contest: Contest, mode: str, x: Tensor, advance: console.Advance = console.no_progress) -> list[Verdict]:
    """Compare the logits of every peer that was invited with eager's: half of the digits must agree, or it is out."""
    bound = torch.finfo(x.dtype).eps ** 0.5
    expected = _logits(mode, copy.deepcopy(contest.models[CHANNELS_LAST]).train(mode == TRAIN), CHANNELS_LAST, x)
    verdicts = []
    for done, (name, run) in enumerate(list(contest.peers.items())):
        advance(done, name)  # its first call may compile for minutes
        try:
            found = _logits(mode, run, name, x)
        except Exception as failure:  # of another library's compiler, at its first call
            contest.leave_out(name, mode, told(failure))
            continue
        error = _worst({"logits": found}, {"logits": expected})
        verdict = Verdict(mode, len(x), str(x.dtype).removeprefix("torch."), "output", error, None, bound, name)
        if not verdict.holds:
            contest.leave_out(name, mode, f"its logits differ from eager's by {error:.1e}, relatively")
        verdicts.append(verdict)
    return verdicts


def agrees(contest: Contest, mode: str, x: Tensor) -> bool:
    """Whether fused and eager logits of ``x`` agree in float64. For what is proved otherwise, at another size."""
    found, exact = (
        _logits(mode, _double(contest.models[name]).train(mode == TRAIN), name, x.double()) for name in (FUSED, NCHW)
    )
    return _worst({"logits": found}, {"logits": exact}) <= FLOAT64_BOUND


def _logits(mode: str, run: Run, name: str, x: Tensor) -> Tensor:
    with torch.inference_mode(mode == EVAL):
        return run(layout(name, x)).detach().double()


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative error among the tensors of one kind.

    A tensor that is exactly zero, or nearly so beside the others of its kind, is measured against those.
    """
    scale = max(float(e.norm()) for e in exact.values())
    errors = [float((found[name] - e).norm() / max(float(e.norm()), 1e-6 * scale, 1e-300)) for name, e in exact.items()]
    return max(errors) if all(e == e for e in errors) else float("nan")


def _eval_results(model: nn.Module, x: Tensor, target: Tensor) -> Results:
    model.eval()
    with torch.inference_mode():
        return {"output": {"logits": model(x).double()}}


def _train_results(model: nn.Module, x: Tensor, target: Tensor) -> Results:
    model.train()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    cross_entropy(y, target).backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {
        "output": {"logits": y.detach().double()},
        "gradients": {"input": x.grad.double(), **gradients},
        "running statistics": {name: buffer.double() for name, buffer in model.named_buffers()},
    }

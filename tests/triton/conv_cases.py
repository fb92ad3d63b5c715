"""What the conv tests share: problems of the networks, scaled down, and the comparison with the oracle in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from op_samples import Operands
from oracles import rms
from torch import Tensor

from fusedres import reference
from fusedres.problem import ConvProblem


def _stage(n: int, c: int, k: int, kernel: int, stride: int, groups: int = 1, size: int = 5) -> ConvProblem:
    pad = kernel // 2
    return ConvProblem(n, c, size, size, k, kernel, kernel, (stride, stride), (pad, pad), groups=groups)


def network_problems() -> set[ConvProblem]:
    """Every kind of conv in resnet18..152, resnext and wide ResNets: channels an eighth of the real, small maps.

    Groups keep their real widths (4, 8, 16, 32 and 64 channels), for these decide how groups are merged.
    """
    problems = {ConvProblem(1, 3, 13, 11, 8, 7, 7, (2, 2), (3, 3))}
    for width in (8, 16, 32):
        for stride in (1, 2):
            problems.add(_stage(1, width, width, 3, stride))  # basic and bottleneck 3x3
            problems.add(_stage(1, width // 2 or 4, width, 3, 2))  # basic, first of a stage
            problems.add(_stage(1, 4 * width, 8 * width, 1, 2))  # projection
        problems.add(_stage(1, width, 4 * width, 1, 1))  # bottleneck, out
        problems.add(_stage(1, 4 * width, width, 1, 1))  # bottleneck, in
        problems.add(_stage(1, 2 * width, 2 * width, 3, 1))  # wide
    for group_width in (4, 8, 16, 32, 64):
        groups = max(2, 40 // group_width)
        for stride in (1, 2):
            problems.add(_stage(1, groups * group_width, groups * group_width, 3, stride, groups))
    return problems


NETWORK_PROBLEMS = sorted(network_problems(), key=repr)


def label(problem: ConvProblem) -> str:
    """A short name for a test."""
    p = problem
    return f"{p.R}x{p.S}s{p.stride[0]}g{p.groups}-{p.C}to{p.K}"


def results(function: Callable[..., Any], args: Iterable[Any], device: str) -> list[Tensor]:
    """What ``function`` returns for ``args`` on ``device``, on the CPU."""
    moved = (a.to(device) if isinstance(a, Tensor) else a for a in args)
    values = function(*moved)
    return [v.cpu() for v in ([values] if isinstance(values, Tensor) else values)]


def assert_matches(function: Callable[..., Any], args: tuple[Any, ...], device: str, name: str = "") -> None:
    """The error against float64 is at most twice that of the reference in the same dtype, or one rounding.

    Sums over pixels are granted the rounding of what is summed: where they cancel, two orders of adding differ by it.
    """
    oracle = getattr(reference, function.__name__)
    ours, theirs = results(function, args, device), results(oracle, args, "cpu")
    wider = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    exact = results(oracle, wider, "cpu")
    for mine, eager, truth in zip(ours, theirs, exact, strict=True):
        assert (mine.shape, mine.dtype) == (eager.shape, eager.dtype), name
        assert torch.equal(mine.isnan(), eager.isnan()), f"{name}: other values are NaN"
        floor = torch.finfo(mine.dtype).eps * rms(truth)
        if mine.dim() == 2:
            floor += torch.finfo(ours[0].dtype).eps * ours[0][:, :1].numel() ** 0.5
        error, allowed = rms(mine.double() - truth), 2 * rms(eager.double() - truth) + floor
        assert error <= allowed, f"{name} {tuple(mine.shape)}: error {error:.3g}, allowed {allowed:.3g}"


def fprop_args(make: Operands, problem: ConvProblem, form: str) -> tuple[Any, ...]:
    """Operands of ``conv_fprop``; ``form`` names those that are there: bias, residual, prologue, relu, genstats."""
    return (
        make.input(problem),
        make.weight(problem),
        make.vector(problem.K) if "bias" in form else None,
        make.output(problem) if "residual" in form else None,
        make.bn(problem.C) if "prologue" in form else None,
        problem.stride,
        problem.padding,
        problem.dilation,
        problem.groups,
        "relu" in form,
        "genstats" in form,
    )


def gradient_args(make: Operands, problem: ConvProblem, form: str) -> tuple[Any, ...]:
    """The first five operands of ``conv_dgrad`` and ``conv_wgrad``: plain, constant (BN in eval), or batch."""
    g = make.output(problem)
    if form == "plain":
        return g, None, None, None, 0.0
    count = 0.0 if form == "constant" else 1 / problem.gemm_m
    return g, make.output(problem), make.bn(problem.K), make.sums(problem.K), count


def dgrad_args(make: Operands, problem: ConvProblem, form: str, epilogue: str) -> tuple[Any, ...]:
    """Operands of ``conv_dgrad``; ``epilogue``: nothing, residual, strided, or drelu."""
    p = problem
    step = 2 if epilogue == "strided" else 1
    has_residual = epilogue in ("residual", "strided")
    residual = make.activation(p.N, p.C, -(-p.H // step), -(-p.W // step)) if has_residual else None
    previous = (make.input(p), make.bn(p.C)) if epilogue == "drelu" else (None, None)
    geometry = (p.stride, p.padding, p.dilation, p.groups)
    return *gradient_args(make, p, form), make.weight(p), (p.H, p.W), *geometry, residual, (step, step), *previous


def wgrad_args(make: Operands, problem: ConvProblem, form: str, prologue: bool) -> tuple[Any, ...]:
    """Operands of ``conv_wgrad``."""
    p = problem
    in_bn = make.bn(p.C) if prologue else None
    geometry = (p.stride, p.padding, p.dilation, p.groups)
    return *gradient_args(make, p, form), make.input(p), in_bn, (p.R, p.S), *geometry

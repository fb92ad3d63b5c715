"""Ahead-of-time compilation of the conv kernels, without a GPU: which launches there are, and their compiled form.

A plan is a call of a host function with meta tensors under ``launch.recording``: what is compiled here is what a call
with such tensors would launch, specialised for the same divisibilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedres.kernels import configs
from fusedres.kernels.conv_dgrad import conv_dgrad, conv_dgrad_drelu_dbn
from fusedres.kernels.conv_fprop import conv_fprop
from fusedres.kernels.conv_wgrad import conv_wgrad
from fusedres.kernels.launch import Launch, recording
from fusedres.problem import ConvProblem

#: Compute capability for which each row of ``configs.TABLE`` is compiled.
CAPABILITY = {"sm80": 80, "sm86": 86, "sm89": 89, "sm90": 90, "sm100": 100, "sm120": 120}

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int64: "i64"}


class Build(NamedTuple):
    """What ``triton.compile`` takes: a hashable description, so that equal builds are compiled once."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # positions of arguments that are multiples of 16
    num_warps: int
    num_stages: int

    def compile(self, machine: str) -> Any:
        """The compiled kernel (``.asm["cubin"]``, ``.asm["ptx"]``, ``.metadata.shared``) for a row of the table."""
        attrs = {(i,): [["tt.divisibility", 16]] for i in self.divisible}
        source = ASTSource(self.kernel, dict(self.signature), dict(self.constexprs), attrs)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(source, target=GPUTarget("cuda", CAPABILITY[machine], 32), options=options)


def build_of(launch: Launch) -> Build:
    """The specialisation that Triton would make of a launch: None and 1 become constants, multiples of 16 are noted."""
    kernel, _, args, constants, boxes = launch
    names = kernel.arg_names
    unspecialised = {names[p] if isinstance(p, int) else p for p in kernel.do_not_specialize or ()}
    signature: dict[str, str] = {}
    constexprs = {name: value for name, value in constants.items() if name in names}
    divisible = []
    for i, (name, value) in enumerate(zip(names, args, strict=False)):
        if isinstance(value, Tensor):
            if name in boxes:
                signature[name] = f"tensordesc<{_TYPES[value.dtype]}{list(boxes[name].block)}>"
            else:
                signature[name] = "*" + _TYPES[value.dtype]
                divisible.append(i)  # allocations are aligned
        elif value is None or (value == 1 and type(value) is int and name not in unspecialised):
            signature[name] = "constexpr"
            constexprs[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in unspecialised:
                divisible.append(i)
    signature |= {name: "constexpr" for name in names if name not in signature}
    options = constants["num_warps"], constants.get("num_stages", 3)
    return Build(kernel, tuple(signature.items()), tuple(constexprs.items()), tuple(divisible), *options)


class Operands:
    """Meta tensors of one problem and dtype."""

    def __init__(self, problem: ConvProblem, dtype: torch.dtype) -> None:
        p = self.problem = problem
        self.geometry = (p.stride, p.padding, p.dilation, p.groups)
        with torch.device("meta"):
            self.x = torch.empty(p.N, p.C, p.H, p.W, dtype=dtype).contiguous(memory_format=torch.channels_last)
            self.y = torch.empty(p.N, p.K, p.P, p.Q, dtype=dtype).contiguous(memory_format=torch.channels_last)
            w = torch.empty(p.K, p.C // p.groups, p.R, p.S, dtype=dtype)
            self.w = w.contiguous(memory_format=torch.channels_last)
            self.bias = torch.empty(p.K, dtype=dtype)
            self.in_bn, self.bn, self.sums = torch.empty(4, p.C), torch.empty(4, p.K), torch.empty(2, p.K)


def fprop_calls(o: Operands) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(form, arguments) of every way in which the networks call ``conv_fprop``."""
    yield "train", (o.x, o.w, None, None, None, *o.geometry, False, True)
    yield "train+prologue", (o.x, o.w, None, None, o.in_bn, *o.geometry, False, True)
    yield "eval", (o.x, o.w, o.bias, None, None, *o.geometry, True, False)
    yield "eval+residual", (o.x, o.w, o.bias, o.y, None, *o.geometry, True, False)


def dgrad_calls(o: Operands) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(form, arguments) of every way in which the networks call ``conv_dgrad``."""
    p = o.problem
    lazy = (o.y, o.y, o.bn, o.sums, 1 / p.gemm_m, o.w, (p.H, p.W), *o.geometry)
    yield "bare", (*lazy, None, (1, 1), None, None)
    yield "residual", (*lazy, o.x, (1, 1), None, None)
    yield "drelu", (*lazy, None, (1, 1), o.x, o.in_bn)


def border_calls(o: Operands) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(form, arguments) of every way in which the networks call ``conv_dgrad_drelu_dbn``: from convs of stride 1."""
    p = o.problem
    if p.stride == (1, 1):
        lazy = (o.y, o.y, o.bn, o.sums, 1 / p.gemm_m, o.w, (p.H, p.W), *o.geometry)
        yield "border", (*lazy, o.x, o.x, o.x, o.in_bn, None, None)
        yield "border+projection", (*lazy, o.x, o.x, o.x, o.in_bn, o.x, o.in_bn)


def wgrad_calls(o: Operands) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(form, arguments) of every way in which the networks call ``conv_wgrad``."""
    p = o.problem
    lazy = (o.y, o.y, o.bn, o.sums, 1 / p.gemm_m)
    yield "bare", (*lazy, o.x, None, (p.R, p.S), *o.geometry)
    yield "prologue", (*lazy, o.x, o.in_bn, (p.R, p.S), *o.geometry)


OPS = (
    ("conv_fprop", conv_fprop, fprop_calls),
    ("conv_dgrad", conv_dgrad, dgrad_calls),
    ("conv_dgrad_drelu_dbn", conv_dgrad_drelu_dbn, border_calls),
    ("conv_wgrad", conv_wgrad, wgrad_calls),
)


class Plan(NamedTuple):
    """One call of an op on one machine, and the launches it makes, the conv first."""

    op: str
    form: str
    problem: ConvProblem
    dtype: torch.dtype
    launches: tuple[Launch, ...]

    @property
    def build(self) -> Build:
        """The conv's own kernel."""
        return build_of(self.launches[0])


def plans(machine: str, problem: ConvProblem, dtype: torch.dtype) -> Iterator[Plan]:
    """Every call that the networks make for ``problem`` on a machine of the table."""
    with configs.planning(machine):
        operands = Operands(problem, dtype)
        for op, function, calls in OPS:
            for form, args in calls(operands):
                with recording() as launches:
                    function(*args)
                yield Plan(op, form, problem, dtype, tuple(launches))


#: One problem of every class that the kernels tell apart, with the sizes of a ResNet at batch 256.
PROBLEMS = {
    "stem": ConvProblem(256, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3)),
    "1x1 to 64": ConvProblem(256, 256, 56, 56, 64, 1, 1),
    "1x1 to 256": ConvProblem(256, 64, 56, 56, 256, 1, 1),
    "1x1 stride 2": ConvProblem(256, 256, 56, 56, 512, 1, 1, (2, 2)),
    "3x3 of 64": ConvProblem(256, 64, 56, 56, 64, 3, 3, (1, 1), (1, 1)),
    "3x3 of 256": ConvProblem(256, 256, 14, 14, 256, 3, 3, (1, 1), (1, 1)),
    "3x3 stride 2": ConvProblem(256, 128, 56, 56, 128, 3, 3, (2, 2), (1, 1)),
    "3x3 32x4d": ConvProblem(256, 128, 56, 56, 128, 3, 3, (1, 1), (1, 1), groups=32),
    "3x3 32x8d stride 2": ConvProblem(256, 512, 56, 56, 512, 3, 3, (2, 2), (1, 1), groups=32),
    "3x3 32x32d": ConvProblem(256, 1024, 14, 14, 1024, 3, 3, (1, 1), (1, 1), groups=32),
    "depthwise": ConvProblem(256, 256, 28, 28, 256, 3, 3, (1, 1), (1, 1), groups=256),
    "ragged": ConvProblem(16, 20, 30, 30, 50, 3, 3, (1, 1), (1, 1)),
}


def shipped(machine: str, dtype: torch.dtype) -> dict[Build, Plan]:
    """Every distinct build that ``PROBLEMS`` need on a machine, with a plan that needs it."""
    return {plan.build: plan for problem in PROBLEMS.values() for plan in plans(machine, problem, dtype)}

"""What every convolution of a ResNet-50 takes of three GPUs, read from the compiled kernels. Nothing is timed.

    python bench/static_report.py        writes docs/static_report.md

For each distinct problem at batch 256 in float16, and for fprop, dgrad and wgrad with their prologues and epilogues:
registers of a thread, shared memory of a block, blocks that one SM holds, waves of them, and floating-point operations
for each byte that must move (every operand read and every result written once).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from pathlib import Path

import torch
import triton
from torch import Tensor, nn

import fusedres
from fusedres.kernels import configs
from fusedres.kernels.aot import Build, Operands, Plan, build_of, plans
from fusedres.kernels.conv_projection import conv_projection
from fusedres.kernels.cubin import MULTIPROCESSORS, Usage, usage
from fusedres.kernels.launch import Launch, recording
from fusedres.problem import ConvProblem

BATCH = 256
SIDE = 224
DTYPE = torch.float16
#: Of each op the form with the most work; the stem has neither a BN before it nor a gradient of its input.
FORMS = {"conv_fprop": "train+prologue", "conv_dgrad": "drelu", "conv_wgrad": "prologue"}
STEM_FORMS = {"conv_fprop": "train", "conv_wgrad": "bare"}
MACHINES = ("sm80", "sm90", "sm100")
OUTPUT = Path(__file__).parents[1] / "docs" / "static_report.md"


def resnet50() -> tuple[nn.Module, dict[nn.Conv2d, ConvProblem]]:
    """The network, and the problem of each of its convolutions."""
    problems: dict[nn.Conv2d, ConvProblem] = {}

    def note(conv: nn.Conv2d, args: tuple[Tensor], _: Tensor) -> None:
        problems[conv] = ConvProblem.of(args[0], conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups)

    with torch.device("meta"):
        model = fusedres.resnet50().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)  # a hooked block runs its modules one by one
        with torch.no_grad():
            model(torch.empty(BATCH, 3, SIDE, SIDE))
    return model, problems


def resnet50_problems() -> dict[ConvProblem, int]:
    """Every distinct convolution of ResNet-50, and how often it occurs."""
    return dict(Counter(resnet50()[1].values()))


def resnet50_projections() -> list[tuple[ConvProblem, ConvProblem]]:
    """Of each block with a projection shortcut its last conv and the projection."""
    model, problems = resnet50()
    blocks = [m for m in model.modules() if isinstance(m, fusedres.FusedBottleneck) and m.downsample is not None]
    return [(problems[block.conv3], problems[block.downsample[0]]) for block in blocks]


def bytes_moved(plan: Plan) -> int:
    """Bytes of the activations and weights that a launch must read and write, each once."""
    p, size = plan.problem, DTYPE.itemsize
    x, y = p.N * p.C * p.H * p.W, p.N * p.K * p.P * p.Q
    w = p.K * p.C // p.groups * p.R * p.S
    is_lazy = plan.form != "train" and plan.op != "conv_fprop"  # dz is formed of g and z
    reads_z = y if is_lazy else 0
    reads_previous = x if plan.form == "drelu" else 0
    return size * (x + y + w + reads_z + reads_previous)


def row(plan: Plan, machine: str, found: Usage, count: int) -> str:
    p = plan.problem
    kernel, stride = f"{p.R}x{p.S}", "" if p.stride == (1, 1) else f" /{p.stride[0]}"
    head = f"{p.C} -> {p.K}, {kernel}{stride}, {p.H}x{p.W}", count, plan.op.removeprefix("conv_")
    return line(head, plan.launches[0], machine, found, p.flops / bytes_moved(plan))


def projection_row(last: ConvProblem, source: ConvProblem, machine: str) -> str:
    """The two convs as one launch, in eval."""
    operands, of_source = Operands(last, DTYPE), Operands(source, DTYPE)
    with configs.planning(machine), recording() as launches:
        own, shortcut = ((o.w, o.bias) for o in (operands, of_source))
        conv_projection(operands.x, *own, of_source.x, *shortcut, source.stride, True)
    pixels, channels = last.gemm_m, last.C + source.C
    moved = DTYPE.itemsize * (pixels * (channels + last.K) + channels * last.K)
    head = f"{last.C} + {source.C} -> {last.K}, 1x1, {last.P}x{last.Q}", 1, "projection"
    found = usage(build_of(launches[0]), machine)
    return line(head, launches[0], machine, found, (last.flops + source.flops) / moved)


def line(head: tuple[object, ...], launch: Launch, machine: str, found: Usage, flops_per_byte: float) -> str:
    resident, blocks = found.blocks_per_multiprocessor(machine), math.prod(launch.grid)
    cells = (
        *head,
        found.registers,
        f"{found.shared_bytes / 1024:.0f}",
        resident,
        blocks,
        f"{blocks / (resident * MULTIPROCESSORS[machine].count):.1f}",
        f"{flops_per_byte:.0f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def table(machine: str, problems: dict[ConvProblem, int]) -> list[str]:
    compiled = functools.cache(lambda build: usage(build, machine))
    sm = MULTIPROCESSORS[machine]
    lines = [
        f"## {machine}, as on a {sm.gpu} with {sm.count} SMs",
        "",
        "| problem | times | op | registers | shared KiB | blocks/SM | blocks | waves | FLOP/byte |",
        "| --- | --: | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for problem, count in problems.items():
        forms = FORMS if problem.C > 3 else STEM_FORMS
        for plan in plans(machine, problem, DTYPE):
            if forms.get(plan.op) == plan.form:
                build: Build = plan.build
                lines.append(row(plan, machine, compiled(build), count))
    lines += [projection_row(last, source, machine) for last, source in resnet50_projections()]
    return [*lines, ""]


def report() -> str:
    problems = resnet50_problems()
    head = [
        "# What the Triton convolutions take of a GPU",
        "",
        "Generated by `python bench/static_report.py` from the compiled kernels of",
        f"{len(problems)} distinct problems ({sum(problems.values())} convolutions) of ResNet-50, batch {BATCH},",
        f"{SIDE}x{SIDE}, {str(DTYPE).removeprefix('torch.')}; Triton {triton.__version__}. Nothing here was timed.",
        "",
        "`fprop` is with prologue and statistics, `dgrad` with prologue, ReLU mask and sums, `wgrad` with both",
        "prologues (the stem: without), `projection` the end of a block in eval with its projection shortcut.",
        "Waves: blocks of the grid over blocks that the GPU holds at once. FLOP/byte:",
        "every operand read and every result written once.",
        "",
    ]
    return "\n".join([*head, *(line for machine in MACHINES for line in table(machine, problems))])


if __name__ == "__main__":
    OUTPUT.write_text(report())
    print(f"wrote {OUTPUT.relative_to(Path.cwd())}" if OUTPUT.is_relative_to(Path.cwd()) else f"wrote {OUTPUT}")

"""What the kernels take of GPUs, read from their machine code. Nothing is timed.

    python bench/static_report.py        writes docs/static_report.md

First every convolution of a ResNet-50 by the Triton kernels, then the CUDA kernels of blocks, stems, heads and tails.

For each distinct problem at batch 256 in float16, and for fprop, dgrad and wgrad with their prologues and epilogues:
registers of a thread, shared memory of a block, blocks that one SM holds, waves of them, and floating-point operations
for each byte that must move (every operand read and every result written once).
"""

from __future__ import annotations

import functools
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor, nn

import fusedres
from fusedres.kernels import configs, conv_descriptor
from fusedres.kernels.aot import Build, Operands, Plan, build_of, fprop_calls, plans
from fusedres.kernels.conv_fprop import conv_fprop
from fusedres.kernels.conv_projection import conv_projection
from fusedres.kernels.cubin import MULTIPROCESSORS, Usage, usage
from fusedres.kernels.launch import Launch, recording
from fusedres.problem import ConvProblem

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import cuda_usage

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
    return line(head, plan.launches[0], machine, found, f"{p.flops / bytes_moved(plan):.0f}")


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
    return line(head, launches[0], machine, found, f"{(last.flops + source.flops) / moved:.0f}")


def line(head: tuple[object, ...], launch: Launch, machine: str, found: Usage, *tail: object) -> str:
    resident, blocks = found.blocks_per_multiprocessor(machine), math.prod(launch.grid)
    cells = (
        *head,
        found.registers,
        f"{found.shared_bytes / 1024:.0f}",
        resident,
        blocks,
        f"{blocks / (resident * MULTIPROCESSORS[machine].count):.1f}",
        *tail,
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def described_rows(machine: str, problems: dict[ConvProblem, int]) -> Iterator[str]:
    """Of each conv in eval that descriptors serve, its widest tile of 128 pixels: a program a tile, and persistent."""
    for problem, count in problems.items():
        operands = Operands(problem, DTYPE)
        args = dict(fprop_calls(operands))["eval+residual" if problem.R == 1 else "eval"]
        with configs.planning(machine):
            offered = [t for t in conv_descriptor.candidates("conv_fprop", problem, args) if t.block_m == 128]
        widest = max((t.block_n for t in offered if t.programs), default=0)
        for tile in (t for t in offered if t.block_n == widest):
            with configs.planning(machine), configs.trying(tile), recording() as launches:
                conv_fprop(*args)
            launch = launches[0]
            used = problem.gemm_m / (
                launch.constants["BLOCK_M"] * launch.args[launch.kernel.arg_names.index("tiles_m")]
            )
            box = "x".join(str(launch.constants[f"BOX_{axis}"]) for axis in "NHW")
            head = f"{problem.C} -> {problem.K}, {problem.R}x{problem.S}, {problem.H}x{problem.W}", count, tile, box
            yield line((*head, f"{100 * used:.0f}"), launch, machine, usage(build_of(launch), machine))


def described_table(machine: str, problems: dict[ConvProblem, int]) -> list[str]:
    rows = list(described_rows(machine, problems))
    if not rows:
        return []
    return [
        f"### {machine}, fprop through tensor descriptors",
        "",
        "| problem | times | tile | box | pixels used % | registers | shared KiB | blocks/SM | blocks | waves |",
        "| --- | --: | --- | --- | --: | --: | --: | --: | --: | --: |",
        *rows,
        "",
    ]


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
    return [*lines, "", *described_table(machine, problems)]


#: Launches of networks in eval, then of tails in training, as calls of the functions in bench/cuda_usage.py.
CUDA_LAUNCHES = [
    'stem("stem of ImageNet, 224x224", 7, 64, 224)',
    'bottleneck("bottleneck 64 -> 64, 56x56", 64, 64, 56, 1)',
    'bottleneck("bottleneck 256 -> 64, 56x56", 256, 64, 56, 1)',
    'bottleneck("bottleneck 256 -> 128 /2, 56x56", 256, 128, 56, 2)',
    'bottleneck("bottleneck 512 -> 128, 28x28", 512, 128, 28, 1)',
    'bottleneck("bottleneck 512 -> 256 /2, 28x28", 512, 256, 28, 2)',
    'bottleneck("bottleneck 1024 -> 256, 14x14", 1024, 256, 14, 1)',
    'basic("basic block 64 -> 64, 56x56", 64, 64, 56, 1)',
    'basic("basic block 64 -> 128 /2, 56x56", 64, 128, 56, 2)',
    'basic("basic block 128 -> 128, 28x28", 128, 128, 28, 1)',
    'stem("stem of CIFAR, 32x32", 3, 16, 32)',
    'stem("3x3 conv 3 -> 64, 224x224", 3, 64, 224)',
    'basic("basic block 16 -> 16, 32x32", 16, 16, 32, 1)',
    'head("head 2048 -> 1000, 7x7", N, 2048, 49, 1000)',
    'head("head 2048 -> 1000, 7x7, one image", 1, 2048, 49, 1000)',
    'forward_tail("forward tail 256, 56x56", 256, 56)',
    'backward_tail("backward tail 256, 56x56", 256, 56)',
    'backward_tail("backward tail 2048, 7x7", 2048, 7)',
    'gradient("gradient through BN 64, 56x56", 64, 56)',
    'statistics("statistics 64, 56x56", 64, 56)',
    'statistics("statistics 2048, 7x7", 2048, 7)',
]


def cuda_registers() -> list[str]:
    """A row for every CUDA kernel that ships: the registers of a thread on each architecture."""
    archs = list(cuda_usage.MULTIPROCESSORS)
    lines = [
        "| kernel | " + " | ".join(f"sm{arch}" for arch in archs) + " |",
        "| --- |" + " --: |" * len(archs),
    ]
    for family in cuda_usage.FAMILIES:
        for found in zip(*(cuda_usage.usages(family, arch) for arch in archs), strict=True):
            cells = [f"{u.registers}" + (f", spills {u.spilled_bytes}" if u.spilled_bytes else "") for u in found]
            lines.append(f"| `{found[0].kernel}` | " + " | ".join(cells) + " |")
    return lines


def cuda_table(arch: str) -> Iterator[str]:
    """A row for every launch that a block of this architecture has shared memory for."""
    sm = cuda_usage.MULTIPROCESSORS[arch]
    usages = {usage.kernel: usage for family in cuda_usage.FAMILIES for usage in cuda_usage.usages(family, arch)}
    yield f"### sm{arch}, as on a {sm.gpu} with {sm.count} SMs"
    yield ""
    yield "| launch | tile | registers | shared KiB | blocks/SM | blocks | waves |"
    yield "| --- | --- | --: | --: | --: | --: | --: |"
    for shape in cuda_usage.shapes(CUDA_LAUNCHES, BATCH, arch):
        if "_merge<" in shape.kernel:  # a few blocks behind the launch in the row before
            continue
        usage = usages[shape.kernel]
        resident = usage.blocks_per_multiprocessor(arch, shape.shared_bytes)
        tile = shape.kernel.partition("float16, ")[2][:-1]
        cells = (shape.label, f"`{tile}`", usage.registers, f"{shape.shared_bytes / 1024:.0f}", resident, shape.blocks)
        yield "| " + " | ".join(map(str, cells)) + f" | {shape.blocks / (resident * sm.count):.1f} |"
    yield ""


def cuda_report() -> list[str]:
    registers = cuda_registers()
    spills = "Some spill." if any("spills" in line for line in registers) else "None spills."
    return [
        "# What the CUDA kernels take of a GPU",
        "",
        f"Every kernel that csrc/cuda ships, by nvcc {cuda_usage.nvcc_release()}: registers of a thread. {spills}",
        "",
        *registers,
        "",
        f"Launches at batch {BATCH}, float16, in eval and, the last six, in training; one that no tile has shared",
        "memory for is left out. The tile is given as the kernel's template arguments. Blocks have",
        f"{cuda_usage.THREADS} threads.",
        "",
        *(line for arch in cuda_usage.MULTIPROCESSORS for line in cuda_table(arch)),
    ]


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
        "Convs through tensor descriptors are candidates of autotuning and no GPU's default: in eval, of the 1x1 convs",
        "with residual. Box: images, rows and columns of a tile; pixels of boxes outside the maps are not used.",
        "",
    ]
    tables = [line for machine in MACHINES for line in table(machine, problems)]
    return "\n".join([*head, *tables, *cuda_report()])


if __name__ == "__main__":
    OUTPUT.write_text(report())
    print(f"wrote {OUTPUT.relative_to(Path.cwd())}" if OUTPUT.is_relative_to(Path.cwd()) else f"wrote {OUTPUT}")

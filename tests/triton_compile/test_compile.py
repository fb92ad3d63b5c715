"""What ships compiles for every architecture: no spills, the tensor cores' own instruction, 16-byte accesses.

Builds are those that the host functions would launch for ``aot.PROBLEMS``. Of each op the forms with the most work in
prologue and epilogue are taken, for the others are parts of them; of float32 a few problems, of bfloat16 one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedres.kernels import aot, configs
from fusedres.kernels.aot import PROBLEMS, Plan, build_of, plans
from fusedres.kernels.bn_finalize import bn_constants, bn_finalize, bn_fold
from fusedres.kernels.channel_stats import channel_stats
from fusedres.kernels.conv_projection import conv_projection
from fusedres.kernels.cubin import MULTIPROCESSORS, usage
from fusedres.kernels.launch import Launch, recording
from fusedres.kernels.pointwise import centre, finish_moments, pointwise_dgrad_operands, pointwise_stats
from fusedres.kernels.pointwise import pointwise_wgrad_of_product as pointwise_wgrad
from fusedres.kernels.pool import bn_relu_maxpool, bn_relu_maxpool_backward
from fusedres.kernels.tails import dbn, drelu_, drelu_dbn, scale_shift_add_relu

MACHINES = ("sm80", "sm90", "sm100")
#: Machines with 99 KiB of shared memory for a block and the tiles of sm_80.
SMALLER = ("sm86", "sm89", "sm120")
FORMS = {"train+prologue", "eval+residual", "residual", "drelu", "prologue"}
#: Problems whose operands are read number by number: channels that are no multiple of 16, or one to a group.
GATHERED = {"stem", "depthwise", "ragged"}
CASES = [
    *[(name, torch.float16) for name in PROBLEMS],
    *[(name, torch.float32) for name in ("stem", "1x1 to 256", "3x3 of 64", "3x3 32x8d stride 2")],
    ("3x3 of 256", torch.bfloat16),
]

ANY_ACCESS = r"(?:ld|st)\.global[\w.:]*|cp\.async\.c[ag]\.shared\.global \[[^\]]+\], \[[^\]]+\], 0x\w+"
NARROW = ("ld.global.b16", "ld.global.u16", "st.global.b16")

machines = pytest.mark.parametrize("machine", MACHINES)


@machines
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_conv_fits_its_machine(name: str, dtype: torch.dtype, machine: str) -> None:
    assert_fits(name, dtype, machine)


@pytest.mark.parametrize("machine", SMALLER)
@pytest.mark.parametrize(("name", "dtype"), [("3x3 of 256", torch.float16), ("3x3 of 64", torch.float32)], ids=str)
def test_the_largest_tiles_fit_machines_of_little_shared_memory(name: str, dtype: torch.dtype, machine: str) -> None:
    assert MULTIPROCESSORS[machine].block_shared_bytes == 99 << 10
    assert_fits(name, dtype, machine)


def tables(machine: str) -> dict[str, configs.Table]:
    return {name: getattr(configs.TABLE[machine], name) for name in ("fprop", "dgrad", "wgrad")}


@pytest.mark.parametrize("machine", SMALLER)
def test_machines_of_little_shared_memory_have_the_tiles_that_are_compiled_for_sm80(machine: str) -> None:
    assert tables(machine) == tables("sm80")
    for (size, _), tile in [item for table in tables(machine).values() for item in table.items()]:
        operands = (tile.block_m + tile.block_n) * tile.block_k * size * tile.num_stages
        assert operands <= 64 << 10


def test_every_capability_has_the_row_of_the_nearest_older() -> None:
    rows = {
        "sm80": [(7, 5), (8, 0)],
        "sm86": [(8, 6), (8, 7)],
        "sm89": [(8, 9)],
        "sm90": [(9, 0)],
        "sm100": [(10, 0), (10, 3), (11, 0)],
        "sm120": [(12, 0), (12, 1), (13, 0)],
    }
    for name, capabilities in rows.items():
        assert {configs.machine_name(*capability) for capability in capabilities} == {name}


def assert_fits(name: str, dtype: torch.dtype, machine: str) -> None:
    """Every form of a problem's convs compiles for the machine without spills, and takes no more than it has."""
    builds: dict[aot.Build, Plan] = {p.build: p for p in plans(machine, PROBLEMS[name], dtype) if p.form in FORMS}
    assert len(builds) == len(FORMS)
    for build, plan in builds.items():
        found = usage(build, machine)
        where = f"{plan.op} {plan.form}: {found[:4]}"
        assert found.spilled_bytes == 0, where
        assert found.shared_bytes <= MULTIPROCESSORS[machine].block_shared_bytes, where
        assert found.blocks_per_multiprocessor(machine) >= 1, where
        assert dtype == torch.float32 or found.has_matrix_instruction(machine), where
        if name not in GATHERED:
            accesses = found.instructions(ANY_ACCESS)
            assert not set(accesses) & set(NARROW), f"{where} {accesses}"
            assert any(a.endswith("0x10") or a.startswith("ld.global.v4.b32") for a in accesses), f"{where} {accesses}"
            assert any(a.startswith("st.global.v4.b32") for a in accesses), f"{where} {accesses}"


@machines
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["1x1 to 64", "3x3 of 64"])  # where bottlenecks and basic blocks begin
def test_borders_of_blocks_fit_their_machine(name: str, dtype: torch.dtype, machine: str) -> None:
    (plan,) = (p for p in plans(machine, PROBLEMS[name], dtype) if p.form == "border+projection")
    found = usage(plan.build, machine)
    assert found.spilled_bytes == 0, found[:4]
    assert found.shared_bytes <= MULTIPROCESSORS[machine].block_shared_bytes, found[:4]
    assert dtype == torch.float32 or found.has_matrix_instruction(machine), found[:4]


def projections(dtype: torch.dtype) -> Iterator[Launch]:
    """The ends of a ResNet-50's first and last projected blocks at batch 256, and of one with ragged channels."""
    for c, c_d, k, side, stride in ((64, 64, 256, 56, 1), (512, 1024, 2048, 14, 2), (20, 36, 50, 15, 2)):
        size = -(-side // stride)
        x, x_d = (
            meta(256, *shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for shape in ((c, size, size), (c_d, side, side))
        )
        bias = meta(k, dtype=dtype)
        with recording() as launches:
            conv_projection(
                x,
                meta(k, c, 1, 1, dtype=dtype),
                bias,
                x_d,
                meta(k, c_d, 1, 1, dtype=dtype),
                bias,
                (stride, stride),
                True,
            )
        yield from launches


@pytest.mark.parametrize("machine", [*MACHINES, "sm86"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_projections_fit_their_machine(dtype: torch.dtype, machine: str) -> None:
    with configs.planning(machine):
        first, last, ragged = projections(dtype)
    for launch in (first, last, ragged):
        found = usage(build_of(launch), machine)
        assert found.spilled_bytes == 0, found[:4]
        assert found.shared_bytes <= MULTIPROCESSORS[machine].block_shared_bytes, found[:4]
        assert dtype == torch.float32 or found.has_matrix_instruction(machine), found[:4]
        if launch is not ragged:
            accesses = found.instructions(ANY_ACCESS)
            assert not set(accesses) & set(NARROW), accesses
            assert any(a.startswith("st.global.v4.b32") for a in accesses), accesses


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def tail_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Of every op but the convs, those with all operands, on a ResNet-50's stem and first stage at batch 256."""

    def activation(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return meta(*size, dtype=dtype).contiguous(memory_format=torch.channels_last)

    c, k = 64, 256
    z, bn, sums, vector = activation(256, k, 56, 56), meta(4, k), meta(2, k), meta(k)
    stem, stem_bn, pooled = activation(256, c, 112, 112), meta(4, c), activation(256, c, 56, 56)
    tap, pool = activation(256, c, 56, 56, dtype=torch.uint8), (3, 2, 1)
    running = (vector, vector, torch.empty((), dtype=torch.int64, device="meta"))
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (scale_shift_add_relu, (z, bn, z, bn, True)),
        (drelu_dbn, (z, z, z, bn, z, bn)),
        (drelu_, (z, z, bn, vector)),
        (channel_stats, (z,)),
        (dbn, (z, z, bn, sums, 0.5)),
        (bn_relu_maxpool, (stem, stem_bn, *pool)),
        (bn_relu_maxpool_backward, (pooled, tap, stem, stem_bn, *pool, 0.5)),
        (bn_finalize, (meta(3, k), vector, vector, *running, 0.1, 1e-5)),
        (bn_constants, (vector, vector, vector, vector, 1e-5, torch.float32)),
        (bn_fold, (meta(k, c, 1, 1, dtype=dtype), meta(k, dtype=dtype), bn)),
    ]
    for op, args in calls:
        with recording() as launches:
            op(*args)
        yield from launches


@machines
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tails_fit_their_machine(dtype: torch.dtype, machine: str) -> None:
    names = set()
    for launch in tail_launches(dtype):
        names.add(name := launch.kernel.fn.__name__)
        found = usage(build_of(launch), machine)
        assert found.spilled_bytes == 0, f"{name}: {found[:4]}"
        assert found.shared_bytes <= MULTIPROCESSORS[machine].block_shared_bytes, f"{name}: {found[:4]}"
        accesses = found.instructions(ANY_ACCESS)
        assert any(a.startswith("ld.global.v4.b32") for a in accesses), f"{name}: {accesses}"
    assert len(names) == 12


@machines
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_products_of_closed_units_fit_their_machine(dtype: torch.dtype, machine: str) -> None:
    c, k = 512, 2048
    w, moments, bn, sums, mean = meta(k, c, 1, 1, dtype=dtype), meta(c + 1, c), meta(4, k), meta(2, k), meta(c)
    names = set()
    with recording() as launches:
        centred = centre(meta(12544, c, dtype=dtype), mean)
        finish_moments(meta(c, c), mean, centred)
        pointwise_stats(moments, w, meta(k, dtype=dtype), 12544)
        pointwise_wgrad(meta(k, c), meta(k), moments, w, bn, 1e-4)
        pointwise_dgrad_operands(moments, w, bn, sums, 1e-4)
    for launch in launches:
        names.add(name := launch.kernel.fn.__name__)
        found = usage(build_of(launch), machine)
        assert found.spilled_bytes == 0, f"{name}: {found[:4]}"
        assert found.shared_bytes <= MULTIPROCESSORS[machine].block_shared_bytes, f"{name}: {found[:4]}"
    assert len(names) == 7


@pytest.mark.parametrize("machine", MULTIPROCESSORS)
def test_every_machine_has_tiles_and_a_target(machine: str) -> None:
    assert machine in configs.TABLE
    assert machine in aot.CAPABILITY


def test_offsets_beyond_32_bits_are_compiled_in_where_a_tensor_needs_them() -> None:
    small, large = (
        next(iter(plans("sm90", PROBLEMS["1x1 to 256"].__class__(n, 64, 56, 56, 256, 1, 1), torch.float16)))
        for n in (256, 4096)
    )
    wide = [dict(plan.build.constexprs)["WIDE"] for plan in (small, large)]
    assert wide == [False, True]


@pytest.mark.parametrize("name", ["1x1 to 256", "3x3 stride 2", "stem"])
def test_kernels_with_offsets_of_64_bits_compile(name: str) -> None:
    problem = replace(PROBLEMS[name], N=16384)
    builds = {plan.build for plan in plans("sm90", problem, torch.float16) if plan.form in FORMS}
    assert len(builds) == len(FORMS)
    for build in builds:
        assert dict(build.constexprs)["WIDE"]
        assert usage(build, "sm90").spilled_bytes == 0

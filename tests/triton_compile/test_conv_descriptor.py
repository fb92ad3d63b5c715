"""Convolutions through tensor descriptors, compiled: every candidate, with the hardware's own copies of boxes."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs

from fusedres import launches
from fusedres.kernels import aot, configs, conv_descriptor
from fusedres.kernels.aot import PROBLEMS, Operands, build_of
from fusedres.kernels.configs import Tile
from fusedres.kernels.cubin import MULTIPROCESSORS, usage
from fusedres.kernels.launch import Launch, recording
from fusedres.problem import ConvProblem

#: Of each op a call with its epilogue; one of them takes statistics.
CALLS = (
    ("1x1 to 256", "conv_fprop", "eval+residual", torch.float16),
    ("3x3 of 256", "conv_fprop", "train", torch.bfloat16),
    ("1x1 to 64", "conv_dgrad", "residual", torch.float16),
)
CASES = [(name, tile) for name in ("sm90", "sm100", "sm120") for tile in configs.TABLE[name].descriptors]
TILE = Tile(128, 128, 64, 8, 3, descriptors=True)
LOAD, STORE = r"cp\.async\.bulk\.tensor\.\dd\.shared", r"cp\.async\.bulk\.tensor\.\dd\.global\.shared"


def arguments(problem: ConvProblem, op: str, form: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Those of a call; a gradient is read as it is."""
    calls = {"conv_fprop": aot.fprop_calls, "conv_dgrad": aot.dgrad_calls}[op]
    args = dict(calls(Operands(problem, dtype)))[form]
    return args if op == "conv_fprop" else (args[0], None, None, None, 0.0, *args[5:])


def launch_of(
    machine: str, tile: Tile, problem: ConvProblem, op: str, form: str, dtype: torch.dtype = torch.float16
) -> Launch:
    """The conv's own launch of a call."""
    function = {name: function for name, function, _ in aot.OPS}[op]
    with configs.planning(machine), configs.trying(tile), recording() as launches:
        function(*arguments(problem, op, form, dtype))
    return launches[0]


@pytest.mark.parametrize(("machine", "tile"), CASES, ids=str)
def test_candidates_fit_their_machine(machine: str, tile: Tile) -> None:
    for name, op, form, dtype in CALLS:
        launch = launch_of(machine, tile, PROBLEMS[name], op, form, dtype)
        assert launch.kernel.fn.__name__ == "conv_descriptor_kernel"
        found = usage(build_of(launch), machine)
        where = f"{op} {form}: {found[:4]}"
        assert found.has_matrix_instruction(machine), where
        assert found.instructions(LOAD), where
        assert found.instructions(STORE), where
        assert found.shared_bytes <= MULTIPROCESSORS[machine].block_shared_bytes, where
        assert found.blocks_per_multiprocessor(machine) >= max(tile.programs, 1), where
        if machine != "sm120":  # there Triton 3.6 keeps a few bytes of stack in every kernel with descriptors
            assert found.spilled_bytes == 0, where


@pytest.mark.parametrize("name", ["1x1 to 256", "3x3 of 256"])
@pytest.mark.parametrize(("op", "form"), [("conv_fprop", "eval"), ("conv_dgrad", "bare")])
def test_wgmma_reads_both_operands_from_where_they_are_copied_to(name: str, op: str, form: str) -> None:
    for tile in (TILE, TILE._replace(programs=1)):
        found = usage(build_of(launch_of("sm90", tile, PROBLEMS[name], op, form)), "sm90")
        products = re.findall(r"wgmma\.mma_async[^}]*\},\s*([^,]+),\s*([^,]+),", found.ptx)
        assert products
        assert all(first.startswith("%rd") and second.startswith("%rd") for first, second in products), products[:1]
        assert "ldmatrix" not in found.ptx


@pytest.mark.parametrize(("machine", "nothing"), [("sm90", "LDGSTS"), ("sm100", "LDGSTS")])
def test_machine_code_has_the_copies_of_boxes(machine: str, nothing: str, tmp_path: Path) -> None:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(
        build_of(launch_of(machine, TILE, PROBLEMS["3x3 of 256"], "conv_fprop", "eval+residual"))
        .compile(machine)
        .asm["cubin"]
    )
    command = [knobs.nvidia.cuobjdump.path, "-sass", str(path)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {"UTMALDG", "UTMASTG"} <= set(re.findall(r"\b(UTMALDG|UTMASTG)\b", code))
    assert nothing not in code


@pytest.mark.parametrize("machine", MULTIPROCESSORS)
def test_machines_without_such_copies_are_offered_none(machine: str) -> None:
    has_copies = aot.CAPABILITY[machine] >= 90
    for name, op, form, dtype in CALLS:
        with configs.planning(machine):
            offered = conv_descriptor.candidates(op, PROBLEMS[name], arguments(PROBLEMS[name], op, form, dtype))
        assert bool(offered) == has_copies
        kernel = launch_of(machine, TILE, PROBLEMS[name], op, form, dtype).kernel.fn.__name__
        assert kernel == ("conv_descriptor_kernel" if has_copies else f"{op}_kernel")


def test_no_table_has_tiles_with_descriptors() -> None:
    for machine in configs.TABLE.values():
        tiles = [tile for table in machine[:3] for tile in table.values()]
        assert not any(tile.descriptors or tile.programs for tile in tiles)


def test_persistent_programs_are_as_many_as_the_machine_holds() -> None:
    few, many = (replace(PROBLEMS["1x1 to 256"], N=n) for n in (1, 256))
    for programs in (1, 2):
        tile = TILE._replace(programs=programs)
        assert launch_of("sm90", tile, many, "conv_fprop", "eval").grid == (132 * programs,)
        assert launch_of("sm90", tile, few, "conv_fprop", "eval").grid == (25 * 2,)


@pytest.mark.parametrize("name", ["1x1 to 256", "3x3 of 64"])
def test_tensors_beyond_32_bits_take_the_same_kernel(name: str) -> None:
    small, large = (
        launch_of("sm90", TILE, replace(PROBLEMS[name], N=n), "conv_fprop", "eval+residual") for n in (256, 16384)
    )
    assert build_of(small) == build_of(large)
    assert max(large.boxes["y"].strides) * large.boxes["y"].shape[0] >= 2**31


def test_launches_with_descriptors_are_left_to_tritons_launcher() -> None:
    """A launch list has words of 64 bits, a descriptor 128 bytes that hold an address."""
    launch = launch_of("sm90", TILE, PROBLEMS["1x1 to 256"], "conv_fprop", "eval")
    build = build_of(launch)
    compiled = build.compile("sm90")
    words = SimpleNamespace(metadata=compiled.metadata, src=compiled.src, function=1)
    assert launches.Kernel.of(words, build.kernel.arg_names, (*launch.grid, 1, 1)) is None
    pointers = {name: "*fp16" if kind.startswith("tensordesc") else kind for name, kind in build.signature}
    words.src = SimpleNamespace(signature=pointers)
    assert launches.Kernel.of(words, build.kernel.arg_names, (*launch.grid, 1, 1)) is not None

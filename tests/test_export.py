"""Exported programs in eval: fused ops or, on request, ATen's alone; saved, loaded without this library, compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import images, small_twins
from oracles import batch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fusedres

pytestmark = pytest.mark.usefixtures("one_thread")

single = torch.float32
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)
kinds = pytest.mark.parametrize("kind", ["basic", "bottleneck"])


def exported(net: nn.Module, x: Tensor, grad: bool = False) -> ExportedProgram:
    """``net`` for any number of pictures, with BN folded unless gradients may be wanted."""
    with torch.set_grad_enabled(grad):
        return torch.export.export(net, (x,), dynamic_shapes=({0: Dim("batch", min=1)},))


def namespaces(program: ExportedProgram) -> set[str]:
    """Whose ops a program calls."""
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {call.namespace for call in calls if isinstance(call, torch._ops.OpOverload)}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("grad", [False, True], ids=["folded", "with gradients"])
def test_exported_network_equals_eager_for_any_batch_in_either_kind_of_ops(kind: str, grad: bool) -> None:
    fused, eager = (net.eval() for net in small_twins(kind, single))
    program = exported(fused, images(2, dtype=single), grad)
    standard = program.run_decompositions(fusedres.decompositions())
    assert "fusedres" in namespaces(program)
    assert namespaces(standard) == {"aten"}
    with torch.no_grad():
        for n in (1, 3):
            x = images(n, dtype=single)
            assert_close(program.module()(x), eager(x))
            assert_close(standard.module()(x), eager(x))


def test_saved_program_of_standard_ops_runs_where_fusedres_is_not(tmp_path: Path) -> None:
    fused, eager = (net.eval() for net in small_twins("basic", single))
    x = images(3, dtype=single)
    program = exported(fused, images(2, dtype=single)).run_decompositions(fusedres.decompositions())
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save(x, tmp_path / "x.pt")
    run = (
        "import sys, torch; sys.modules['fusedres'] = None;"
        " torch.save(torch.export.load('net.pt2').module()(torch.load('x.pt')).detach(), 'y.pt')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", run], cwd=tmp_path, check=True)
    with torch.no_grad():
        assert_close(torch.load(tmp_path / "y.pt"), eager(x))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("standard", [False, True], ids=["fused ops", "standard ops"])
def test_program_compiled_ahead_of_time_equals_eager(standard: bool, tmp_path: Path) -> None:
    fused, eager = (net.layer2[0].eval() for net in small_twins("basic", single))
    x = batch(2, 64, 9, 8)
    program = exported(fused, x)
    if standard:
        program = program.run_decompositions(fusedres.decompositions())
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        for given in (x, batch(5, 64, 9, 8, seed=2)):  # in the memory format of the example, which it takes for granted
            assert_close(compiled(given), eager(given))

"""``pytest bench/``: one group of each kind really runs, and what computes something else is not timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

ROOT = Path(__file__).parents[1]
CONV = "bench_conv and 512 and train"
SOME = f"({CONV}) or (tail and residual and 2048 and not compile) or (block and basic512-train)"


def run_benchmarks(folder: Path, chosen: str, *options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # nothing is timed beside others, and this one is none of them
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", "-m", "quick", "-k", chosen, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_eager_and_fused_stand_in_one_group_with_what_they_move(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    done = run_benchmarks(tmp_path, SOME, f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout
    found: dict[str, dict[str, dict]] = {}
    for one in json.loads(path.read_text())["benchmarks"]:
        found.setdefault(one["group"], {})[one["params"]["contestant"]] = one
    assert len(found) == 4
    for contestants in found.values():
        eager, fused = contestants["eager"]["extra_info"], contestants["cpu"]["extra_info"]
        assert fused["launches"] < eager["launches"]
        assert fused["bytes"] < eager["bytes"]
        assert fused["flops"] >= eager["flops"]
        assert fused["device"]
        assert "commit" in fused
        assert contestants["cpu"]["options"]["timer"] == "clock"


BROKEN = """
from fusedres import dispatch

cpu = dispatch.ENGINES["cpu"]
whole = cpu.conv_fprop
cpu.conv_fprop = lambda *args: (whole(*args)[0] * 1.00001, whole(*args)[1])
"""


def test_a_faulty_op_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    path = tmp_path / "found.json"
    done = run_benchmarks(tmp_path, CONV, f"--benchmark-json={path}", "-p", "broken")
    assert done.returncode == 1
    timed = {one["params"]["contestant"] for one in json.loads(path.read_text())["benchmarks"]}
    assert timed == {"eager"}

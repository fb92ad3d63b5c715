"""Bounds add up what two figures of a device allow; the command prints and writes them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from fusedres import cli, roofline
from fusedres.cli.plans import MODES, Planner
from fusedres.engines.triton import TRITON
from fusedres.plan import Launch, Operand
from fusedres.roofline import Roof

ROOF = Roof("toy", bytes_per_s=100.0, flops_per_s=1000.0, source="made up")


@pytest.fixture
def quick_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A roof that takes little to measure, and is none."""
    monkeypatch.setattr(roofline, "_COPIED_BYTES", 4 << 20)
    monkeypatch.setattr(roofline, "_ROUNDS", 2)


def launch(nbytes: int, flops: int) -> Launch:
    return Launch(("op",), "layer", "forward", (Operand((0, 0), nbytes, True),), (), flops)


def test_a_launch_takes_the_longer_of_traffic_and_arithmetic_and_launches_add_up() -> None:
    found = roofline.bound([launch(100, 500), launch(50, 2000)], ROOF)
    assert found == (2, 150, 150, 2500, 1.0 + 2.0, 1.0)


def test_resnet50_moves_about_what_the_design_states() -> None:
    """Per image in float16: 149 MB eager, 51 fused by convs, 26 by blocks."""
    planner = Planner("resnet50", "standard", torch.float16, "cuda", training=False)
    for mode, stated in zip(MODES, (149, 51, 26), strict=True):
        moved = sum(launch.activation_bytes for launch in planner.plan(mode, 16, 224)) / 16 / 1e6
        assert moved == pytest.approx(stated, rel=0.11), mode


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "cifar_resnet20"])
def test_each_mode_moves_less_in_fewer_launches_than_the_one_before(arch: str, training: bool) -> None:
    planner = Planner(arch, "standard", torch.float32, "cpu", training)
    bounds = [roofline.bound(planner.plan(mode, 16, 64), ROOF) for mode in MODES]
    for worse, better in itertools.pairwise(bounds):
        assert better.activation_bytes < worse.activation_bytes
        assert better.launches < worse.launches


def test_recompute_moves_more_than_standard() -> None:
    moved = [
        sum(launch.bytes for launch in Planner("resnet50", memory, torch.float32, "cpu", True).plan("conv", 8, 64))
        for memory in ("standard", "recompute")
    ]
    assert moved[0] < moved[1]


def test_roof_of_this_machine_is_positive_and_says_how_it_was_measured(quick_roof: None) -> None:
    roof = roofline.measured(torch.device("cpu"), torch.float32)
    assert roof.bytes_per_s > 1e8
    assert roof.flops_per_s > 1e8
    assert "copy of 4 MiB" in roof.source


@pytest.mark.parametrize("fastest", ["product", "convolution"])
def test_roof_is_of_whatever_computes_fastest(fastest: str, quick_roof: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(calls: dict[str, object], rounds: int, device: torch.device) -> dict[str, list[float]]:
        return {name: [0.5, 0.01 if fastest in name else 1.0] for name in calls}

    monkeypatch.setattr(roofline, "interleaved", timed)
    roof = roofline.measured(torch.device("cpu"), torch.float32)
    assert fastest in roof.source
    assert roof.flops_per_s == {"product": 2 * 2048**3, "convolution": 18 * 8 * (256 * 28) ** 2}[fastest] / 0.01


def test_command_prints_and_writes_the_same_plan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "made" / "roof.json"
    argv = ["roofline", "--gpu", "h100", "--arch", "resnet18", "--batch", "4", "--mode", "block", "--json", str(path)]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H100 SXM" in out
    assert "layer4.1" in out
    written = json.loads(path.read_text())
    assert written["roof"]["bytes_per_s"] == roofline.GPUS["h100"].bytes_per_s
    for mode in MODES:
        whole, layers = written["modes"][mode]["whole"], written["modes"][mode]["layers"]
        for key in ("launches", "bytes", "flops"):
            assert whole[key] == sum(layer[key] for layer in layers)
        assert whole["seconds"] == pytest.approx(sum(layer["seconds"] for layer in layers))
    assert f"{1e3 * written['modes']['block']['whole']['seconds']:.3f}" in out


@pytest.mark.parametrize(("gpu", "engine"), [("h100", "cudnn"), ("a100", "triton")])
def test_a_plan_is_for_the_gpu_that_is_named(gpu: str, engine: str, capsys: pytest.CaptureFixture) -> None:
    if TRITON.missing is not None:
        pytest.skip(f"needs triton: {TRITON.missing}")
    assert cli.main(["roofline", "--gpu", gpu, "--arch", "cifar_resnet20", "--batch", "4"]) == 0
    assert f"planned for cuda: the engine {engine}" in capsys.readouterr().out


def test_measured_times_are_held_against_their_bounds(
    quick_roof: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "r.json"
    bench = ["bench", "--arch", "cifar_resnet20", "--batch", "2", "--rounds", "1", "--eval", "--json", str(path)]
    assert cli.main(bench) == 0
    capsys.readouterr()
    assert cli.main(["roofline", "--results", str(path)]) == 0
    out = capsys.readouterr().out
    assert "share of the bound reached" in out
    assert out.count("cifar_resnet20 eval") == 3
    result = json.loads(path.read_text())
    result["machine"]["cpu"] = "another"
    path.write_text(json.dumps(result))
    assert cli.main(["roofline", "--results", str(path)]) == 2
    assert "another machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "abacus"], "no GPU is named 'abacus'; there are a10"),
        (["--gpu", "h100", "--dtype", "float32"], "float16 and bfloat16"),
        (["--gpu", "h100", "--arch", "resnet51"], "no network is named"),
        (["--eval", "--train"], "not allowed with"),
        (["--results", "nowhere.json"], "cannot read"),
    ],
)
def test_what_the_command_refuses(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["roofline", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

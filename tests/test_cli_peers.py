"""Peers of the benchmark: same weights, numbers compared first; who takes no part says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import shake
from torch import Tensor, nn
from torchvision import models

from fusedres import cli, roofline
from fusedres.cli import contest, peers, proof, scaling
from fusedres.cli.contest import CHANNELS_LAST, FUSED, NCHW, Contest
from fusedres.cli.peers import EVAL, TRAIN, Peer
from fusedres.cli.scaling import Point

CPU = torch.device("cpu")


def contest_of(arch: str = "cifar_resnet20") -> Contest:
    return Contest(arch, "standard", torch.float32, CPU, 0)


def only(monkeypatch: pytest.MonkeyPatch, *chosen: Peer) -> None:
    monkeypatch.setattr(contest, "PEERS", chosen)


def named(name: str) -> Peer:
    return next(peer for peer in peers.PEERS if peer.name == name)


@pytest.mark.parametrize("name", ["fused, frozen", "ONNX Runtime CPU", "OpenVINO", "timm"])
def test_a_peer_computes_what_eager_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in named(name).needs:
        pytest.importorskip(package, reason=f"needs {package}")
    only(monkeypatch, named(name))
    made = contest_of("resnet18")
    x, target = made.inputs(1, 64, None)  # one picture: an exporter could take it for a constant
    made.invite(EVAL, x)
    (verdict,) = proof.admit(made, EVAL, x)
    assert verdict.holds, made.left_out
    assert verdict.contestant == name
    assert verdict.error < 1e-5
    assert set(made.time(EVAL, x, target, 1, lambda _: None)) == {NCHW, CHANNELS_LAST, FUSED, name}


def test_the_frozen_peer_is_the_fused_network() -> None:
    made = contest_of("resnet18")
    x, _ = made.inputs(1, 64, None)
    frozen = named("fused, frozen").build("resnet18", made.models[CHANNELS_LAST].eval(), x)
    assert type(frozen) is type(made.models[FUSED])


def test_a_peer_that_trains_takes_part_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm", reason="needs timm")
    only(monkeypatch, named("timm"), named("ONNX Runtime CPU"))
    made = contest_of("resnet18")
    x, target = made.inputs(2, 64, None)
    made.invite(TRAIN, x)
    assert all(verdict.holds for verdict in proof.admit(made, TRAIN, x))
    assert "timm" in made.time(TRAIN, x, target, 1, lambda _: None)
    assert made.left_out == {("ONNX Runtime CPU", TRAIN): "it does not train"}


def _off(arch: str, model: nn.Module, x: Tensor) -> peers.Run:
    return lambda x: model(x) * 1.01


def _fails_to_build(arch: str, model: nn.Module, x: Tensor) -> peers.Run:
    raise NotImplementedError("no such op\nand more lines")


def _fails_at_its_first_call(arch: str, model: nn.Module, x: Tensor) -> peers.Run:
    def run(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel image")

    return run


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (_off, "its logits differ from eager's by 1.0e-02"),
        (_fails_to_build, "NotImplementedError: no such op"),
        (_fails_at_its_first_call, "RuntimeError: no kernel image"),
    ],
)
def test_a_peer_that_errs_is_left_out_with_the_reason(
    build: peers.Build, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, Peer("odd", build), Peer("absent", build, needs=("no_such_package",)), named("apex bottleneck"))
    made = contest_of()
    x, _ = made.inputs(2, 32, None)
    made.invite(EVAL, x)
    proof.admit(made, EVAL, x)
    assert made.peers == {}
    assert made.left_out["odd", EVAL].startswith(why)
    assert made.left_out["absent", EVAL] == "no_such_package not installed"
    assert made.left_out["apex bottleneck", EVAL] == "it does not run on cpu"


def test_peers_run_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(arch: str, model: nn.Module, x: Tensor) -> peers.Run:
        nn.init.zeros_(model.get_parameter("fc.weight"))
        return model

    only(monkeypatch, Peer("greedy", build))
    made = contest_of()
    x, target = made.inputs(2, 32, None)
    made.invite(EVAL, x)
    assert not proof.admit(made, EVAL, x)[0].holds
    assert all(verdict.holds for verdict in proof.prove(made, EVAL, x, target))


# Those for GPUs, their kernels replaced by plain PyTorch's: the dataflow and the weights


def same_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def conv_relu(x: Tensor, w: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
        return F.relu(F.conv2d(x, w, bias, *geometry))

    def add_relu(x: Tensor, w: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: Any) -> Tensor:
        return F.relu(F.conv2d(x, w, bias, *geometry) + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_cudnn_network_is_the_eager_one(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    same_on_cpu(monkeypatch)
    eager = shake(models.get_model(arch)).eval().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(peers.CudnnNet(eager)(x), eager(x), rtol=1e-10, atol=1e-10)


class ApexLike(nn.Module):
    """Parameters and numbers of apex's bottleneck: strides in the first conv, a frozen BN that adds no eps."""

    class Norm(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.zeros(n))

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * self.running_var.rsqrt()
            return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)

    def __init__(self, inplanes: int, width: int, outplanes: int, stride: int = 1, use_cudnn: bool = False) -> None:
        super().__init__()
        sizes = ((inplanes, width, 1), (width, width, 3), (width, outplanes, 1))
        for i, (c, k, kernel) in enumerate(sizes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(c, k, kernel, stride if i == 1 else 1, kernel // 2, bias=False))
            self.add_module(f"bn{i}", self.Norm(k))
        downsample = nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), self.Norm(outplanes))
        self.downsample = downsample if stride != 1 or inplanes != outplanes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


def test_apex_blocks_take_the_place_of_those_they_can_be() -> None:
    eager = shake(models.resnet50()).eval().double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = eager(x)
        swapped = peers.with_apex_blocks(eager, ApexLike)
        torch.testing.assert_close(swapped(x), expected, rtol=1e-10, atol=1e-10)
    assert sum(isinstance(module, ApexLike) for module in swapped.modules()) == 16 - 3  # all but the strided ones


# The command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers and axes that cost little."""

    def build(arch: str, model: nn.Module, x: Tensor) -> peers.Run:
        return model

    only(monkeypatch, Peer("again", build, modes=(EVAL, TRAIN)), Peer("odd", _off))
    points = tuple(Point(n, "cifar_resnet20", n, 32) for n in (2, 4))
    monkeypatch.setattr(scaling, "AXES", {"batch": points})
    monkeypatch.setattr(roofline, "_COPIED_BYTES", 4 << 20)
    monkeypatch.setattr(roofline, "_ROUNDS", 2)


def test_everything_in_one_run(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    archs = ["cifar_resnet20", "cifar_plain20"]
    argv = ["bench", "--arch", *archs, "--batch", "2", "--rounds", "4", "--peers", "--bounds", "--scaling"]
    assert cli.main([*argv, "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("*/*.json")
    result = json.loads(path.read_text())
    assert [network["arch"] for network in result["networks"]] == archs
    resnet, plain = result["networks"]
    for timing in resnet["timings"]:
        assert timing["median_s"].keys() == {NCHW, CHANNELS_LAST, FUSED, "again"}
        assert timing["plans"]["block"]["bytes"] < timing["plans"]["conv"]["bytes"] < timing["plans"]["eager"]["bytes"]
    assert {(one["peer"], one["mode"]) for one in resnet["left_out"]} == {("odd", EVAL), ("odd", TRAIN)}
    assert {verdict["contestant"] for verdict in resnet["proof"]} == {FUSED, "again", "odd"}
    assert [(row["mode"], row["value"]) for row in result["scaling"]] == [(m, n) for m in (EVAL, TRAIN) for n in (2, 4)]
    assert all(row["saved_bytes"][FUSED] < row["saved_bytes"][CHANNELS_LAST] for row in result["scaling"][2:])
    assert sum(block["count"] for block in resnet["blocks"] if block["mode"] == EVAL) == 9
    assert sum(block["count"] for block in plain["blocks"] if block["mode"] == EVAL) == 18
    for shown in ("again", "its logits differ", "scaling with batch: train", "blocks: measured"):
        assert shown in out
    assert path.with_suffix(".html").exists()
    assert cli.main(["roofline", "--results", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count("cifar_resnet20 eval") == 4  # contestants
    assert "layer2.0 train" in out


def test_scaling_stops_a_series_that_takes_too_long(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "SECONDS", 0)
    rows = list(scaling.measure_all(torch.float32, CPU, "standard", 0, 1))
    assert [(row["mode"], row["value"]) for row in rows] == [(EVAL, 2), (TRAIN, 2)]


@pytest.fixture
def unequal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Contest]:
    def make(*args: Any) -> Contest:
        made = Contest(*args)
        with torch.no_grad():
            made.models[FUSED].state_dict()["layer1.0.conv1.weight"].mul_(1.001)
        return made

    monkeypatch.setattr(scaling, "Contest", make)
    return make


def test_scaling_proves_before_it_times(quick: None, unequal: Any, tmp_path: Path, capsys) -> None:
    argv = ["bench", "--arch", "cifar_resnet20", "--batch", "2", "--rounds", "1", "--eval", "--scaling"]
    assert cli.main([*argv, "--json", str(tmp_path / "r.json")]) == 1
    assert "does NOT equal eager (cifar_resnet20, eval, 32x32)" in capsys.readouterr().err
    kept = json.loads((tmp_path / "r.json").read_text())  # what was measured before
    assert [network["arch"] for network in kept["networks"]] == ["cifar_resnet20"]
    assert "scaling" not in kept

"""``fusedres experiment``: figures and numbers of what was trained, the same after a kill; costs that are true."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_cli import assert_one_line
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from trained_nets import picture

from fusedres import cli
from fusedres.cli import costs, experiment, learning
from fusedres.training import History, load_checkpoint

pytest.importorskip("matplotlib", reason="needs matplotlib for the figures")

DEGRADATION = experiment.EXPERIMENTS["degradation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures to train on and four held out, in two classes."""
    path = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 4), ("val", 2)):
        for number, label in enumerate(("cat", "dog")):
            (path / split / label).mkdir(parents=True)
            for seed in range(count):
                picture(path / split / label / f"{seed}.png", seed=10 * seed + number)
    return path


def run(name: str, folder: Path, out: Path, *options: object) -> int:
    """``fusedres experiment NAME`` on the folder: two epochs of two iterations."""
    usual = ("--image-size", 8, "--epochs", 2, "--batch", 4, "--threads", 1)
    return cli.main(
        ["experiment", name, "--data", f"imagefolder:{folder}", "--out", str(out), *map(str, (*usual, *options))]
    )


def numbers(out: Path) -> list[dict[str, str]]:
    """The rows of the CSV file less their times."""
    (path,) = out.glob("*.csv")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(path.read_text().splitlines())]


# Learning curves


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished degradation experiment."""
    out = tmp_path_factory.mktemp("whole")
    assert run("degradation", folder, out) == 0
    return out


def test_figure_numbers_and_summary_are_written(whole: Path) -> None:
    assert (whole / "degradation.png").read_bytes().startswith(b"\x89PNG")
    rows = numbers(whole)
    assert [(row["net"], row["epoch"], row["iteration"]) for row in rows] == [
        (net, str(epoch), str(2 * epoch)) for net in DEGRADATION.nets for epoch in (1, 2)
    ]
    summary = json.loads((whole / "degradation.json").read_text())
    assert list(summary["nets"]) == list(DEGRADATION.nets)
    for row in rows[1::2]:
        for error in ("train_error", "test_error"):
            assert summary["nets"][row["net"]][error] == pytest.approx(float(row[error]), abs=1e-6)
    assert summary["nets"]["cifar_plain56"]["settings"]["arch"] == "cifar_plain56"


def test_errors_are_those_of_the_checkpoints(whole: Path) -> None:
    for net in DEGRADATION.nets:
        last = load_checkpoint(whole / net / "checkpoint.pt")["history"]["epochs"][-1]
        row = next(row for row in numbers(whole) if row["net"] == net and row["epoch"] == "2")
        assert float(row["train_error"]) == pytest.approx(1 - last["train_accuracy"], abs=1e-6)
        assert float(row["test_error"]) == pytest.approx(1 - last["test_accuracy"], abs=1e-6)


# What is replaced: each epoch's checkpoint (8), then the figure, the CSV file, the JSON file.
@pytest.mark.parametrize(
    "moment", [1, 4, 6, 10], ids=["nothing saved", "second net", "third net", "results half written"]
)
def test_killed_experiment_resumes_to_the_same_numbers(
    moment: int, folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = []

    def replace(source: str, target: str, real: Callable = os.replace) -> None:
        moves.append(target)
        if len(moves) == moment:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert run("degradation", folder, tmp_path) == 130
    assert run("degradation", folder, tmp_path, "--resume") == 0
    assert len(numbers(tmp_path)) == 8
    assert numbers(tmp_path) == numbers(whole)
    for net in DEGRADATION.nets:
        states = [load_checkpoint(out / net / "checkpoint.pt")["model"] for out in (whole, tmp_path)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_experiment_is_not_overwritten(folder: Path, whole: Path, capsys: pytest.CaptureFixture) -> None:
    before = numbers(whole)
    code = run("degradation", folder, whole)
    assert_one_line(code, capsys.readouterr().err, str(whole), "--resume")
    assert numbers(whole) == before


def test_resuming_with_other_settings_is_refused(folder: Path, whole: Path, capsys: pytest.CaptureFixture) -> None:
    assert_one_line(run("degradation", folder, whole, "--resume", "--lr", 3), capsys.readouterr().err, "lr 0.1", "3.0")


def test_plain_and_residual_nets_of_18_and_34_layers_are_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("plain-vs-residual", folder, tmp_path, "--image-size", 32, "--epochs", 1) == 0
    out = capsys.readouterr().out
    assert "plain: 34 layers end at" in out
    assert "residual: 34 layers end at" in out
    assert [row["net"] for row in numbers(tmp_path)] == ["plain18", "plain34", "resnet18", "resnet34"]


@pytest.mark.parametrize("name", experiment.EXPERIMENTS)
def test_help_of_every_experiment(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["experiment", name, "--help"])
    assert stop.value.code == 0
    assert f"usage: fusedres experiment {name}" in capsys.readouterr().out


def history(*train_accuracies: float) -> History:
    """A run with an epoch for each accuracy, in training and test alike."""
    return History(epochs=[{"train_accuracy": a, "test_accuracy": a} for a in train_accuracies])


def test_final_error_is_the_mean_of_the_last_tenth_of_the_epochs() -> None:
    errors = learning.final_errors(history(*[0.0] * 18, 0.9, 0.7))
    assert errors["train_error"] == pytest.approx(0.2)
    assert learning.final_errors(history(0.0, 0.75))["test_error"] == 0.25


@pytest.mark.parametrize(("deep", "word"), [(0.2, " higher"), (0.1, "no higher"), (0.05, "no higher")])
def test_verdict_says_whether_the_deeper_net_ends_worse_in_training(deep: float, word: str) -> None:
    ends = {
        "cifar_plain20": {"train_error": 0.1, "test_error": 0.9},
        "cifar_plain56": {"train_error": deep, "test_error": 0.0},
        "cifar_resnet20": {"train_error": 0.5, "test_error": 0.5},
        "cifar_resnet56": {"train_error": 0.4, "test_error": 0.5},
    }
    assert f"{word} with depth" in learning.verdict("plain", ends)
    assert f"56 layers end at {100 * deep:.2f}%" in learning.verdict("plain", ends)
    assert "no higher with depth" in learning.verdict("residual", ends)


# Costs


LAYERS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
LAYERS |= {"vgg19_bn": 19, "googlenet": 22}  # Simonyan and Zisserman 2014; Szegedy et al. 2014


def test_every_net_is_in_the_table() -> None:
    assert list(LAYERS) == [*experiment.EXPERIMENTS["depth"].nets, *costs.PREDECESSORS]


@pytest.mark.parametrize(("net", "layers"), LAYERS.items())
def test_layers_parameters_and_flops_are_those_of_torchvisions_model(net: str, layers: int) -> None:
    options = {"aux_logits": False, "init_weights": False} if net == "googlenet" else {}
    with torch.device("meta"):
        eager = models.get_model(net, weights=None, **options).eval()
        with FlopCounterMode(display=False) as counter:
            eager(torch.empty(1, 3, 64, 64))
    parameters = sum(parameter.numel() for parameter in eager.parameters())
    assert costs.size(net, 64) == {"layers": layers, "parameters": parameters, "flops": counter.get_total_flops()}


def run_depth(folder: Path, out: Path, *options: object) -> int:
    small = ("--image-size", 32, "--epochs", 1, "--cost-size", 32, "--cost-batch", 2, "--rounds", 1)
    return run("depth", folder, out, *small, *options)


def test_error_time_and_memory_over_the_depth(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    depth = experiment.EXPERIMENTS["depth"]
    monkeypatch.setitem(experiment.EXPERIMENTS, "depth", depth._replace(nets=("resnet18", "resnet34")))
    monkeypatch.delitem(costs.PREDECESSORS, "vgg19_bn")  # the larger ones would take half a minute
    assert run_depth(folder, tmp_path) == 0
    assert "ms inference" in capsys.readouterr().out
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    rows = numbers(tmp_path)
    assert [(row["net"], row["layers"]) for row in rows] == [
        ("resnet18", "18"),
        ("resnet34", "34"),
        ("googlenet", "22"),
    ]
    assert [bool(row["train_error"]) for row in rows] == [True, True, False]  # predecessors are not trained
    for row in rows:
        assert float(row["train_seconds"]) > float(row["eval_seconds"]) > 0
        assert float(row["saved_bytes"]) > 0

    measured: list[list[str]] = []

    def measure(args: object, nets: list[str], device: torch.device) -> dict:
        measured.append(nets)
        return {net: dict.fromkeys(costs_of_one, 1.0) for net in nets}

    costs_of_one = ("layers", "parameters", "flops", "eval_seconds", "train_seconds", "saved_bytes")
    monkeypatch.setattr(costs, "_measure", measure)
    assert run_depth(folder, tmp_path, "--resume") == 0
    assert measured == []  # what was measured alike is kept
    assert numbers(tmp_path) == rows
    assert run_depth(folder, tmp_path, "--resume", "--rounds", 2) == 0
    (tmp_path / "costs.json").write_text("torn")
    assert run_depth(folder, tmp_path, "--resume", "--rounds", 2) == 0
    assert measured == [["resnet18", "resnet34", "googlenet"]] * 2
    assert numbers(tmp_path)[0]["flops"] == "1.0"

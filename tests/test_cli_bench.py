"""``fusedres bench`` and ``fusedres report``: proof first, then figures that are never typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedres import cli
from fusedres.cli import bench, contest, photo, plot, proof, report, results, tables
from fusedres.cli.contest import CHANNELS_LAST, FUSED, NCHW, Contest

TINY = ["--arch", "resnet18", "--image-size", "64", "--rounds", "1"]
NAMES = {NCHW, CHANNELS_LAST, FUSED}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one small benchmark wrote."""
    path = tmp_path_factory.mktemp("bench") / "made" / "result.json"
    assert cli.main(["bench", *TINY, "--batch", "1", "2", "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.fixture
def network(result: dict[str, Any]) -> dict[str, Any]:
    """Its one network."""
    return result["networks"][0]


def test_result_says_what_was_measured_and_where(result: dict[str, Any]) -> None:
    assert result["schema"] == results.SCHEMA
    assert {"cpu", "cores", "threads", "isa", "gpus"} <= result["machine"].keys()
    assert result["versions"]["torch"] == torch.__version__
    assert (result["settings"]["dtype"], result["settings"]["rounds"]) == ("float32", 1)
    assert len(result["load"]["before"]) == len(result["load"]["after"]) == 3
    (network,) = result["networks"]
    assert (network["arch"], network["image_size"], network["eager"]) == ("resnet18", 64, "torchvision")


def test_inference_is_timed_at_every_batch_and_training_at_the_largest(network: dict[str, Any]) -> None:
    assert [(t["mode"], t["batch"]) for t in network["timings"]] == [("eval", 1), ("eval", 2), ("train", 2)]
    for timing in network["timings"]:
        assert timing["samples_s"].keys() == timing["median_s"].keys() == NAMES
        assert all(len(samples) == 1 for samples in timing["samples_s"].values())
        fastest = min(timing["median_s"][NCHW], timing["median_s"][CHANNELS_LAST])
        assert timing["ratio"] == pytest.approx(fastest / timing["median_s"][FUSED])


def test_proof_is_part_of_the_result(network: dict[str, Any]) -> None:
    assert all(line["holds"] and line["error"] <= line["bound"] for line in network["proof"])
    assert {(line["mode"], line["what"]) for line in network["proof"]} == {
        ("eval", "output"),
        ("train", "output"),
        ("train", "gradients"),
        ("train", "running statistics"),
    }
    assert {line["dtype"] for line in network["proof"]} == {"float32", "float64"}


def test_launches_and_memory_are_less_than_eager_ones(network: dict[str, Any]) -> None:
    assert [row["block"] for row in network["launches"]] == ["layer1.0", "layer2.0"]
    for row in network["launches"]:
        assert row[FUSED]["forward"] < row[CHANNELS_LAST]["forward"]
        assert row[FUSED]["backward"] < row[CHANNELS_LAST]["backward"]
    saved = network["saved_bytes_per_image"]
    assert saved["recompute"] < saved["standard"] < saved["eager"]


@pytest.mark.parametrize("arch", ["cifar_resnet20", "cifar_plain20"])
def test_nets_that_torchvision_lacks(arch: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "result.json"
    assert cli.main(["bench", "--arch", arch, "--batch", "2", "--rounds", "1", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["networks"][0]["eager"] == "plain modules"
    assert "speed-up" in capsys.readouterr().out


def test_photo_is_the_input(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    picture = tmp_path / "photo.png"
    image.radial_gradient("L").resize((90, 60)).save(picture)
    path = tmp_path / "result.json"
    assert cli.main(["bench", *TINY, "--eval", "--batch", "2", "--input", str(picture), "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["settings"]["input"] == "photo"
    assert written["networks"][0]["saved_bytes_per_image"] == {}
    x, _ = Contest("resnet18", "standard", torch.float32, torch.device("cpu"), 0).inputs(2, 64, photo.read(picture, 64))
    assert x.shape == (2, 3, 64, 64)
    assert not torch.equal(x[0], x[1])


def broken(parameter: str, factor: float) -> Contest:
    """A contest whose fused network has one parameter or buffer a little off."""
    made = Contest("cifar_resnet20", "standard", torch.float32, torch.device("cpu"), 0)
    with torch.no_grad():
        made.models[FUSED].state_dict()[parameter].mul_(factor)
    return made


@pytest.mark.parametrize(
    ("mode", "parameter", "factor"),
    [
        ("eval", "layer2.1.bn1.running_var", 1.001),
        ("eval", "layer3.0.conv2.weight", 1.0001),
        ("train", "layer1.2.bn2.weight", 1.001),
        ("train", "layer2.0.bn1.running_mean", 1.01),
    ],
)
def test_proof_sees_a_small_fault(mode: str, parameter: str, factor: float) -> None:
    made = broken(parameter, factor)
    x, target = made.inputs(4, 32, None)
    assert not all(verdict.holds for verdict in proof.prove(made, mode, x, target))


def test_proof_leaves_the_contestants_as_they_were() -> None:
    made = broken("fc.bias", 1.0)
    before = {name: value.clone() for name, value in made.models[FUSED].state_dict().items()}
    x, target = made.inputs(2, 32, None)
    assert all(verdict.holds for verdict in proof.prove(made, "train", x, target))
    assert all(torch.equal(value, before[name]) for name, value in made.models[FUSED].state_dict().items())


def test_nothing_is_timed_where_the_proof_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "Contest", lambda *_: broken("layer1.0.conv1.weight", 1.01))
    monkeypatch.setattr(contest.measure, "interleaved", lambda *_: pytest.fail("timed"))
    code = cli.main(["bench", "--arch", "cifar_resnet20", "--batch", "2", "--json", str(tmp_path / "r.json")])
    assert code == bench.EXIT_NOT_EQUAL
    assert "NOT equal" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_nan_fails_the_proof() -> None:
    assert not proof.Verdict("eval", 1, "float32", "output", float("nan"), 0.1, 0.2).holds


# Reports


@pytest.fixture
def stored(result: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    return path


def test_report_prints_every_figure(stored: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", str(stored)]) == 0
    out = capsys.readouterr().out
    assert "launches per block" in out
    assert "MB an image" in out


def test_report_is_put_between_the_marks(stored: Path, result: dict[str, Any], tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # the second time changes nothing
        assert cli.main(["report", str(stored), "--into", str(document)]) == 0
        text = document.read_text()
        assert text == f"before\n{report.BEGIN}\n{tables.markdown(result)}\n{report.END}\nafter\n"
    assert f"{result['networks'][0]['timings'][0]['ratio']:.2f}x" in text
    assert result["versions"]["torch"] in text


def test_report_into_a_document_without_marks_is_refused(stored: Path, tmp_path: Path, capsys) -> None:
    document = tmp_path / "README.md"
    document.write_text("no marks\n")
    assert cli.main(["report", str(stored), "--into", str(document)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert document.read_text() == "no marks\n"


def test_result_of_another_schema_is_refused(stored: Path, result: dict[str, Any], capsys) -> None:
    stored.write_text(json.dumps(result | {"schema": 99}))
    assert cli.main(["report", str(stored)]) == 2
    assert "schema 99" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_plot_is_drawn(stored: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    picture = tmp_path / f"times{suffix}"
    assert cli.main(["report", str(stored), "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 1000

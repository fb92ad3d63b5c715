"""The command line: its help, its tables and files, and how it tells users what they can put right."""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fusedres
from fusedres import cli
from fusedres.cli import networks
from fusedres.cli.common import UserError
from fusedres.models import MODELS

ROOT = Path(__file__).parents[1]
COMMANDS = list(cli.COMMANDS)


def run_process(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fusedres", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command within ``parser``, by name."""
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {name: child for action in actions for name, child in action.choices.items()}


def assert_one_line(code: int, err: str, *words: str) -> None:
    """The error of a user: exit code 2, one line on stderr that names what is wrong."""
    assert code == 2
    assert err.startswith("fusedres: ")
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


# Processes


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_of_every_command(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "usage: fusedres" in capsys.readouterr().out


def test_module_and_command_are_one_program() -> None:
    done = run_process("--version")
    assert (done.returncode, done.stdout) == (0, f"fusedres {fusedres.__version__}\n")


def test_error_in_a_process_has_no_traceback() -> None:
    done = run_process("bench", "--arch", "resnet19")
    assert_one_line(done.returncode, done.stderr, "resnet19", "resnet18", "cifar_resnet20")
    assert done.stdout == ""


def test_interrupt_ends_quietly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusedres", "train", "--arch", "resnet50", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )
    assert process.stdout is not None
    process.stdout.readline()  # the title: training has begun
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "fusedres: interrupted\n"


def test_output_into_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m fusedres explain --arch resnet152 | head -n 1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_plain_text_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(cli.console, "HAS_RICH", False)
    assert cli.main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


# Errors of the user


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["bench", "--dtype", "float8"], "float8"),
        (["bench", "--batch", "0"], "above 0"),
        (["bench", "--batch", "two"], "two"),
        (["bench", "--rounds", "-1"], "above 0"),
        (["bench", "--engine", "warp"], "warp"),
        (["bench", "--device", "abacus"], "abacus"),
        (["bench", "--device", "meta"], "meta"),
        (["bench", "--no-such-option"], "--no-such-option"),
        (["bench", "--input", "nowhere.jpg"], "nowhere.jpg"),
        (["bench", "--input", __file__], "no picture"),
        (["bench", "--input", str(ROOT)], str(ROOT)),
        (["bench", "--json", "/dev/null/result.json"], "/dev/null/result.json"),
        (["bench", "--plot", "times.doc"], ".png"),
        (["bench", "--arch", "resnet18", "--image-size", "32", "--batch", "1", "--train"], "more than 1 value"),
        (["explain", "--arch", "vgg16"], "vgg16"),
        (["explain", "resnet50"], "torchvision:NAME or timm:NAME"),
        (["explain", "keras:resnet50"], "torchvision:NAME or timm:NAME"),
        (["explain", "torchvision:resnet51"], "torchvision has no model named 'resnet51'"),
        (["explain", "timm:resnet51"], "timm has no model named 'resnet51'"),
        (["experiment"], "EXPERIMENT"),
        (["experiment", "width"], "width"),
        (["experiment", "degradation", "--data", "mnist"], "mnist"),
        (["experiment", "degradation", "--data", "cifar10:nowhere"], "nowhere"),
        (["experiment", "degradation", "--batch", "5000"], "1437"),
        (["experiment", "degradation", "--out", "/dev/null/runs"], "/dev/null/runs"),
        (["experiment", "depth", "--rounds", "0"], "above 0"),
        (["train", "--arch", "vgg16"], "vgg16"),
        (["train", "--arch", "net"], "no network is named 'net'"),
        (["train", "--data", "mnist"], "mnist"),
        (["train", "--data", "cifar10:nowhere"], "nowhere"),
        (["train", "--data", "imagefolder:nowhere"], "nowhere"),
        (["train", "--out", "/dev/null/runs"], "/dev/null/runs"),
        (["train", "--lr", "-1"], "above 0"),
        (["train", "--lr", "nan"], "above 0"),
        (["train", "--batch", "5000"], "1437"),
        (["train", "--resume"], "no checkpoint"),
        (["report", "nowhere.json"], "nowhere.json"),
        (["report", __file__], "fusedres bench --json"),
    ],
    ids=lambda value: " ".join(map(str, value)).replace(str(ROOT), ".") if isinstance(value, list) else "",
)
def test_error_of_the_user(
    arguments: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main(arguments)
    assert_one_line(code, capsys.readouterr().err, word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_told(capsys: pytest.CaptureFixture) -> None:
    assert_one_line(cli.main(["bench", "--device", "cuda"]), capsys.readouterr().err, "cuda")


def test_missing_engine_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(type(fusedres.dispatch.ENGINES["cpu"]), "missing", "it was not built")
    assert_one_line(cli.main(["explain", "--engine", "cpu"]), capsys.readouterr().err, "cpu", "it was not built")


# Facts


def test_info_as_json_names_versions_engines_and_machine(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["engines"].keys() == fusedres.dispatch.ENGINES.keys()
    assert facts["engines"]["reference"] is None
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert facts["machine"]["cpu"]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_explain_of_a_missing_library_says_so(
    library: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert_one_line(
        cli.main(["explain", f"{library}:resnet18"]), capsys.readouterr().err, f"{library} is not installed"
    )


@pytest.mark.parametrize(
    ("name", "share"),
    [("torchvision:resnet18", "20 of 20"), ("timm:resnet18", "20 of 20"), ("timm:seresnet18", "20 of 36")],
)
def test_explain_converts_models_of_other_libraries(name: str, share: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["explain", name, "--engine", "reference"]) == 0
    out = capsys.readouterr().out
    assert f"{name} in float32 on cpu: {share} convolutions fused" in out
    assert "layer4.1" in out


def test_explain_has_a_row_for_the_stem_and_every_block(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["explain", "--arch", "resnet18", "--engine", "reference"]) == 0
    out = capsys.readouterr().out
    assert out.count("FusedBasicBlock") == 8
    assert out.count("ResNet: stem") == 1
    assert out.count("ResNet: head") == 1
    assert out.count("reference") == 2 * 9 + 1  # of its convolutions, and in eval; it has no kernel for the head


# Eager twins


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "cifar_resnet20", "cifar_plain20", "plain18"])
def test_eager_twin_has_the_same_state_and_runs_no_fused_op(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)  # not torchvision's model
    fused = networks.build(arch)
    twin, origin = networks.eager_twin(arch, fused)
    assert origin == "plain modules"
    assert list(twin.state_dict()) == list(fused.state_dict())
    x = torch.randn(2, 3, 64, 64)
    counted = fusedres.measure.count_launches(lambda: twin.train()(x))
    assert not any(name.startswith("fusedres") for name in (*counted.forward_ops, *counted.backward_ops))
    twin.load_state_dict(fused.state_dict())  # the training pass moved its running statistics
    fused.double().eval(), twin.double().eval()
    with torch.inference_mode():
        assert torch.allclose(twin(x.double()), fused(x.double()), rtol=1e-9)


@pytest.mark.parametrize("arch", MODELS)
def test_depth_is_in_the_name(arch: str) -> None:
    assert networks.depth_of(arch) >= 18


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    a = networks.build("cifar_resnet20", seed=7).state_dict()
    torch.manual_seed(2)
    b = networks.build("cifar_resnet20", seed=7).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match="resnet18"):
        networks.build("resnet")


# Training


def test_train_writes_checkpoint_metrics_curve_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: the digits come with it")
    pytest.importorskip("matplotlib", reason="needs matplotlib for the curve")
    arguments = ["train", "--epochs", "2", "--image-size", "8", "--batch", "512", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pt",
        "curve.png",
        "metrics.csv",
        "metrics.json",
        "model.pt",
    }
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert len(record["step_loss"]) == record["epochs"][-1]["step"] == 4
    assert record["settings"]["arch"] == "cifar_resnet20"
    networks.build("cifar_resnet20").load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert cli.main([*arguments, "--resume"]) == 0  # a finished run has nothing left to do
    assert_one_line(cli.main([*arguments, "--resume", "--lr", "3"]), capsys.readouterr().err, "lr 0.1", "3.0")

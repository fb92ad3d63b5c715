"""Whatever a command is given, it answers, or says what is wrong in one line and leaves no half-written file."""

from __future__ import annotations

import argparse
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import ROOT, assert_one_line, subcommands
from trained_nets import ARCH, checkpoint, picture

from fusedres import cli
from fusedres.cli import common, experiment, report
from fusedres.training import CHECKPOINT

#: Arguments with which each command would begin to work, at once; an option given again overrides them.
QUICK = {
    "bench": ["--arch", "cifar_resnet20", "--batch", "1", "--image-size", "8", "--rounds", "1", "--eval"],
    "train": ["--arch", "cifar_resnet20", "--epochs", "1", "--image-size", "8", "--max-steps", "1", "--out", "out"],
    "predict": ["a.png", "--weights", "net.pth", "--arch", ARCH, "--image-size", "32"],
    "evaluate": ["--data", "imagefolder:data", "--weights", "net.pth", "--arch", ARCH, "--image-size", "32"],
    "convert": ["net.pth", "--arch", ARCH, "--to", "to.safetensors", "--image-size", "32"],
    **{
        f"experiment {name}": ["--epochs", "1", "--image-size", "8", "--max-steps", "1", "--out", "out"]
        for name in experiment.EXPERIMENTS
    },
    "explain": ["--arch", "cifar_resnet20"],
    "info": [],
    "report": ["bench.json"],
    "roofline": ["--arch", "cifar_resnet20", "--batch", "1"],
}
LONG = "x" * 300  # more than a file's name may have
OUTPUTS = ("json", "plot", "to", "onnx", "into", "html")

#: What an argument may not be, by how it is read.
BAD_VALUES: dict[Any, list[str]] = {
    common.positive: ["0", "-3", "x", "", "1.5", "9" * 30],
    common.positive_float: ["0", "-1", "nan", "inf", "x"],
    common.natural: ["-1", "x", "9" * 30],
    common.thread_count: ["0", "99999", "x"],
    common.seed: ["x", "", "9" * 30],
    None: ["", LONG, "/dev/null/x", "\udcff"],  # names of networks, weights, data, devices
}


def _bad_values(name: str, action: argparse.Action) -> list[str]:
    if action.choices is not None:
        return ["no such choice"]
    if action.type is not Path:
        return BAD_VALUES[action.type]
    if action.metavar == "FOLDER":
        return ["/dev/null/x", "/sys/x", LONG]
    suffix = {"to": ".safetensors", "onnx": ".onnx", "plot": ".png", "html": ".html"}.get(name, ".json")
    outputs = [f"/sys/x{suffix}", f"/dev/null/x{suffix}", f"folder{suffix}"]  # nobody may write there, root neither
    return [*(outputs if name in OUTPUTS else ["nowhere", "folder.json"]), LONG + suffix]


def commands(parser: argparse.ArgumentParser, *names: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command under ``parser``, commands within commands included, and the parser of its arguments."""
    inner = subcommands(parser)
    if not inner:
        yield " ".join(names), parser
    for name, child in inner.items():
        yield from commands(child, *names, name)


def bad_arguments() -> Iterator[tuple[str, ...]]:
    """(command, its arguments ...) with every option in turn set to every value that it may not have."""
    for command, parser in commands(cli.make_parser()):
        quick = QUICK[command]
        for action in parser._actions:
            if action.nargs == 0:  # a switch takes no value
                continue
            for value in _bad_values(action.dest, action):
                if action.option_strings:
                    yield *command.split(), *quick, f"{action.option_strings[0]}={value}"
                elif (command, value) != ("explain", ""):
                    yield command, value, *quick[1 if command in ("predict", "convert", "report") else 0 :]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good files of every kind, and folders where files should be."""
    folder = tmp_path_factory.mktemp("work")
    checkpoint(folder / "net.pth", classes=2)
    picture(folder / "a.png")
    for name in ("data/0", "data/1"):
        (folder / name).mkdir(parents=True)
        picture(folder / name / "a.png")
    for suffix in (".json", ".safetensors", ".onnx", ".png", ".html"):
        (folder / f"folder{suffix}").mkdir()
    results = ROOT / "bench" / "results" / "amd-epyc-avx2-2-threads" / "resnet50.json"
    (folder / "bench.json").write_bytes(results.read_bytes())
    return folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize("arguments", list(bad_arguments()), ids=lambda arguments: ascii(" ".join(arguments))[1:80])
def test_value_that_an_option_cannot_have(
    arguments: tuple[str, ...], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files(here)
    code = cli.main(arguments)
    assert_one_line(code, capfd.readouterr().err)
    assert files(here) - before <= {str(here / "out")}


# Disks that are full


@contextmanager
def file_size_limit(most: int) -> Iterator[None]:
    """Within this context no file of this process grows beyond ``most`` bytes; a write that would raises OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


#: Arguments of a command that writes the file in them.
WRITERS = {
    "bench.new.json": ("bench", *QUICK["bench"], "--json"),
    "bench.new.png": ("bench", *QUICK["bench"], "--plot"),
    "predict.json": ("predict", *QUICK["predict"], "--json"),
    "evaluate.json": ("evaluate", *QUICK["evaluate"], "--json"),
    "folded.safetensors": ("convert", *QUICK["convert"], "--to"),
    "times.png": ("report", "bench.json", "--plot"),
    "document.md": ("report", "bench.json", "--into"),
    "roofline.json": ("roofline", *QUICK["roofline"], "--gpu", "h100", "--json"),
}
OLD = f"{report.BEGIN} what was written before {report.END}"


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_leaves_the_old_file(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / name
    path.write_text(OLD)
    before = files(here)
    with file_size_limit(len(OLD)):
        code = cli.main([*WRITERS[name], name])
    assert_one_line(code, capsys.readouterr().err, f"cannot write {name}", "File too large")
    assert path.read_text() == OLD
    assert files(here) == before


@pytest.mark.parametrize("name", ["predict.json", "document.md"])
def test_interrupt_while_writing_leaves_the_old_file(
    name: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (here / name).write_text(OLD)
    before = files(here)
    monkeypatch.setattr(os, "fsync", interrupt)
    assert cli.main([*WRITERS[name], name]) == 130
    assert capsys.readouterr().err == "fusedres: interrupted\n"
    assert (here / name).read_text() == OLD
    assert files(here) == before


def test_devices_and_links_are_written_through(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(cli.main([*WRITERS["predict.json"], "/dev/full"]), capsys.readouterr().err, "No space left")
    (here / "link.json").symlink_to("linked.json")
    assert cli.main([*WRITERS["predict.json"], "link.json"]) == 0
    assert (here / "link.json").is_symlink()
    assert json.loads((here / "linked.json").read_text())["arch"] == ARCH


def test_training_on_a_full_disk_keeps_the_last_checkpoint(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *QUICK["train"], "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    state, names = (tmp_path / CHECKPOINT).read_bytes(), files(tmp_path)
    with file_size_limit(len(state) // 2):
        code = cli.main([*arguments, "--max-steps", "2", "--resume"])
    assert_one_line(code, capsys.readouterr().err, "File too large")
    assert (tmp_path / CHECKPOINT).read_bytes() == state
    assert files(tmp_path) == names
    assert cli.main([*arguments, "--max-steps", "2", "--resume"]) == 0


# Files that are not what they should be

RESULTS = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "no schema": b"{}",
    "another schema": b'{"schema": 2}',
    "schema alone": b'{"schema": 1}',
    "wrong kinds": b'{"schema": 1, "settings": 3, "timings": {}, "launches": null}',
    "nested": b"[" * 100_000,
    "bytes": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("command", [("report",), ("roofline", "--results")], ids=" ".join)
@pytest.mark.parametrize("kind", RESULTS)
def test_results_that_are_none(
    kind: str, command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(RESULTS[kind])
    assert_one_line(cli.main([*command, str(path)]), capsys.readouterr().err, str(path))


class Bomb:
    """Pickled, it is a call of ``os.mkdir``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


CHECKPOINTS: dict[str, Any] = {
    "code": {"settings": Bomb()},
    "a list": [1, 2],
    "no keys": {},
    "settings of another kind": {"settings": 3},
    "no model": {"settings": {}, "step": 1},
    "another model": {"settings": {}, "step": 1, "model": {"fc.bias": torch.zeros(3)}},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoint_of_no_training_run(
    kind: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(CHECKPOINTS[kind], tmp_path / CHECKPOINT)
    code = cli.main(["train", *QUICK["train"], "--out", str(tmp_path), "--resume"])
    assert_one_line(code, capsys.readouterr().err, CHECKPOINT)
    assert not (here / "harmed").exists()
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT}


@pytest.mark.parametrize("workers", ["0", "1"])
def test_damaged_picture_stops_the_training_and_is_named(
    workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
        picture(tmp_path / split / "class" / "a.png")
    (tmp_path / "train" / "class" / "b.png").write_text("no picture")
    data = ["--data", f"imagefolder:{tmp_path}", "--batch", "2", "--image-size", "32", "--workers", workers]
    code = cli.main(["train", *QUICK["train"], *data, "--out", str(tmp_path / "out")])
    assert_one_line(code, capsys.readouterr().err, "fusedres: cannot read the picture", "b.png")


def test_more_memory_than_there_is_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["bench", *QUICK["bench"], "--image-size", str(common.MOST)])
    assert_one_line(code, capsys.readouterr().err, "not enough memory")

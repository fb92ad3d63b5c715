"""Choices of autotune on disk: where they lie, and that processes which write at once lose and tear nothing."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from fusedres import choices
from fusedres.choices import Choice
from fusedres.problem import ConvProblem

ENVIRONMENT = {"gpu": "NVIDIA X100 (80 GB)", "torch": "2"}
PROBLEM = ConvProblem(2, 8, 7, 5, 16, 3, 3, (2, 2), (1, 1), groups=2)
PROCESSES, OWN = 4, 25
SHARED = "the call that all choose for"


def choice(call: str, chosen: str = "vendor") -> Choice:
    return Choice("conv_fprop", call, PROBLEM, "float16", chosen, {"vendor": 0.25, "a tile": 0.5})


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))


def test_what_was_written_is_read() -> None:
    assert choices.read(ENVIRONMENT, "a call") is None
    choices.write(ENVIRONMENT, choice("a call"))
    choices.write(ENVIRONMENT, choice("another"))
    assert choices.read(ENVIRONMENT, "a call") == choice("a call")
    assert sorted(choices.read_all(ENVIRONMENT)) == [choice("a call"), choice("another")]
    choices.write(ENVIRONMENT, choice("a call", "a tile"))
    assert choices.read(ENVIRONMENT, "a call") == choice("a call", "a tile")


def test_another_environment_has_choices_of_its_own() -> None:
    choices.write(ENVIRONMENT, choice("a call"))
    for other in ({**ENVIRONMENT, "torch": "3"}, {**ENVIRONMENT, "gpu": "another"}):
        assert choices.read(other, "a call") is None
        assert list(choices.read_all(other)) == []


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choices.folder_of(ENVIRONMENT).parent == tmp_path / "tuning"
    assert choices.folder_of(ENVIRONMENT).name.startswith("nvidia-x100-80-gb-")
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert choices.folder_of(ENVIRONMENT).parent == tmp_path / "xdg" / "fusedres" / "tuning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choices.folder_of(ENVIRONMENT).parent == tmp_path / ".cache" / "fusedres" / "tuning"


def test_a_failed_write_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(UserWarning, match="not kept: no space left"):
        choices.write(ENVIRONMENT, choice("a call"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def write_many(number: int, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]  # an Event of another process
    for i in range(OWN):
        choices.write(ENVIRONMENT, choice(f"{number}: {i}"))
        choices.write(ENVIRONMENT, choice(SHARED, f"{number}"))
        found = choices.read(ENVIRONMENT, SHARED)
        assert found is not None
        assert found.chosen in map(str, range(PROCESSES))


@pytest.mark.filterwarnings("error")
def test_processes_that_write_at_once_lose_and_tear_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=write_many, args=(i, start)) for i in range(PROCESSES)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = {kept.call for kept in choices.read_all(ENVIRONMENT)}
    assert found == {SHARED} | {f"{n}: {i}" for n in range(PROCESSES) for i in range(OWN)}
    assert all(path.suffix == ".json" for path in tmp_path.rglob("*") if path.is_file())

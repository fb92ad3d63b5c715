"""What the subcommands share: options, the user's errors, checks of devices and of files to be written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import torch

from fusedres import dispatch
from fusedres.training.checkpoint import write_atomically

MOST = 10**9
MOST_THREADS = 1024
MOST_SEED = 10**18
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UserError(Exception):
    """Something the user can put right; told in one line on stderr, exit code 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def positive(text: str) -> int:
    """An integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"expected a number of at most {MOST}, got {text}")
    return value


def natural(text: str) -> int:
    """An integer from 0 on."""
    return 0 if text == "0" else positive(text)


def thread_count(text: str) -> int:
    """How many threads can be asked for: OpenMP ends the process where it cannot start as many."""
    value = positive(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS} threads, got {text}")
    return value


def seed(text: str) -> int:
    """An integer that torch and every sum of it with an epoch's number can be seeded with."""
    value = int(text)
    if abs(value) > MOST_SEED:
        raise argparse.ArgumentTypeError(f"expected a number from {-MOST_SEED} to {MOST_SEED}, got {text}")
    return value


def positive_float(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def add_model_options(parser: argparse.ArgumentParser, arch: str, many: bool = False) -> None:
    """Which network, or ``many``, and where and how it runs."""
    name = {"nargs": "+", "default": [arch]} if many else {"default": arch}
    parser.add_argument("--arch", **name, help=f"network (default: {arch}); an unknown name lists them all")
    add_network_options(parser)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """How networks are made, and where and how they run."""
    parser.add_argument(
        "--memory", choices=("standard", "recompute"), default="standard", help="memory mode of the blocks"
    )
    add_run_options(parser)
    parser.add_argument("--seed", type=seed, default=0, help="seed of weights, order and augmentation (default: 0)")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Where and how a network runs."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    parser.add_argument("--engine", help=f"prefer one engine: {', '.join(dispatch.ENGINES)}")
    parser.add_argument("--threads", type=thread_count, help="CPU threads (default: torch's choice)")


def select_device(name: str) -> torch.device:
    """The device of that name; UserError where this machine lacks it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} cannot be used: networks run on cpu or cuda")
    return device


def select_engine(name: str | None) -> Any:
    """The context in which ``name`` is the preferred engine; UserError where it is unknown or missing."""
    if name is None:
        return dispatch.engine(None)
    if name not in dispatch.ENGINES:
        raise UserError(f"no engine is named {name!r}; there are {', '.join(dispatch.ENGINES)}")
    if dispatch.ENGINES[name].missing is not None:
        raise UserError(f"the engine {name} cannot be used: {dispatch.ENGINES[name].missing}")
    return dispatch.engine(name)


def set_threads(threads: int | None) -> None:
    """How many threads torch computes with, where the user chose."""
    if threads is not None:
        torch.set_num_threads(threads)


def writable_file(path: Path) -> Path:
    """``path``, its folder made where missing; UserError, before any work is done, where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = path.resolve()  # what is made here is removed again, but not a link to it
        existed = target.exists()
        with target.open("ab"):
            pass
        if not existed:
            target.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def write(path: Path, content: str | bytes) -> None:
    """``content`` to ``path``, whole or not at all, its folder made where missing.

    What is no file of its own, a link or a device, is written through. UserError where it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(data)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: file.write(data))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def writable_folder(path: Path) -> Path:
    """The folder ``path``, made where missing; UserError where nothing can be written into it."""
    writable_file(path / ".probe")
    return path

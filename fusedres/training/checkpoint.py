"""Checkpoints: whole or not there at all, and read without running code from the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


class CheckpointError(Exception):
    """A checkpoint cannot be read, or belongs to another run."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file aside in the same folder, flush it to the disk, then rename it over ``path``.

    Whoever reads ``path`` sees the old file or the new one, whole, however the process or the machine ends. The name
    aside is fixed, so that a killed run leaves at most one such file and the next write takes it over.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:  # an interrupt too; a full disk should not be left fuller
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """``state`` (tensors, numbers, strings, and lists and dicts of them) to ``path``, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state saved at ``path``, its tensors on ``device``. CheckpointError where it is missing or damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except Exception as error:  # a damaged file fails in zip, pickle or tensor code alike
        raise CheckpointError(f"{path} is not a readable checkpoint ({type(error).__name__})") from error

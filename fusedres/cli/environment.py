"""What a figure depends on: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fusedres
from fusedres import dispatch, native

PACKAGES = (
    *("torchvision", "triton", "numpy", "safetensors", "onnx", "scikit-learn", "rich", "matplotlib"),
    *("timm", "onnxruntime", "onnxruntime-gpu", "openvino", "torch-tensorrt", "apex"),
)


def machine() -> dict[str, Any]:
    """The CPU, the threads that torch uses on it, and the GPUs."""
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(),
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def versions() -> dict[str, str | None]:
    """Versions of what takes part; None for a package that is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "fusedres": fusedres.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit this package runs from, with ``+`` where files differ from it; None outside a git checkout."""
    root = Path(__file__).parents[2]
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        tracked = _git(root, "ls-files", "fusedres/__main__.py")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "") if tracked else None
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def engines() -> dict[str, str | None]:
    """Every engine in order of preference, with the reason why it cannot be used here, or None."""
    return {name: engine.missing for name, engine in dispatch.ENGINES.items()}


def native_library() -> dict[str, Any]:
    """The native library: its path and the compiler that made it, or why there is none."""
    path = native.library_path()
    return {
        "path": str(path) if path else None,
        "compiler": compiler_of(path) if path else None,
        "missing": native.missing,
    }


def compiler_of(library: Path) -> str | None:
    """The compiler that left its name in ``library``, where it did (GCC and Clang do)."""
    content = library.read_bytes()
    for mark in (b"GCC: (", b"clang version "):
        start = content.find(mark)
        if start >= 0:
            return content[start : start + 80].split(b"\0")[0].decode(errors="replace")
    return None

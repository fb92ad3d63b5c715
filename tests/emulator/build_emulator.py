"""Builds the emulator's Python modules with g++ alone, once for each state of their sources, outside the repository."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "g++")
#: One path through a kernel must not become two, for faults are planted in calls as the machine code has them.
ONE_PATH = ("-fno-thread-jumps", "-fno-split-paths")
FLAGS = ("-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-pthread", *ONE_PATH)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1")
MODULES = {
    "fusedres_emulator": CSRC / "emulator",
    "emulator_probes": Path(__file__).parent,
}

missing = None if shutil.which(COMPILER) else f"needs a C++ compiler ({COMPILER}) to build the emulator"


def sanitized() -> bool:
    """Whether this process was started to run sanitized kernels (tests/emulator/test_sanitizers.py)."""
    return bool(os.environ.get("FUSEDRES_EMULATOR_SANITIZE"))


def _flags() -> list[str]:
    include = [CSRC, Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]
    extra = SANITIZE if sanitized() else ()
    switch = ("-DFUSEDRES_UCONTEXT",) if os.environ.get("FUSEDRES_EMULATOR_UCONTEXT") else ()
    return [*FLAGS, *extra, *switch, *(f"-I{path}" for path in include)]


def _folder(sources: list[Path]) -> Path:
    """Named by everything the build depends on."""
    state = hashlib.sha256(repr((_flags(), sys.version, torch.__version__)).encode())
    for path in sorted([*CSRC.rglob("*.h"), *sources, *Path(__file__).parent.glob("*.h")]):
        state.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "fusedres" / "emulator" / state.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def build(name: str) -> Path:
    """The path of module ``name``, built if it is not there; another process that builds it is waited for."""
    sources = sorted(MODULES[name].glob("*.cpp"))
    folder = _folder(sources)
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(name, sources, library)
    return library


def _compile(name: str, sources: list[Path], library: Path) -> None:
    folder = library.parent
    objects = [folder / f"{name}.{source.stem}.{os.getpid()}.o" for source in sources]
    commands = [[COMPILER, *_flags(), "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, commands))
    partial = folder / f"{name}.{os.getpid()}.so"
    _run([COMPILER, *_flags(), "-shared", *map(str, objects), "-o", str(partial)])
    partial.replace(library)
    for path in objects:
        path.unlink()


@functools.cache
def load(name: str) -> ModuleType:
    """Module ``name``, built and imported."""
    spec = importlib.util.spec_from_file_location(name, build(name))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""What tests of the build are made of: setup.py as a module, source trees whole and small, tools that say as told."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load_setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fusedres_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def toolkit(root: Path, archs: str = "", release: str = "13.0", compiles: str = "exit 1") -> Path:
    """A CUDA toolkit whose nvcc answers --dryrun as the real one does: on the error stream, through its own bin.

    ``compiles``: what it does when it is to compile something.
    """
    dryrun = f'echo "#$ _HERE_={root}/bin" >&2; echo "#$ TOP={root}/bin/.." >&2'
    version = f"echo 'Cuda compilation tools, release {release}, V{release}.88'"
    answers = f"--dryrun) {dryrun};; --list-gpu-arch) echo {archs};; --version) {version};; *) {compiles};;"
    script(root / "bin" / "nvcc", f'case "$1" in {answers} esac')
    return root


def source_tree(to: Path) -> Path:
    """A copy of all that belongs to a checkout, without version control and without anything built."""
    left_out = shutil.ignore_patterns(".*", "*.so", "__pycache__", "build", "dist", "*.egg-info", "runs")
    shutil.copytree(ROOT, to, ignore=left_out)
    kernels = to / "fusedres" / "kernels"
    if kernels.exists():  # a link that some checkouts have, to run without an install
        shutil.rmtree(kernels)
    return to


def small_tree(to: Path, cuda: bool = False) -> Path:
    """A tree that setup.py builds in seconds: its package says nothing, three sources of its library a number each."""
    shutil.copytree(ROOT / "kernels", to / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, to)
    units = ["registration.cpp", "cpu/one.cpp", "cpu/two.cpp", *(["cuda/three.cu"] if cuda else [])]
    for number, unit in enumerate(units):
        path = to / "csrc" / unit
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'extern "C" int unit_{number}() {{ return {number}; }}\n')
    (to / "fusedres").mkdir()
    (to / "fusedres" / "__init__.py").write_text("")
    return to


def plain_environ(**changes: str) -> dict[str, str]:
    """This process's environment without what steers builds or imports, and with the programs of its Python on PATH."""
    steering = (
        "FUSEDRES_",
        "MAX_JOBS",
        "CXX",
        "CC",
        "FORCE_CUDA",
        "TORCH_CUDA_ARCH_LIST",
        "CUDA_HOME",
        "CUDA_PATH",
        "PYTHON",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return {**kept, **changes}


def run(*command: str | Path, cwd: Path, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run to its end; what it said, both streams in one."""
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def counting_compiler(folder: Path) -> tuple[Path, Path]:
    """A C++ compiler, and the file that gets a line for each time it runs: how many ran by then, itself included."""
    running, log = folder / "running", folder / "log"
    running.mkdir(parents=True)
    # A moment's rest, so that one that could run beside another does.
    body = f'touch {running}/$$; sleep 0.3; ls {running} | wc -l >> {log}; g++ "$@"; s=$?; rm {running}/$$; exit $s'
    return script(folder / "counting-g++", body), log


def programs(folder: Path, *names: str) -> Path:
    """A folder for PATH with these programs alone."""
    folder.mkdir(parents=True)
    for name in names:
        found = shutil.which(name)
        if found is not None:
            (folder / name).symlink_to(found)
    return folder


#: What compiling and linking C++ takes.
COMPILERS = ("g++", "gcc", "c++", "cc", "as", "ld")
#: What the scripts here and Python's own look at the machine take.
SHELL = ("sh", "ls", "wc", "touch", "sleep", "rm", "uname", "which")

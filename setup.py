"""Build of the native library; everything static is in pyproject.toml.

Environment: FUSEDRES_NO_NATIVE=1 skips the library, FUSEDRES_REQUIRE_NATIVE=1 makes its failure fatal, MAX_JOBS bounds
the compilers run at once, FORCE_CUDA=1 or TORCH_CUDA_ARCH_LIST build csrc/cuda where no GPU is visible,
FUSEDRES_SANITIZE=1 builds under AddressSanitizer and UndefinedBehaviorSanitizer (tests/sanitizers.py loads that).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
OLDEST_TORCH = (2, 11)  # that the library runs with, whichever it is built by
TORCH_TARGET_VERSION = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
CXX_STANDARD = "-std=c++17"  # the oldest torch's; torch would take its own, and newer ones hide what older ones refuse
DEFAULT_CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
CXX_FLAGS = ("-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi")
SANITIZE_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
BYTES_PER_JOB = 2 << 30

NO_TORCH = (
    "fusedres: building needs torch>=2.11 in this environment ({reason}): install it first, or leave out"
    " --no-build-isolation, or set FUSEDRES_NO_NATIVE=1 for an install without the native library."
)
NOT_BUILT = """
{line}
fusedres: {what} NOT BUILT: {error}
The install goes on without: everything works, {instead}.
`fusedres info` tells which engines are there; FUSEDRES_REQUIRE_NATIVE=1 makes this an error.
{line}
"""


def flag(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment variable ``name`` is set to anything but 0 or nothing."""
    return environ.get(name, "0") not in ("", "0")


def available_memory() -> int:
    """Bytes a build may use: free memory, or less where a control group limits it."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists() and (line := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free = int(line[1]) * 1024
    if cgroup.exists() and (limit := cgroup.read_text().strip()).isdigit():
        free = min(free, int(limit))
    return free


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def max_jobs(environ: Mapping[str, str], memory: int, cores: int) -> int:
    """How many compilers run at once: MAX_JOBS, or one a core as far as memory goes."""
    asked = environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, min(cores, memory // BYTES_PER_JOB))


def cuda_toolkit(environ: Mapping[str, str]) -> Path | None:
    """The CUDA toolkit's root, or None.

    ``nvcc`` on PATH may be a wrapper script far from its toolkit, so the compiler is asked where it lives.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name) and (Path(environ[name]) / "bin" / "nvcc").exists():
            return Path(environ[name])
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc is None:
        return None
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr + dryrun.stdout, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parent.parent


def cuda_archs(environ: Mapping[str, str], toolkit: Path, gpu_visible: bool) -> str | None:
    """The TORCH_CUDA_ARCH_LIST to build for; None leaves it to torch, which takes the visible GPUs'."""
    if environ.get("TORCH_CUDA_ARCH_LIST"):
        return environ["TORCH_CUDA_ARCH_LIST"]
    if gpu_visible:
        return None
    nvcc = toolkit / "bin" / "nvcc"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    return ";".join(arch for arch in DEFAULT_CUDA_ARCHS if not known or f"compute_{arch.replace('.', '')}" in known)


def wants_cuda(environ: Mapping[str, str], gpu_visible: bool) -> bool:
    """Whether CUDA sources are to be built, given that there is a toolkit."""
    return gpu_visible or flag("FORCE_CUDA", environ) or bool(environ.get("TORCH_CUDA_ARCH_LIST"))


def cuda_mismatch(toolkit: Path, torch_cuda: str) -> str | None:
    """Why the toolkit cannot build for a torch of CUDA ``torch_cuda``, or None: they must agree in the first number."""
    nvcc = toolkit / "bin" / "nvcc"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.\d+", version)
    if release is None or release[1] == torch_cuda.partition(".")[0]:
        return None
    return f"{nvcc} is of CUDA {release[0].split()[1]}, torch of CUDA {torch_cuda}"


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def chosen_toolkit() -> tuple[Path | None, str | None]:
    """The CUDA toolkit to build csrc/cuda with, if any; and what stands against it where it was asked for."""
    import torch

    gpu_visible = torch.cuda.is_available()
    if not wants_cuda(os.environ, gpu_visible):
        return None, None
    toolkit = cuda_toolkit(os.environ)
    if not torch.version.cuda:
        problem: str | None = f"torch {torch.__version__} is without CUDA"
    elif toolkit is None:
        problem = "there is no nvcc, neither under CUDA_HOME nor on PATH"
    else:
        problem = cuda_mismatch(toolkit, torch.version.cuda)
    if toolkit is None or problem is not None:
        return None, problem if wants_cuda(os.environ, gpu_visible=False) else None
    os.environ["CUDA_HOME"] = str(toolkit)  # read when torch.utils.cpp_extension is first imported
    if archs := cuda_archs(os.environ, toolkit, gpu_visible):
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    return toolkit, None


def native_library(with_cuda: bool) -> Extension:
    """The extension ``fusedres._native``: csrc and csrc/cpu, and csrc/cuda where it can be built."""
    from torch.utils import cpp_extension

    sanitize = SANITIZE_FLAGS if flag("FUSEDRES_SANITIZE") else ()
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *(["-DUSE_CUDA"] if with_cuda else [])]
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp", *(["csrc/cuda/*.cu"] if with_cuda else [])]
    options: dict[str, Any] = {
        "name": "fusedres._native",
        "sources": [source for pattern in patterns for source in sources(pattern)],
        "depends": sources("csrc/**/*.h"),
        "include_dirs": [str(ROOT.resolve() / "csrc")],  # absolute: ninja runs elsewhere
        "extra_compile_args": {
            "cxx": [CXX_STANDARD, *CXX_FLAGS, *(("-O1", "-g1", *sanitize) if sanitize else ()), *defines],
            "nvcc": [CXX_STANDARD, "-O3", "--compiler-options=-fvisibility=hidden", *defines],
        },
        "extra_link_args": [*sanitize] if sanitize else ["-Wl,-s"] if sys.platform.startswith("linux") else [],
        "py_limited_api": True,
    }
    return (cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension)(**options)


def torch_reason() -> str | None:
    """Why there is no torch here to build with, or None."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return str(error)
    is_too_old = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH
    return f"torch is {torch.__version__}" if is_too_old else None


class MissingTorch(build_ext):
    """Stands in where there is no torch to build with: metadata and sdist work, a build says what is needed."""

    def run(self) -> None:
        sys.exit(NO_TORCH.format(reason=torch_reason()))


def tell_not_built(what: str, error: object, instead: str) -> None:
    """Say loudly what the install goes on without."""
    print(NOT_BUILT.format(line="*" * 100, what=what, error=error, instead=instead), file=sys.stderr, flush=True)


def build_command(cuda_problem: str | None) -> type[build_ext]:
    """torch's build_ext, except that a failure costs what cannot be built and not the install.

    ``cuda_problem``: why the CUDA kernels that were asked for cannot even be tried.
    """
    from torch.utils.cpp_extension import BuildExtension

    is_fatal = flag("FUSEDRES_REQUIRE_NATIVE")

    class BuildNative(BuildExtension):
        def run(self) -> None:
            os.environ["MAX_JOBS"] = str(max_jobs(os.environ, available_memory(), available_cores()))
            if cuda_problem is not None:
                if is_fatal:
                    sys.exit(f"fusedres: the CUDA kernels cannot be built: {cuda_problem}")
                tell_not_built("THE CUDA KERNELS WERE", cuda_problem, "GPUs run Triton's kernels")
            try:
                self._run_at_least_for_cpu()
            except Exception as error:
                if is_fatal:
                    raise
                tell_not_built("THE NATIVE LIBRARY WAS", error, "CPU kernels run through plain PyTorch")
                self.extensions: list[Extension] = []  # no outputs to collect

        def _run_at_least_for_cpu(self) -> None:
            (library,) = self.extensions
            try:
                super().run()
            except Exception as error:
                if is_fatal or not any(source.endswith(".cu") for source in library.sources):
                    raise
                tell_not_built("THE CUDA KERNELS WERE", error, "GPUs run Triton's kernels")
                vars(library).update(vars(native_library(with_cuda=False)))
                self.compiler = None  # the default one; the run made an object of what was a name
                super().run()

    return BuildNative


def native_options() -> dict[str, Any]:
    """The part of setup()'s keywords that builds the library."""
    if flag("FUSEDRES_NO_NATIVE"):
        return {}
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    if torch_reason() is not None:
        placeholder = Extension("fusedres._native", sources=[])
        return {"ext_modules": [placeholder], "cmdclass": {"build_ext": MissingTorch}, "options": options}
    toolkit, problem = chosen_toolkit()
    library = native_library(with_cuda=toolkit is not None)
    return {"ext_modules": [library], "cmdclass": {"build_ext": build_command(problem)}, "options": options}


if __name__ == "__main__":
    setup(
        license="Apache-2.0",  # here, since setuptools before and after PEP 639 want it differently in pyproject.toml
        packages=[*find_packages(include=["fusedres", "fusedres.*"]), "fusedres.kernels"],
        package_dir={"fusedres.kernels": "kernels"},
        **native_options(),
    )

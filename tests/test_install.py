"""The decisions of the build: where CUDA lives, for which GPUs, with how many compilers (tests/field has builds)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from builds import ROOT, load_setup, script, toolkit

GIB = 1 << 30


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module."""
    pytest.importorskip("setuptools", reason="needs setuptools")
    return load_setup()


@pytest.mark.parametrize(
    ("asked", "gib", "cores", "jobs"),
    [
        (None, 64, 8, 8),
        (None, 5, 8, 2),
        (None, 1, 8, 1),
        ("3", 1, 1, 3),
        ("0", 64, 4, 4),
        ("many", 64, 4, 4),
        ("", 64, 4, 4),
    ],
)
def test_max_jobs_is_obeyed_or_follows_memory_and_cores(
    build: ModuleType, asked: str | None, gib: int, cores: int, jobs: int
) -> None:
    environ = {} if asked is None else {"MAX_JOBS": asked}
    assert build.max_jobs(environ, gib * GIB, cores) == jobs


def test_this_machine_has_memory_and_cores(build: ModuleType) -> None:
    assert build.available_memory() > 0
    assert build.available_cores() > 0


def test_toolkit_is_found_behind_a_wrapper_script(build: ModuleType, tmp_path: Path) -> None:
    root = toolkit(tmp_path / "cuda-13.0")
    wrapper = script(tmp_path / "bin" / "nvcc", f'exec {root}/bin/nvcc "$@"')
    assert build.cuda_toolkit({"PATH": str(wrapper.parent)}) == root


def test_toolkit_is_found_behind_a_link(build: ModuleType, tmp_path: Path) -> None:
    script(tmp_path / "cuda" / "bin" / "nvcc", "exit 1")  # a compiler that says nothing of itself
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(tmp_path / "cuda" / "bin" / "nvcc")
    assert build.cuda_toolkit({"PATH": str(tmp_path / "bin")}) == tmp_path / "cuda"


def test_cuda_home_wins_where_it_holds_a_compiler(build: ModuleType, tmp_path: Path) -> None:
    on_path, named = toolkit(tmp_path / "a"), toolkit(tmp_path / "b")
    assert build.cuda_toolkit({"PATH": f"{on_path}/bin", "CUDA_HOME": str(named)}) == named
    assert build.cuda_toolkit({"PATH": f"{on_path}/bin", "CUDA_HOME": str(tmp_path / "none")}) == on_path


def test_no_compiler_is_no_toolkit(build: ModuleType, tmp_path: Path) -> None:
    assert build.cuda_toolkit({"PATH": str(tmp_path)}) is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_toolkit_of_this_machine_holds_the_runtime(build: ModuleType) -> None:
    root = build.cuda_toolkit(os.environ)
    assert (root / "include" / "cuda_runtime.h").exists()
    assert build.cuda_archs({}, root, gpu_visible=False).startswith("8.0;")


def test_architectures_are_asked_for_visible_or_all_that_the_compiler_knows(build: ModuleType, tmp_path: Path) -> None:
    root = toolkit(tmp_path / "cuda", archs="compute_75 compute_80 compute_86 compute_89 compute_90")
    assert build.cuda_archs({"TORCH_CUDA_ARCH_LIST": "9.0a"}, root, gpu_visible=True) == "9.0a"
    assert build.cuda_archs({}, root, gpu_visible=True) is None
    assert build.cuda_archs({}, root, gpu_visible=False) == "8.0;8.6;8.9;9.0"
    silent = toolkit(tmp_path / "silent")
    assert build.cuda_archs({}, silent, gpu_visible=False) == "8.0;8.6;8.9;9.0;10.0;12.0"


def test_cuda_is_built_for_a_visible_gpu_or_on_demand(build: ModuleType) -> None:
    assert not build.wants_cuda({}, gpu_visible=False)
    assert not build.wants_cuda({"FORCE_CUDA": "0", "TORCH_CUDA_ARCH_LIST": ""}, gpu_visible=False)
    assert build.wants_cuda({}, gpu_visible=True)
    assert build.wants_cuda({"FORCE_CUDA": "1"}, gpu_visible=False)
    assert build.wants_cuda({"TORCH_CUDA_ARCH_LIST": "8.0"}, gpu_visible=False)


def test_library_targets_the_oldest_supported_torch_from_every_source(build: ModuleType) -> None:
    library = build.native_library(with_cuda=False)
    assert (library.name, library.py_limited_api) == ("fusedres._native", True)
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in library.extra_compile_args["cxx"]
    assert not any("march" in flag for flag in library.extra_compile_args["cxx"])
    assert {Path(source) for source in library.sources} >= {p.relative_to(ROOT) for p in ROOT.glob("csrc/cpu/*.cpp")}


@pytest.mark.parametrize("language", ["cxx", "nvcc"])
def test_sources_are_compiled_by_the_oldest_torchs_standard(build: ModuleType, language: str) -> None:
    pytest.importorskip("torch", reason="needs torch")
    flags = build.native_library(with_cuda=False).extra_compile_args[language]
    assert [flag for flag in flags if flag.startswith("-std")] == ["-std=c++17"], "torch 2.11 compiles by it"


def test_no_native_builds_nothing(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_NO_NATIVE", "1")
    assert build.native_options() == {}

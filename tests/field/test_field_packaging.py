"""Field cases of installing: build isolation, no torch, no compiler, no nvcc or the wrong one, ninja, memory, archives.

Builds here are of small trees, seconds each. ``make dist-check`` installs the real thing into clean environments.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from builds import (
    COMPILERS,
    ROOT,
    SHELL,
    counting_compiler,
    load_setup,
    plain_environ,
    programs,
    run,
    script,
    small_tree,
    source_tree,
    toolkit,
)

pytest.importorskip("setuptools", reason="needs setuptools")

needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that is built with CUDA")

#: setup.py where Python finds no torch.
WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, '.');"
    " runpy.run_path('setup.py', run_name='__main__')"
)


def setup_py(tree: Path, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", *command, cwd=tree, environ=plain_environ(**changes))


def wheel(tree: Path) -> tuple[str, list[str]]:
    """The name of the one wheel that was made, and of the libraries in it."""
    (path,) = (tree / "dist").glob("*.whl")
    return path.name, [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]


def without_compilers(folder: Path) -> str:
    return str(programs(folder, *SHELL))


@pytest.mark.case("F45")
def test_isolated_build_asks_for_the_torch_that_it_needs() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = ".".join(map(str, load_setup().OLDEST_TORCH))
    assert f"torch>={oldest}" in declared["build-system"]["requires"]
    assert f"torch>={oldest}" in declared["project"]["dependencies"]


@pytest.mark.case("F45")
def test_build_without_torch_stops_with_one_line_that_names_it(tmp_path: Path) -> None:
    tree = small_tree(tmp_path / "tree")
    told = run(sys.executable, "-c", WITHOUT_TORCH, "-q", "bdist_wheel", cwd=tree, environ=plain_environ())
    assert told.returncode != 0
    assert told.stdout.strip().splitlines()[-1].startswith("fusedres: building needs torch>=2.11 in this environment")
    assert "Traceback" not in told.stdout
    told = run(sys.executable, "-c", WITHOUT_TORCH, "-q", "egg_info", cwd=tree, environ=plain_environ())
    assert told.returncode == 0, told.stdout
    environ = plain_environ(FUSEDRES_NO_NATIVE="1")
    told = run(sys.executable, "-c", WITHOUT_TORCH, "-q", "bdist_wheel", cwd=tree, environ=environ)
    assert told.returncode == 0, told.stdout


@pytest.mark.case("F45")
@pytest.mark.parametrize("broken", ["__version__ = '2.10.3+cu130'", "raise OSError('libtorch.so: no such file')"])
def test_torch_too_old_or_broken_is_named_too(broken: str, tmp_path: Path) -> None:
    tree = small_tree(tmp_path / "tree")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "torch.py").write_text(broken)
    told = setup_py(tree, "-q", "bdist_wheel", PYTHONPATH=str(tmp_path / "other"))
    assert told.returncode != 0
    assert "2.10.3" in told.stdout or "libtorch.so: no such file" in told.stdout
    assert "Traceback" not in told.stdout


@pytest.mark.case("F45")
@pytest.mark.parametrize("jobs", [1, 3])
def test_no_more_compilers_run_at_once_than_max_jobs(jobs: int, tmp_path: Path) -> None:
    pytest.importorskip("ninja", reason="needs ninja: without it there is one compiler at a time")
    compiler, log = counting_compiler(tmp_path)
    built = setup_py(
        small_tree(tmp_path / "tree"), "-q", "build_ext", "--inplace", MAX_JOBS=str(jobs), CXX=str(compiler)
    )
    assert built.returncode == 0, built.stdout
    assert max(map(int, log.read_text().split())) == jobs


@pytest.mark.case("F45")
def test_build_without_ninja_compiles_all_the_same(tmp_path: Path) -> None:
    tree = small_tree(tmp_path / "tree")
    path = str(programs(tmp_path / "bin", *SHELL, *COMPILERS))
    built = setup_py(tree, "-q", "bdist_wheel", PATH=path, FUSEDRES_REQUIRE_NATIVE="1")
    assert built.returncode == 0, built.stdout
    name, libraries = wheel(tree)
    assert "-cp310-abi3-" in name
    assert libraries == ["fusedres/_native.abi3.so"]


@pytest.mark.case("F45")
def test_build_without_compiler_costs_the_library_and_not_the_install(tmp_path: Path) -> None:
    tree, path = small_tree(tmp_path / "tree"), without_compilers(tmp_path / "bin")
    fatal = setup_py(tree, "-q", "bdist_wheel", PATH=path, FUSEDRES_REQUIRE_NATIVE="1")
    assert fatal.returncode != 0
    built = setup_py(tree, "-q", "bdist_wheel", PATH=path)
    assert built.returncode == 0, built.stdout
    assert "THE NATIVE LIBRARY WAS NOT BUILT" in built.stdout
    assert wheel(tree)[1] == []


@pytest.mark.case("F45")
@needs_cuda_torch
@pytest.mark.parametrize("fault", ["another CUDA", "it fails"])
def test_toolkit_that_cannot_serve_costs_the_gpu_kernels_and_not_the_library(fault: str, tmp_path: Path) -> None:
    tree, torch_cuda = small_tree(tmp_path / "tree", cuda=True), str(torch.version.cuda)
    release = "7.5" if fault == "another CUDA" else torch_cuda
    root = toolkit(tmp_path / "cuda", archs="compute_90", release=release, compiles="echo no such GPU >&2; exit 1")
    asked = {"CUDA_HOME": str(root), "FORCE_CUDA": "1"}
    fatal = setup_py(tree, "-q", "bdist_wheel", **asked, FUSEDRES_REQUIRE_NATIVE="1")
    assert fatal.returncode != 0
    assert not (tree / "dist").exists()
    built = setup_py(tree, "-q", "bdist_wheel", **asked)
    assert built.returncode == 0, built.stdout
    assert "THE CUDA KERNELS WERE NOT BUILT" in built.stdout
    if fault == "another CUDA":
        assert f"nvcc is of CUDA 7.5, torch of CUDA {torch_cuda}" in built.stdout
        assert "Traceback" not in fatal.stdout
    assert wheel(tree)[1] == ["fusedres/_native.abi3.so"]


@pytest.mark.case("F45")
def test_cuda_is_asked_for_by_name_alone_and_told_where_there_is_no_toolkit(tmp_path: Path) -> None:
    tree, path = small_tree(tmp_path / "tree", cuda=True), str(programs(tmp_path / "bin", *SHELL, *COMPILERS))
    built = setup_py(tree, "-q", "build_ext", "--inplace", PATH=path, FORCE_CUDA="1")
    assert built.returncode == 0, built.stdout
    assert "THE CUDA KERNELS WERE NOT BUILT" in built.stdout
    nvcc = script(tmp_path / "bin" / "nvcc", f"echo called >> {tmp_path}/calls; exit 1")
    built = setup_py(tree, "-q", "build_ext", "--inplace", "--force", PATH=path, CUDA_VISIBLE_DEVICES="")
    assert built.returncode == 0, built.stdout
    assert "NOT BUILT" not in built.stdout
    assert nvcc.exists()
    assert not (tmp_path / "calls").exists()


@pytest.mark.case("F45")
def test_source_archive_holds_all_that_builds_and_tests_it(tmp_path: Path) -> None:
    tree = source_tree(tmp_path / "tree")
    held = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    made = run(sys.executable, "-c", WITHOUT_TORCH, "-q", "sdist", cwd=tree, environ=plain_environ())
    assert made.returncode == 0, made.stdout
    (archive,) = (tree / "dist").glob("fusedres-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert held <= names
    assert {"csrc/registration.cpp", "csrc/cuda/ops.h", "kernels/conv_fprop.py", "Makefile", "LICENSE"} <= names
    assert not any(name.endswith((".so", ".pyc")) or name.startswith("fusedres/kernels") for name in names)

"""The real archives, installed into clean environments of their own: ``make dist-check``. Needs the package index.

One source archive is made outside version control; everything is installed from it or from the wheel it builds. What
small trees show in seconds (no ninja, an nvcc that fails, ...) is in tests/field/test_field_packaging.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from builds import SHELL, counting_compiler, plain_environ, programs, run, source_tree, toolkit

pytestmark = pytest.mark.case("F45")

Done = subprocess.CompletedProcess

#: A step of training and a call in eval of a fused network, against the modules one by one.
USE = """
import torch, fusedres
from fusedres import native
torch.manual_seed(0)
net, x = fusedres.resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
net(x).square().sum().backward()
net.eval()
with torch.no_grad():
    fused = net(x)
    traced = torch.jit.trace(net, x)(x)  # sees the modules one by one
assert torch.allclose(fused, traced, rtol=1e-3, atol=1e-4), (fused - traced).abs().max()
print("native:", native.missing)
"""


class Environment:
    """A virtual environment with nothing of this checkout in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)

    def python(self, *arguments: str | Path, **changes: str) -> Done[str]:
        """Its Python, started where no source lies."""
        environ = plain_environ(**changes)
        if "PATH" not in changes:
            environ["PATH"] = os.pathsep.join([str(self.folder / "bin"), "/usr/bin", "/bin"])
        return run(self.folder / "bin" / "python", *arguments, cwd=self.folder, environ=environ)

    def install(self, *arguments: str | Path, **changes: str) -> Done[str]:
        return self.python("-m", "pip", "install", "--disable-pip-version-check", *arguments, **changes)

    def use(self) -> str:
        """What a user's first lines print."""
        done = self.python("-W", "ignore", "-c", USE)
        assert done.returncode == 0, done.stdout
        return done.stdout


def succeeded(done: Done[str]) -> str:
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, made of a tree that no version control knows."""
    tree = source_tree(tmp_path_factory.mktemp("source") / "tree")
    succeeded(run(sys.executable, "setup.py", "-q", "sdist", cwd=tree, environ=plain_environ()))
    (path,) = (tree / "dist").glob("fusedres-*.tar.gz")
    return path


@pytest.fixture(scope="session")
def isolated(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Where ``pip install`` built it in isolation, with a compiler and without nvcc."""
    environment = Environment(tmp_path_factory.mktemp("isolated") / "env")
    succeeded(environment.install(archive, FUSEDRES_REQUIRE_NATIVE="1"))
    return environment


@pytest.fixture(scope="session")
def building(isolated: Environment) -> Environment:
    """The same with what a build without isolation takes."""
    succeeded(isolated.install("setuptools>=77", "wheel", "ninja"))
    return isolated


def test_isolated_install_works_and_its_requirements_agree(isolated: Environment) -> None:
    assert "native: None" in isolated.use()
    assert "No broken requirements found" in succeeded(isolated.python("-m", "pip", "check"))
    info = succeeded(isolated.python("-m", "fusedres", "info"))
    assert "built without CUDA kernels" in info


@pytest.fixture(scope="session")
def wheel(archive: Path, building: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without isolation by one compiler at a time, outside version control."""
    folder = tmp_path_factory.mktemp("wheel")
    compiler, log = counting_compiler(folder / "compiler")
    with tarfile.open(archive) as file:
        file.extractall(folder / "source", filter="data")
    (tree,) = (folder / "source").iterdir()
    command = ["-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", folder, tree]
    succeeded(building.python(*command, MAX_JOBS="1", CXX=str(compiler), FUSEDRES_REQUIRE_NATIVE="1"))
    assert max(map(int, log.read_text().split())) == 1
    (path,) = folder.glob("fusedres-*.whl")
    return path


def test_wheel_serves_every_python_and_holds_no_stray_files(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["fusedres/_native.abi3.so"]
    assert {"fusedres/py.typed", "fusedres/kernels/conv_fprop.py"} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fusedres"}


def test_wheel_installs_where_there_is_no_compiler(wheel: Path, building: Environment, tmp_path: Path) -> None:
    path = str(programs(tmp_path / "bin", *SHELL))
    succeeded(building.install("--force-reinstall", "--no-deps", wheel, PATH=path))
    assert "native: None" in building.use()
    assert "No broken requirements found" in succeeded(building.python("-m", "pip", "check"))


def without_isolation(environment: Environment, archive: Path, **changes: str) -> Done[str]:
    options = ["-v", "--force-reinstall", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    return environment.install(*options, archive, **changes)


def test_source_installs_where_there_is_no_compiler(archive: Path, building: Environment, tmp_path: Path) -> None:
    said = succeeded(without_isolation(building, archive, PATH=str(programs(tmp_path / "bin", *SHELL))))
    assert "THE NATIVE LIBRARY WAS NOT BUILT" in said
    assert "native: the native library was not built" in building.use()
    assert "No broken requirements found" in succeeded(building.python("-m", "pip", "check"))


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that is built with CUDA")
def test_source_installs_where_nvcc_is_of_another_cuda(archive: Path, building: Environment, tmp_path: Path) -> None:
    other = toolkit(tmp_path / "cuda", archs="compute_90", release="7.5")
    said = succeeded(without_isolation(building, archive, CUDA_HOME=str(other), FORCE_CUDA="1"))
    assert "nvcc is of CUDA 7.5" in said
    assert "native: None" in building.use()


def test_source_without_torch_stops_with_one_line(archive: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "env")
    succeeded(environment.install("setuptools>=77", "wheel", "ninja"))
    said = without_isolation(environment, archive)
    assert said.returncode != 0
    assert "fusedres: building needs torch>=2.11 in this environment" in said.stdout
    assert "Traceback" not in said.stdout

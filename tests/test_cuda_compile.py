"""The CUDA kernels through nvcc for every supported architecture: nothing spills, registers are bounded."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from setup import TORCH_TARGET_VERSION, cuda_toolkit  # noqa: E402

TOOLKIT = cuda_toolkit(os.environ)
ARCHS = ("80", "86", "89", "90", "100", "120")
#: Headers with kernels; each says how all that it ships is instantiated.
FAMILIES = {
    "bottleneck_fprop": "bottleneck_fprop<T>({}, 1, 0, -1, launch)",
    "basic_block_fprop": "basic_block_fprop<T>({}, 0, -1, launch)",
    "stem_fprop": "stem_fprop<T>({}, 0, 0, launch)",
    "head_fprop": "head_fprop<T>({}, 0, launch)",
}
#: Registers a thread may use: 65536 of an SM shared by 256 threads.
MOST_REGISTERS = 255

pytestmark = pytest.mark.skipif(TOOLKIT is None, reason="needs nvcc")

SOURCE = """
#include "cuda/{family}.h"
namespace fusedres::cuda {{
struct Launch {{
  template <typename Kernel, typename Problem>
  void operator()(const LaunchShape& s, Kernel kernel, const Problem& problem) const {{
    kernel<<<s.grid, s.threads, s.shared_bytes>>>(problem);
  }}
}};
template <typename T> void instantiate() {{
  const Launch launch;
  {call};
}}
template void instantiate<device::half>();
template void instantiate<device::bfloat16>();
}}
"""


def compile_family(family: str, arch: str, folder: Path) -> str:
    """What ptxas says of ``family``'s kernels on ``arch``."""
    source = folder / f"{family}.{arch}.cu"
    source.write_text(SOURCE.format(family=family, call=FAMILIES[family]))
    command = [str(TOOLKIT / "bin" / "nvcc"), "-std=c++17", "-O3", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += ["-arch", f"sm_{arch}", "-cubin", "-o", str(source.with_suffix(".cubin")), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@functools.cache
def reports(folder: Path) -> dict[tuple[str, str], str]:
    todo = [(family, arch) for family in FAMILIES for arch in ARCHS]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(todo, pool.map(lambda item: compile_family(*item, folder), todo), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_spills(family: str, arch: str, folder: Path) -> None:
    report = reports(folder)[family, arch]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert spills
    assert all(numbers == ("0", "0", "0") for numbers in spills), report
    assert max(registers) <= MOST_REGISTERS
    print(family, arch, "registers:", sorted(registers))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_launcher_compiles_against_the_stable_abi(family: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    include = Path(torch.__file__).parent / "include"
    command = [str(TOOLKIT / "bin" / "nvcc"), "-std=c++17", "-O1", "-arch", "sm_90", "-DUSE_CUDA"]
    command += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-I{ROOT / 'csrc'}", f"-I{include}"]
    command += ["-c", "-o", str(tmp_path / "launcher.o"), str(ROOT / "csrc" / "cuda" / f"{family}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

"""The CUDA kernels through nvcc for every supported architecture: nothing spills, registers are bounded."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from bench.cuda_usage import FAMILIES, MULTIPROCESSORS, TAILS, TOOLKIT, nvcc_release, usages  # noqa: E402
from setup import CXX_STANDARD, TORCH_TARGET_VERSION  # noqa: E402

#: Registers a thread may use: 65536 of an SM shared by 256 threads.
MOST_REGISTERS = 255
#: Families with a second kernel, which merges what blocks have summed.
SUMS = ("drelu_dbn", "channel_stats")
PAGE = ROOT / "docs" / "static_report.md"

pytestmark = pytest.mark.skipif(TOOLKIT is None, reason="needs nvcc")


@pytest.mark.parametrize("arch", MULTIPROCESSORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_spills(family: str, arch: str) -> None:
    found = usages(family, arch)
    names = {family, f"{family}_merge"} if family in SUMS else {family}
    assert {usage.kernel.partition("<")[0] for usage in found} == names
    dtypes = {"float16", "bfloat16", *(["float32"] if family in TAILS else [])}
    assert {re.findall(r"<(\w+)", usage.kernel)[0] for usage in found} == dtypes
    assert [usage for usage in found if usage.spilled_bytes] == []
    assert max(usage.registers for usage in found) <= MOST_REGISTERS
    print(arch, *found, sep="\n")


@pytest.fixture(scope="module")
def page() -> str:
    """docs/static_report.md, where it is of this nvcc."""
    text = PAGE.read_text()
    if f"by nvcc {nvcc_release()}:" not in text:
        pytest.skip(f"docs/static_report.md was written with another nvcc than {nvcc_release()}")
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_has_the_registers_of_every_kernel(family: str, page: str) -> None:
    by_arch = [usages(family, arch) for arch in MULTIPROCESSORS]
    for found in zip(*by_arch, strict=True):
        row = f"| `{found[0].kernel}` | " + " | ".join(str(usage.registers) for usage in found) + " |"
        assert row in page, f"{row}\nmake the page anew: python bench/static_report.py"
    assert len(re.findall(rf"\| `{family}(_merge)?<", page)) == len(by_arch[0])


@pytest.mark.parametrize("arch", ["86", "90"])
def test_every_launch_fits_and_stands_on_the_page(arch: str, page: str) -> None:
    pytest.importorskip("triton")
    from bench.static_report import CUDA_LAUNCHES, cuda_table

    lines = list(cuda_table(arch))
    assert "\n".join(lines) in page, "make the page anew: python bench/static_report.py"
    rows = [line.strip("| ").split(" | ") for line in lines[4:-1]]
    assert len(rows) == len(CUDA_LAUNCHES) - {"86": 3, "90": 0}[arch]  # the widest bottlenecks want more shared memory
    sm = MULTIPROCESSORS[arch]
    for *_, shared, resident, _, _ in rows:
        assert int(resident) >= 1
        assert int(resident) * int(shared) << 10 <= sm.shared_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_launcher_compiles_against_the_stable_abi(family: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    include = Path(torch.__file__).parent / "include"
    command = [str(TOOLKIT / "bin" / "nvcc"), CXX_STANDARD, "-O1", "-arch", "sm_90", "-DUSE_CUDA"]
    command += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-I{ROOT / 'csrc'}", f"-I{include}"]
    command += ["-c", "-o", str(tmp_path / "launcher.o"), str(ROOT / "csrc" / "cuda" / f"{family}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

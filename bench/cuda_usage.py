"""What the kernels of csrc/cuda take of a GPU: compiled by nvcc, read from what ptxas says; no GPU is asked.

Reports of ptxas are kept outside the repository, by everything they depend on, so that tests and the page that
bench/static_report.py writes compile each kernel once.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from setup import cuda_toolkit

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
TOOLKIT = cuda_toolkit(os.environ)
#: Headers with kernels; each says how all that it ships is instantiated, in float16 and bfloat16.
FAMILIES = {
    "bottleneck_fprop": "bottleneck_fprop<T>({}, 1, 0, -1, launch)",
    "basic_block_fprop": "basic_block_fprop<T>({}, 0, -1, launch)",
    "stem_fprop": "stem_fprop<T>({}, 0, 0, launch)",
    "head_fprop": "head_fprop<T>({}, 0, launch)",
    "scale_shift_add_relu": "scale_shift_add_relu<T>({}, launch)",
    "drelu_dbn": "drelu_dbn<T>({}, launch)",
    "dbn": "dbn<T>({}, launch)",
    "channel_stats": "channel_stats<T>({}, launch)",
    "bn_finalize": "bn_finalize<T>({}, launch)",
}
#: Those that have kernels for float32 too.
TAILS = ("scale_shift_add_relu", "drelu_dbn", "dbn", "channel_stats", "bn_finalize")


class Multiprocessor(NamedTuple):
    """One SM and how many a GPU has (CUDA C++ Programming Guide, technical specifications per compute capability)."""

    gpu: str
    count: int
    threads: int
    blocks: int
    shared_bytes: int  # of all its blocks; each takes 1 KiB more than it asks for
    registers: int = 65536


#: By the architectures that are compiled for.
MULTIPROCESSORS = {
    "80": Multiprocessor("A100", 108, 2048, 32, 164 << 10),
    "86": Multiprocessor("RTX 3090", 82, 1536, 16, 100 << 10),
    "89": Multiprocessor("RTX 4090", 128, 1536, 24, 100 << 10),
    "90": Multiprocessor("H100 SXM", 132, 2048, 32, 228 << 10),
    "100": Multiprocessor("B200", 148, 2048, 32, 228 << 10),
    "120": Multiprocessor("RTX 5090", 170, 1536, 24, 100 << 10),
}
_RESERVED = 1 << 10
_WARP = 32
THREADS = 256  # of a block

_SOURCE = """
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
{instances}
}}
"""

#: Prints what each problem would launch: label, kernel, blocks, dynamic shared memory.
_SHAPES = """
#include <dlfcn.h>
#include "cuda/basic_block_fprop.h"
#include "cuda/bottleneck_fprop.h"
#include "cuda/channel_stats.h"
#include "cuda/dbn.h"
#include "cuda/drelu_dbn.h"
#include "cuda/head_fprop.h"
#include "cuda/scale_shift_add_relu.h"
#include "cuda/stem_fprop.h"
using namespace fusedres::cuda;
using T = fusedres::device::half;
struct Record {{
  const char* label;
  template <typename Kernel, typename Problem>
  void operator()(const LaunchShape& s, Kernel kernel, const Problem&) const {{
    Dl_info found{{}};
    dladdr(reinterpret_cast<void*>(kernel), &found);
    std::printf("%s\\t%s\\t%u\\t%zu\\n", label, found.dli_sname, s.grid, s.shared_bytes);
  }}
}};
constexpr int N = {batch};
constexpr size_t limit = shared_limit({arch});
int out(int size, int stride) {{ return (size - 1) / stride + 1; }}
void bottleneck(const char* label, int C, int F, int side, int stride) {{
  BottleneckProblem<T> p{{}};
  p.N = N, p.H = p.W = side, p.C = C, p.F = F, p.K = 4 * F, p.P = p.Q = out(side, stride);
  bottleneck_fprop(p, stride, limit, -1, Record{{label}});
}}
void basic(const char* label, int C, int F, int side, int stride) {{
  BasicBlockProblem<T> p{{}};
  p.N = N, p.H = p.W = side, p.C = C, p.F = F, p.P = p.Q = out(side, stride), p.stride = stride;
  basic_block_fprop(p, limit, -1, Record{{label}});
}}
void stem(const char* label, int filter, int K, int side) {{
  const int stride = filter == 7 ? 2 : 1;
  StemProblem<T> p{{}};
  p.N = N, p.H = p.W = side, p.C = 3, p.K = K, p.P = p.Q = out(side, stride), p.U = p.V = out(p.P, stride);
  stem_fprop(p, filter, limit, Record{{label}});
}}
void head(const char* label, int images, int C, int S, int F) {{
  HeadProblem<T> p{{}};
  p.N = images, p.S = S, p.C = C, p.F = F;
  head_fprop(p, limit, Record{{label}});
}}
template <template <typename> class Problem>
Problem<T> tail(int C, int side) {{
  Problem<T> p{{}};
  p.rows = int64_t{{N}} * side * side, p.C = C;
  return p;
}}
void forward_tail(const char* label, int C, int side) {{
  scale_shift_add_relu(tail<ScaleShiftAddReluProblem>(C, side), Record{{label}});
}}
void backward_tail(const char* label, int C, int side) {{
  drelu_dbn(tail<DreluDbnProblem>(C, side), Record{{label}});
}}
void gradient(const char* label, int C, int side) {{ dbn(tail<DbnProblem>(C, side), Record{{label}}); }}
void statistics(const char* label, int C, int side) {{
  channel_stats(tail<ChannelStatsProblem>(C, side), Record{{label}});
}}
int main() {{
{calls}
}}
"""


class Usage(NamedTuple):
    """What one kernel takes of one architecture."""

    kernel: str
    registers: int  # of a thread
    spilled_bytes: int  # stack, spill stores and spill loads of a thread

    def blocks_per_multiprocessor(self, arch: str, shared_bytes: int) -> int:
        """How many blocks one SM holds at once. Registers are handed out in units of 256 to a warp."""
        sm = MULTIPROCESSORS[arch]
        registers = -(-self.registers * _WARP // 256) * 256 * (THREADS // _WARP)
        by_shared = sm.shared_bytes // (shared_bytes + _RESERVED)
        return min(sm.blocks, sm.threads // THREADS, sm.registers // registers, by_shared)


class Shape(NamedTuple):
    """What a problem would launch."""

    label: str
    kernel: str
    blocks: int
    shared_bytes: int


def usages(family: str, arch: str) -> list[Usage]:
    """Every kernel that ``family`` ships, compiled for ``arch``, by name."""
    report = _report(family, arch)
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    names = _demangled([name for name, *_ in found])
    return sorted(
        Usage(name, int(registers), sum(map(int, spills)))
        for name, (_, *spills, registers) in zip(names, found, strict=True)
    )


@functools.cache
def nvcc_release() -> str:
    """As in "13.0"."""
    said = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release (\d+\.\d+)", said)[0]


def _nvcc() -> str:
    assert TOOLKIT is not None
    return str(TOOLKIT / "bin" / "nvcc")


@functools.cache
def _report(family: str, arch: str) -> str:
    """What ptxas says of the kernels of ``family``; RuntimeError where they do not compile."""
    dtypes = ["device::half", "device::bfloat16", *(["float"] if family in TAILS else [])]
    instances = "\n".join(f"template void instantiate<{dtype}>();" for dtype in dtypes)
    source = _SOURCE.format(family=family, call=FAMILIES[family], instances=instances)
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin"]
    state = hashlib.sha256(repr((source, flags, nvcc_release())).encode())
    for path in sorted([*(CSRC / "cuda").glob("*.h"), *(CSRC / "device").glob("*.h")]):
        state.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fusedres" / "ptxas"
    kept = cache / f"{family}.{arch}.{state.hexdigest()[:16]}.txt"
    if kept.exists():
        return kept.read_text()
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / f"{family}.cu"
        unit.write_text(source)
        command = [_nvcc(), *flags, f"-I{CSRC}", "-o", str(unit.with_suffix(".cubin")), str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    cache.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(done.stderr)
    partial.replace(kept)  # another process may be compiling the same
    return done.stderr


def shapes(calls: list[str], batch: int, arch: str) -> list[Shape]:
    """What ``calls`` of the functions in ``_SHAPES`` would launch on ``arch`` for ``batch`` images."""
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / "shapes.cpp"
        unit.write_text(_SHAPES.format(batch=batch, arch=arch, calls="\n".join(f"  {call};" for call in calls)))
        program = unit.with_suffix("")
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-std=c++17", "-O0", "-rdynamic", "-pthread", f"-I{CSRC}", str(unit), "-o", str(program)]
        subprocess.run([*command, "-ldl"], check=True)
        said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    rows = [line.split("\t") for line in said.splitlines()]
    names = _demangled([name for _, name, *_ in rows])
    return [Shape(row[0], name, int(row[2]), int(row[3])) for row, name in zip(rows, names, strict=True)]


def _demangled(symbols: list[str]) -> list[str]:
    """``stem_fprop<float16, StemTile<7, 2, true, 4, 8, 64>>`` of ``_ZN8fusedres4cuda...``."""
    said = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [_plain_name(line) for line in said.splitlines()]


def _plain_name(demangled: str) -> str:
    name = re.sub(r"\(fusedres::.*\)$", "", demangled).removeprefix("void ")
    name = re.sub(r"__half|fusedres::device::half", "float16", name)
    name = re.sub(r"__nv_bfloat16|fusedres::device::bfloat16", "bfloat16", name)
    name = re.sub(r"<float\b", "<float32", name)
    return name.replace("fusedres::cuda::", "").replace("_kernel<", "<").replace("> >", ">>")

"""What a compiled kernel takes of a GPU, read from its machine code; no GPU is asked."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs

from fusedres.kernels.aot import Build


class Multiprocessor(NamedTuple):
    """One SM and how many a GPU has (CUDA C++ Programming Guide, technical specifications per compute capability)."""

    gpu: str
    count: int
    registers: int
    threads: int
    blocks: int
    shared_bytes: int  # of all its blocks; each takes 1 KiB more than it asks for
    block_shared_bytes: int  # the most that one block may ask for


#: By the names of ``configs.TABLE``.
MULTIPROCESSORS = {
    "sm80": Multiprocessor("A100", 108, 65536, 2048, 32, 164 << 10, 163 << 10),
    "sm86": Multiprocessor("A40", 84, 65536, 1536, 16, 100 << 10, 99 << 10),
    "sm89": Multiprocessor("L40S", 142, 65536, 1536, 24, 100 << 10, 99 << 10),
    "sm90": Multiprocessor("H100 SXM", 132, 65536, 2048, 32, 228 << 10, 227 << 10),
    "sm100": Multiprocessor("B200", 148, 65536, 2048, 32, 228 << 10, 227 << 10),
    "sm120": Multiprocessor("RTX 5090", 170, 65536, 1536, 24, 100 << 10, 99 << 10),
}
_RESERVED = 1 << 10
_MATRIX_INSTRUCTION = dict.fromkeys(MULTIPROCESSORS, "mma.sync") | {"sm90": "wgmma.mma_async", "sm100": "tcgen05.mma"}


class Usage(NamedTuple):
    """What one build takes on one machine."""

    registers: int  # of a thread
    spilled_bytes: int  # local memory of a thread
    shared_bytes: int  # of a block
    threads: int
    ptx: str

    def blocks_per_multiprocessor(self, machine: str) -> int:
        """How many blocks one SM holds at once. Registers are handed out in units of 256 to a warp."""
        sm = MULTIPROCESSORS[machine]
        warps = self.threads // 32
        registers = -(-self.registers * 32 // 256) * 256 * warps
        shared = self.shared_bytes + _RESERVED
        return min(sm.blocks, sm.threads // self.threads, sm.registers // registers, sm.shared_bytes // shared)

    def instructions(self, pattern: str) -> list[str]:
        """The distinct PTX instructions that match a regular expression."""
        return sorted(set(re.findall(pattern, self.ptx)))

    def has_matrix_instruction(self, machine: str) -> bool:
        """Whether the build multiplies with the architecture's own tensor-core instruction."""
        return _MATRIX_INSTRUCTION[machine] in self.ptx


def usage(build: Build, machine: str) -> Usage:
    """Compile ``build`` for a row of ``configs.TABLE``, or take it from Triton's cache, and read what it takes."""
    compiled: Any = build.compile(machine)
    registers, spilled = _resources(compiled.asm["cubin"])
    return Usage(registers, spilled, compiled.metadata.shared, 32 * compiled.metadata.num_warps, compiled.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, local memory in bytes) of a thread, as the tool in Triton's wheel finds them in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    registers, stack, local = map(int, found)
    return registers, stack + local

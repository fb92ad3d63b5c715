"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a process that preloads them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sanitizers
from build_emulator import missing, sanitized

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.skipif(sanitized(), reason="starts the sanitized process, and this is one")

#: Tests that a sanitized process repeats: every kernel, ragged in every dimension, and the emulator's own.
SUITE = (
    "test_emulator.py and (warps_exchange or named_barriers or fragments)"
    " or test_racecheck.py and (forward or read_around)"
    " or test_bottleneck_fprop.py and (empty or ragged and not bfloat16 and (72 or 136 or 352) and (9 or 13))"
    " or test_basic_block_fprop.py and ragged and not bfloat16 and (24 or 136) and 13"
    " or test_stem_fprop.py and accurate and not bfloat16 and (33 or 136 or 45)"
    " or test_head_fprop.py and accurate and not bfloat16 and (33 or 37)"
    " or test_tails.py and float16 and not bfloat16 and (projection or both or batch or finalize or stats or empty)"
    " and not (100 or 31)"
)


def sanitized_environment(**more: str) -> dict[str, str]:
    if not sanitizers.preloads():
        pytest.skip(f"needs AddressSanitizer's library beside {sanitizers.COMPILER}")
    path = os.pathsep.join((str(ROOT), str(HERE)))
    return sanitizers.environment(FUSEDRES_EMULATOR_SANITIZE="1", PYTHONPATH=path, **more)


def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=sanitized_environment(**more),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(missing is not None, reason=str(missing))
class TestSanitizers:
    def test_kernels_are_clean(self) -> None:
        done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SUITE, str(HERE))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert " passed" in done.stdout

    @pytest.mark.parametrize(("index", "is_caught"), [(32, False), (33, True), (-1, False)])
    def test_one_past_a_tile_is_caught(self, index: int, is_caught: bool) -> None:
        """Element 33 of a tile of 33; -1 asks for nothing, so that the module itself is known to load."""
        call = f"load('emulator_probes').read_tile({index})" if index >= 0 else "load('emulator_probes')"
        done = run("-c", f"from build_emulator import load; {call}")
        assert ("AddressSanitizer: use-after-poison" in done.stderr) == is_caught, done.stderr[-3000:]
        assert (done.returncode != 0) == is_caught

"""Native ops called with random arguments, right and spoiled; `make soak` does it under sanitizers, for longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from oracles import needs_native

import fusedres

FUZZ = Path(__file__).parent / "fuzz_native.py"
CALLS = 300


@needs_native
def test_no_call_of_a_native_op_ends_the_process_or_changes_what_it_refuses(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(fusedres.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    trace = tmp_path / "call"
    command = [sys.executable, str(FUZZ), "--calls", str(CALLS), "--trace", str(trace)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode} in {trace.read_text().strip()}\n{done.stderr[-2000:]}"
    result = json.loads(done.stdout)
    assert result["answered"] + result["refused"] == CALLS
    assert min(result["answered"], result["refused"]) > CALLS // 4

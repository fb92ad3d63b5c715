"""Faults planted one by one into a copy of the package, and whether the tests see each of them.

    python tests/soak/planted.py

Answers JSON on stdout; exit code 1 where a fault went unseen. A fault is a piece of text in place of another.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

BLOCKS = "tests/test_block_properties.py"
STATISTICS = "tests/test_batch_norm.py"
FUSE = "tests/test_fuse_properties.py"
FILES = "tests/test_cli_bad_input.py"
THREADS = "tests/test_concurrency.py"
MEMORY = "tests/soak/test_memory.py"
NATIVE = "tests/soak/fuzz_native.py"

LINES = "tests/test_lines.py"
RECALL = "tests/test_recall.py"

WEAK = "_entries: WeakKeyDictionary[nn.Module, Entry] = WeakKeyDictionary()"
ROWS = "acc_dtype(dtype), {tensor.size(0), channels}"


@dataclass(frozen=True)
class Fault:
    """``what`` is wrong where ``new`` stands instead of ``old``, and which ``tests`` should see it."""

    what: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = (
    Fault(
        "backward divides by one value fewer",
        "fusedres/autograd/unit.py",
        "1 / pixels(g)",
        "1 / (pixels(g) - 1)",
        BLOCKS,
    ),
    Fault("an absorbed bias hides NaN", "fusedres/autograd/unit.py", "(bn[2] * dbeta * (0", "(bn[2] * 0 * (0", BLOCKS),
    Fault("running variance is the biased one", "fusedres/reference.py", "m2 / (count - 1)", "m2 / count", STATISTICS),
    Fault(
        "eval forgets the conv's own bias",
        "fusedres/folding.py",
        "vectors = conv.bias, bn",
        "vectors = None, bn",
        BLOCKS,
    ),
    Fault(
        "hooks are overlooked",
        "fusedres/inspection.py",
        'state["_forward_hooks"]\n        or',
        "False\n        or",
        BLOCKS,
    ),
    Fault("one value per channel trains", "fusedres/functional.py", "n * p * q == 1", "n * p * q < 0", BLOCKS),
    Fault(
        "a second reader is overlooked", "fusedres/chain_search.py", "if len(users) != 1:", "if len(users) < 1:", FUSE
    ),
    Fault(
        "+= makes a new tensor",
        "fusedres/tracing.py",
        "return _StandIn(node, self)",
        "return fx.Proxy(node, self)",
        FUSE,
    ),
    Fault("writes between are overlooked", "fusedres/chain_search.py", "return not writes or", "return True or", FUSE),
    Fault(
        "any pool joins a chain", "fusedres/chain_search.py", "is_stem = len(chain.pairs) == 1", "is_stem = True", LINES
    ),
    Fault("lines pass over what stands between", "fusedres/lines.py", "node.prev is former and ", "", LINES),
    Fault(
        "lines hide a map that others read",
        "fusedres/lines.py",
        "list(former.users) == [node]",
        "node in former.users",
        FUSE,
    ),
    Fault("lines outlive what they were decided by", "fusedres/recall.py", "last.course.holds()", "True", LINES),
    Fault(
        "networks outlive their hooks",
        "fusedres/recall.py",
        "all_hold(last.guards, (*parts, *last.below))",
        "True",
        RECALL,
    ),
    Fault("models are traced at once", "fusedres/tracing.py", "    with _lock:", "    if True:", THREADS),
    Fault("a chain stays with its model", "fusedres/folding.py", WEAK, "_entries: dict[nn.Module, Entry] = {}", MEMORY),
    Fault(
        "files are written in place", "fusedres/training/checkpoint.py", 'path.name + ".partial"', "path.name", FILES
    ),
    Fault(
        "a full disk leaves a part", "fusedres/training/checkpoint.py", "aside.unlink(missing_ok=True)", "pass", FILES
    ),
    Fault("errors of the disk are not told", "fusedres/cli/__init__.py", "if reason is None:", "if True:", FILES),
    Fault(
        "pickles run their code", "fusedres/training/checkpoint.py", "weights_only=True", "weights_only=False", FILES
    ),
    Fault("results are believed", "fusedres/cli/results.py", "        tables.markdown(result)  #", "        #", FILES),
    Fault("storage is not looked at", "csrc/cpu/checks.cpp", "<= storage_bytes(tensor)", "<= INT64_MAX", NATIVE),
    Fault("rows of vectors are not checked", "csrc/cpu/checks.cpp", "acc_dtype(dtype), {rows, channels}", ROWS, NATIVE),
    Fault("sizes may overflow", "csrc/cpu/checks.cpp", "require(fits,", "require(true,", NATIVE),
    Fault(
        "padding is a pixel short", "csrc/cpu/conv.cpp", "rows, length + 2 * margin}", "rows, length + margin}", NATIVE
    ),
)


def main() -> int:
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy(Path(folder))
        for fault in FAULTS:
            seen.append({**dataclasses.asdict(fault), "seen": _is_seen(fault, copy)})
            print(f"{'seen  ' if seen[-1]['seen'] else 'UNSEEN'}  {fault.what}", file=sys.stderr, flush=True)
    json.dump({"faults": seen}, sys.stdout)
    return not all(fault["seen"] for fault in seen)


def _copy(folder: Path) -> Path:
    """The checkout, its native libraries and their objects included, where faults do no harm."""
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache")
    copy = shutil.copytree(ROOT, folder / "copy", ignore=ignored, symlinks=True)
    for tests in sorted({fault.tests for fault in FAULTS}):
        assert _passes(tests, copy), f"{tests} fails without a fault"
    return copy


def _is_seen(fault: Fault, copy: Path) -> bool:
    path = copy / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.old!r} is {text.count(fault.old)} times in {fault.file}"
    path.write_text(text.replace(fault.old, fault.new))
    try:
        return not _passes(fault.tests, copy)
    finally:
        path.write_text(text)


def _passes(tests: str, copy: Path) -> bool:
    """Whether these tests pass in the copy; those of the native library are its calls under sanitizers."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    if tests == NATIVE:
        command = [sys.executable, NATIVE, "--calls", "1500", "--sanitize"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())

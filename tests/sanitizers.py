"""AddressSanitizer and UndefinedBehaviorSanitizer: what a process that loads sanitized code needs, and our library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "g++")


def preloads() -> list[str]:
    """The libraries that must be in a process before sanitized code is; none where the compiler lacks them."""
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the second, so that exceptions are seen from the start
        asked = [COMPILER, f"-print-file-name={name}"]
        found.append(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    return found if Path(found[0]).is_absolute() else []


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that loads sanitized code. An allocation too large fails, as it does without."""
    options = "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1:max_allocation_size_mb=4096"
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preloads()),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **more,
    }


def sanitized_package() -> Path:
    """A folder with the package, its native library built under sanitizers; only what has changed is built again."""
    base = ROOT / "build" / "sanitized"
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build",
        "--build-base",
        str(base),
        "--build-lib",
        str(base / "lib"),
    ]
    settings = {"FUSEDRES_SANITIZE": "1", "FUSEDRES_REQUIRE_NATIVE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the sanitized build failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return base / "lib"

"""Every kernel compiled ahead of time, without a GPU. Compiled ones stay in Triton's own cache (TRITON_CACHE_DIR)."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET"):
    raise pytest.UsageError("these tests compile: run them in a process without TRITON_INTERPRET")

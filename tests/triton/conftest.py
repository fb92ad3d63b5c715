"""The Triton kernels on the GPU where there is one, else under Triton's interpreter on CPU tensors.

The interpreter must be chosen before Triton is imported, so that these tests run in a process of their own:
``TRITON_INTERPRET=1 pytest tests/triton``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
    raise pytest.UsageError("there is no GPU here: run these tests with TRITON_INTERPRET=1 in the environment")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    """float32 in full, for eager on the CPU is what errors are held against; TF32 is asked for where it is meant."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def device() -> str:
    """The device of the tensors that kernels are given."""
    return DEVICE

"""The Triton kernels on the GPU where there is one, else under Triton's interpreter on CPU tensors.

The interpreter must be chosen before Triton is imported, so that these tests run in a process of their own:
``TRITON_INTERPRET=1 pytest tests/triton``.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
    raise pytest.UsageError("there is no GPU here: run these tests with TRITON_INTERPRET=1 in the environment")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


@pytest.fixture
def device() -> str:
    """The device of the tensors that kernels are given."""
    return DEVICE

"""The Triton kernels on the GPU where there is one, else under Triton's interpreter on CPU tensors.

The interpreter is chosen before a kernel is imported, so that these tests run in a process of their own.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


@pytest.fixture
def device() -> str:
    """The device of the tensors that kernels are given."""
    return DEVICE

"""The native CUDA kernels on a GPU. Elsewhere they are run by the emulator (tests/emulator)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusedres import native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "needs a GPU" if not torch.cuda.is_available() else native.missing_cuda
    if reason is not None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))

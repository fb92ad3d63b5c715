"""All tests here need the emulator, and with it a C++ compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
from build_emulator import missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if missing is None:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=missing))

"""All tests here need the emulator, and with it a C++ compiler."""

from __future__ import annotations

import pytest
from build_emulator import missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if missing is None:
        return
    for item in items:
        if "emulator" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=missing))

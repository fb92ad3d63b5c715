"""The faults that ``make soak`` plants are still where it looks for them."""

from __future__ import annotations

import pytest
from planted import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_the_text_of_a_fault_stands_once_in_its_file(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert all((ROOT / test).exists() for test in fault.tests.split())

"""The emulator's race detector: hazards are errors under every order of threads, and what is in order is none."""

from __future__ import annotations

import math
from typing import Any

import emulated
import pytest
from build_emulator import load

IN_ORDER = ["barrier", "neighbours within four bytes", "syncwarp", "named barrier", "block_sum, twice", "copy"]
#: Cases of races.cpp, by what is said of them.
ERRORS = {
    "no barrier between": [
        "no barrier",
        "no barrier behind the readers",
        "two writers",
        "syncwarp between warps",
        "syncwarp behind readers of both warps",
        "shuffle",
        "named barrier the wrong way",
    ],
    "cp.async of thread .* is on its way|no barrier between": [
        "copy not waited for, behind a barrier",
        "copy waited for, no barrier",
        "copy over what others read",
    ],
    "cp.async of thread .* is on its way": ["copy not waited for"],
    "which nobody has written": ["never written"],
    "outside of it": ["behind a tile"],
    "of a view": ["behind a view", "before a view", "row behind a tile", "column behind a tile"],
    "misaligned": ["misaligned"],
    "written around": ["written around the primitives"],
    "atomics on shared memory": ["atomics"],
}

orders = pytest.mark.parametrize("order", emulated.ORDERS, ids=str)


@pytest.fixture(scope="module")
def probes() -> Any:
    return load("emulator_probes")


@orders
@pytest.mark.parametrize("case", IN_ORDER)
def test_what_is_in_order_is_no_hazard(probes: Any, case: str, order: tuple[str, int]) -> None:
    probes.race(case, *order)


@orders
@pytest.mark.parametrize(("case", "message"), [(case, message) for message, cases in ERRORS.items() for case in cases])
def test_hazards_are_errors(probes: Any, case: str, message: str, order: tuple[str, int]) -> None:
    with pytest.raises(RuntimeError, match=message):
        probes.race(case, *order)


@pytest.mark.parametrize(
    ("case", "kind"), [("no barrier behind the readers", "read, .*WAR"), ("two writers", "written, .*WAW")]
)
def test_the_message_names_bytes_threads_and_kind(probes: Any, case: str, kind: str) -> None:
    message = rf"block 0, thread \d+ writes 4 bytes of byte \d of part 0 of 1024 bytes, which thread \d+ has {kind}"
    with pytest.raises(RuntimeError, match=message):
        probes.race(case, "forward", 0)


def test_a_read_around_the_primitives_sees_poison(probes: Any) -> None:
    assert math.isnan(probes.read_around())


@orders
def test_blocks_hand_over_what_they_fence(probes: Any, order: tuple[str, int]) -> None:
    assert probes.hand_over(True, True, *order) == 64
    for barrier, fence in ((False, True), (True, False)):
        with pytest.raises(RuntimeError, match=r"reads global memory that thread .* of block .* has written"):
            probes.hand_over(barrier, fence, *order)

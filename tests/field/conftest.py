"""Where a field case runs: every engine on the CPU, under Triton's interpreter in a process of its own, on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from field_nets import WAYS, Place

import fusedres

#: Set before Triton is imported, so in a process of its own: ``TRITON_INTERPRET=1 pytest tests/field -m kernel``.
INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))


def places() -> list[Place]:
    """Every engine on every device that this process can use."""
    if INTERPRETED:
        return [Place("triton", "cpu")]
    cuda = [Place("reference", "cuda"), Place("triton", "cuda")] if torch.cuda.is_available() else []
    return [Place("reference", "cpu"), Place("cpu", "cpu"), *cuda]


@pytest.fixture(params=places(), ids=str)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Each engine in turn, preferred for the whole test, and the device of its tensors."""
    with fusedres.engine(request.param.engine):
        yield request.param


@pytest.fixture(params=WAYS)
def drop_in(request: pytest.FixtureRequest) -> Callable:
    """Each way to a fused model in turn: ``drop_in(make, eager)`` has the weights of ``eager = make(EAGER)``."""
    return WAYS[request.param]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Small problems on a busy machine wait for their second thread longer than they compute."""


@pytest.fixture(autouse=True)
def _case(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Write the case that a test settles into the results (--junitxml), for docs/reliability.md."""
    for marker in request.node.iter_markers("case"):
        record_property("case", marker.args[0])

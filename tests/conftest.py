"""Fixtures of all tests: a fixed seed, and the engine a test runs under; how many examples hypothesis draws."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from oracles import ENGINES

import fusedres

#: Few and always the same, unless ``--hypothesis-profile=soak`` asks for many new ones.
settings.register_profile("few", max_examples=150, derandomize=True, database=None, deadline=None)
settings.register_profile(
    "soak", max_examples=2000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("few")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small problems on a busy machine wait for their second thread a hundred times longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each engine in turn, preferred for the whole test."""
    with fusedres.engine(request.param):
        yield request.param

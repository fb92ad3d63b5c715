"""Fixtures of all tests: a fixed seed, and the engine a test runs under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracles import ENGINES

import fusedres


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

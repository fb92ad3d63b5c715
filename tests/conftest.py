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


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each engine in turn, preferred for the whole test."""
    with fusedres.engine(request.param):
        yield request.param

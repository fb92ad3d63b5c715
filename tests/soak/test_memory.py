"""A short soak: nothing stays behind of steps, calls, failures and models; `make soak` runs thousands of each."""

from __future__ import annotations

import mmap

import memory
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_nothing_stays_behind() -> None:
    growths = memory.soak(steps=60, calls=600)
    assert not [growth.fault for growth in growths if growth.fault is not None]
    assert all(growth.rounds > 0 for growth in growths)


def test_a_tensor_kept_each_round_is_seen() -> None:
    kept: list[torch.Tensor] = []
    growth = memory.watch("keeping", lambda i: kept.append(torch.zeros(1)), 50)
    assert growth.fault == "keeping: 40 tensors more after 50 rounds"


def test_memory_kept_each_round_is_seen() -> None:
    kept: list[mmap.mmap] = []  # pages that no earlier test has left to the allocator

    def keep(i: int) -> None:
        kept.append(mmap.mmap(-1, 2**20))
        kept[-1].write(b"x" * 2**20)

    growth = memory.watch("keeping", keep, 50)
    assert growth.fault is not None
    assert growth.bytes > 20 * 2**20

"""The native fingerprint: any change of the bytes, their order or their layout is seen."""

from __future__ import annotations

import pytest
import torch
from oracles import batch, needs_native

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

kernels = torch.ops.fusedres_cpu


@pytest.mark.parametrize("size", [1, 7, 8, 63, 64, 65, 200])
def test_fingerprint_sees_every_bit(size: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    seen = {kernels.fingerprint([data]).item()}
    for byte in range(size):
        for bit in range(8):
            flipped = data.clone()
            flipped[byte] ^= 1 << bit
            seen.add(kernels.fingerprint([flipped]).item())
    assert len(seen) == 1 + 8 * size


def test_fingerprint_sees_order_signs_and_layout() -> None:
    a, b = batch(4, 8, 3, 3), torch.randn(300_001)
    swapped, negated = b.clone(), b.clone()
    swapped[[7, 200_000]] = swapped[[200_000, 7]]
    negated[[16, 32]] *= -1
    variants = [[a, b], [b, a], [a, swapped], [a, negated], [a.contiguous(), b], [a, b[:-1]], [a], [b.double(), a]]
    assert len({kernels.fingerprint(tensors).item() for tensors in variants}) == len(variants)
    assert kernels.fingerprint([a, b]).equal(kernels.fingerprint([a.clone(), b.clone()]))


def test_fingerprint_sees_tensors_with_gaps_by_value() -> None:
    a = torch.randn(6, 10)
    before = kernels.fingerprint([a[:, ::2]])
    a[:, 1] += 1
    assert before.equal(kernels.fingerprint([a[:, ::2]]))
    a[3, 4] += 1
    assert not before.equal(kernels.fingerprint([a[:, ::2]]))

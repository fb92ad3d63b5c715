"""Whole networks, eval and a training step: torchvision's eager model channels_last, the same compiled, and fused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contest import BATCHES, CONTESTANTS, DEVICE, DTYPES, pair

import fusedres

torchvision = pytest.importorskip("torchvision", reason="needs torchvision: its models are the baseline")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def bench_network(name: str, training: bool, batch: int, dtype: str, compare: Callable[..., None]) -> None:
    x = torch.randn(batch, 3, 224, 224, device=DEVICE, dtype=DTYPES[dtype]).to(memory_format=torch.channels_last)
    models = pair(*(getattr(family, name)() for family in (torchvision.models, fusedres)))
    compare(models, x, training, f"{name} {'train' if training else 'eval'} {dtype} batch {batch}")

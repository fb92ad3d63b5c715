"""Whole networks, eval and a training step: fused against torchvision's eager model, channels_last."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contest import CONTESTANTS, pair

import fusedres

torchvision = pytest.importorskip("torchvision", reason="needs torchvision: its models are the baseline")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize(("training", "batch"), [(False, 1), (True, 4)], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def bench_network(
    name: str, training: bool, batch: int, contestant: str, compare: Callable[..., None], benchmark
) -> None:
    benchmark.group = f"{name} {'train' if training else 'eval'} batch {batch}"
    x = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    compare(pair(*(getattr(family, name)() for family in (torchvision.models, fusedres))), contestant, x, training)

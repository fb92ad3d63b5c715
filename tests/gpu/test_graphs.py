"""CUDA graphs of whole networks: frozen ones for several batches at once, and training by torch's own utility."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import batch, shake
from torch import Tensor, nn

import fusedres
from fusedres import measure


def network(dtype: torch.dtype) -> nn.Module:
    """A fused ResNet-18 channels_last on the GPU."""
    return shake(fusedres.resnet18(num_classes=10)).to(dtype).cuda().to(memory_format=torch.channels_last)


def images(n: int, dtype: torch.dtype) -> Tensor:
    return batch(n, 3, 64, 64, dtype=dtype).cuda()


@torch.no_grad()
@pytest.mark.parametrize("engine", ["cudnn", "triton", "cuda"])
def test_graphs_of_frozen_models_outlive_other_batches(engine: str) -> None:
    model = fusedres.freeze(network(torch.float16).eval())
    kept: list[Tensor] = []
    batches = [images(n, torch.float16) for n in (1, 2, 5)]
    with fusedres.engine(engine):
        expected = [model(x) for x in batches]
        replays = [measure.captured(lambda x=x: kept.append(model(x))) for x in batches]
    outputs = kept[3::4]  # the last call of each is the captured one
    model(images(7, torch.float16))
    torch.cuda.empty_cache()
    scrap = torch.full((1 << 26,), torch.nan, device="cuda")  # what was freed is written to
    for replay, y, right in zip(replays, outputs, expected, strict=True):
        replay()
        torch.cuda.synchronize()
        assert torch.equal(y, right)
    del scrap


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_graphed_callables_train_as_launches_do(dtype: torch.dtype) -> None:
    launched = network(torch.float32).train()
    graphed = copy.deepcopy(launched)
    x, labels = images(8, torch.float32), torch.arange(8, device="cuda")
    state = copy.deepcopy(graphed.state_dict())
    with torch.autocast("cuda", dtype, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(graphed, (x,))
    graphed.load_state_dict(state)  # capturing moved the running statistics
    losses = {}
    for name, model in (("launched", launched), ("graphed", graphed)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses[name] = []
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype, cache_enabled=False):
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["graphed"] == losses["launched"]
    for (name, ours), theirs in zip(graphed.state_dict().items(), launched.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name

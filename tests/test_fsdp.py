"""Sharded training (FSDP2): two processes that hold half of every parameter compute what one process does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import images, small_twins
from oracles import assert_steps_equal, ops_called
from processes import run_processes
from torch import Tensor, nn

import fusedres

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]

Results = dict[str, Tensor]

SHARE = 3  # pictures of each process


def network(kind: str = "bottleneck", **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return small_twins(kind, **options)


#: What is sharded. Under SyncBatchNorm the statistics are those of both processes' pictures.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "built": lambda: network()[0],
    "recompute": lambda: network(memory="recompute")[0],
    "converted": lambda: fusedres.fuse(network("basic")[1]),
}


def sharded(net: nn.Module) -> nn.Module:
    """Every block a unit of its own, the rest another."""
    from torch.distributed.fsdp import fully_shard

    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            fully_shard(block)
    return fully_shard(net)


def whole(t: Tensor) -> Tensor:
    """A copy of a tensor, of all its shards where it has such."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def trained(net: nn.Module, own: slice) -> Results:
    """Two steps on one's own pictures, and a call in eval: losses, last gradients, state and logits."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for seed in (1, 2):
        optimizer.zero_grad()
        net(images(2 * SHARE, seed=seed)[own]).square().mean().backward()
        gradients = {f"{name}.grad": whole(p.grad) for name, p in net.named_parameters()}
        optimizer.step()
    state = {name: whole(t) for name, t in net.state_dict().items()}
    net.eval()
    with torch.no_grad():
        return {**gradients, **state, "logits": net(images(2 * SHARE))}


def fused_calls(net: nn.Module) -> Tensor:
    net.train()
    calls = ops_called(lambda: net(images(2 * SHARE)))
    return torch.tensor([calls["fusedres::conv_fprop"], calls["aten::convolution"]])


def _member() -> dict[str, Results]:
    rank = dist.get_rank()
    results = {}
    for name, make in NETWORKS.items():
        net = sharded(nn.SyncBatchNorm.convert_sync_batchnorm(make()))
        results[name] = trained(net, slice(rank * SHARE, (rank + 1) * SHARE))
        results[name]["calls"] = fused_calls(net)
    return results


@pytest.mark.slow
def test_sharded_training_equals_the_unsharded_one(tmp_path: Path) -> None:
    members = run_processes(_member, 2, tmp_path)
    for name, make in NETWORKS.items():
        net = make()
        expected = trained(copy.deepcopy(net), slice(None))
        for results in members:
            assert torch.equal(results[name].pop("calls"), fused_calls(copy.deepcopy(net)))
            assert_steps_equal(results[name], expected)

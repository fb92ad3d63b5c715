"""What a CUDA graph forbids while it is captured: looking at a value, and copies from or to the host.

Whole steps on meta tensors through the very code of the engines for GPUs: a value cannot be looked at there, launches
are noted and not made, and every call of PyTorch's shows on which devices its tensors are. tests/gpu captures for real.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, ResNet, dispatch, ops
from fusedres.engines import nvidia
from fusedres.kernels.launch import Launch, recording

#: What waits for the device, or has a size that its data decides.
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "bincount")


class Host(TorchDispatchMode):
    """Notes every op that is called, our own by what they call, and where its tensors are."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in ops.IMPLEMENTATIONS:
            with self:
                return ops.IMPLEMENTATIONS[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] += 1
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        self.devices |= {t.device.type for t in tensors}
        return result


@pytest.fixture(params=["cudnn", "triton"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with nvidia.planning((9, 0)), dispatch.meta_as("cuda"), fusedres.engine(request.param):
        yield request.param


def watched(function: Callable[[], object]) -> tuple[Host, list[Launch]]:
    with recording() as launches, Host() as host:
        function()
    return host, launches


def assert_capturable(host: Host, launches: list[Launch]) -> None:
    assert launches
    assert host.devices == {"meta"}
    waits = {name: n for name, n in host.calls.items() if name.partition("::")[2].rstrip("_") in WAITS}
    assert not waits
    assert all(arg.device.type == "meta" for launch in launches for arg in launch.args if isinstance(arg, Tensor))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: ResNet(FusedBasicBlock, [2, 1, 1, 1], num_classes=10),
    "bottleneck": lambda: ResNet(FusedBottleneck, [2, 1, 1, 1], num_classes=10),
    "recompute": lambda: ResNet(FusedBottleneck, [1, 1, 1, 1], num_classes=10, memory="recompute"),
    "groups": lambda: fusedres.resnext50_32x4d(num_classes=10),
    "CIFAR": lambda: fusedres.cifar_resnet20(),
}


@pytest.mark.parametrize("chained", [True, False], ids=["chained", "blocks"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_can_be_captured(name: str, chained: bool, engine: str) -> None:
    with torch.device("meta"):
        net = NETWORKS[name]().half()
        x = torch.empty(16, 3, 64, 64, dtype=torch.half).contiguous(memory_format=torch.channels_last)
    net.set_chained_blocks(chained)
    losses: list[Tensor] = []
    assert_capturable(*watched(lambda: losses.append(net(x).float().logsumexp(1).sum())))
    assert_capturable(*watched(losses[0].backward))
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_eval_can_be_captured(name: str, engine: str) -> None:
    with torch.device("meta"):
        net = NETWORKS[name]().half().eval()
        x = torch.empty(16, 3, 64, 64, dtype=torch.half).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert_capturable(*watched(lambda: net(x)))


def test_the_inspection_sees_what_it_looks_for(engine: str) -> None:
    x = torch.empty(4, 8, device="meta")
    host, launches = watched(lambda: (x + 1, torch.ones(1).equal(torch.ones(1))))
    assert host.devices == {"meta", "cpu"}
    assert host.calls["aten::equal"] == 1
    with pytest.raises(AssertionError):
        assert_capturable(host, launches)
    for look in (lambda: x.sum().item(), lambda: x.to("cpu"), lambda: x[x > 0], lambda: x.nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            watched(look)

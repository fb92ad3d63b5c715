"""A network's call is run again at once only while nothing has changed, and gives what it gave."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from networks import images
from oracles import needs_native, ops_called, shake
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from fusedres import FusedBasicBlock, FusedBottleneck, ResNet, dispatch, folding, fuse, guards, recall
from fusedres.cifar import CifarResNet

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_native]


def converted() -> nn.Module:
    return fuse(
        torchvision_resnet.ResNet(torchvision_resnet.Bottleneck, [1, 2, 1, 1], num_classes=5, width_per_group=8)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "bottlenecks": lambda: ResNet(FusedBottleneck, [1, 2, 1, 1], num_classes=5, width_per_group=8),
    "basic blocks": lambda: ResNet(FusedBasicBlock, [1, 1, 1, 1], num_classes=5),
    "no pool": lambda: CifarResNet(1, shortcut="B"),
    "converted": converted,
}


@pytest.fixture(params=[True, False], ids=["frozen", "live"])
def is_frozen(request: pytest.FixtureRequest) -> bool:
    return request.param


def made(name: str, is_frozen: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = shake(NETWORKS[name]()).eval()
    return folding.freeze(net) if is_frozen else net


def picture(n: int = 2, side: int = 32) -> Tensor:
    return images(n, side, torch.float32)


def runs_at_once(net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a call of ``net`` looks at no chain by itself."""
    looks: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(recall, "recall", lambda *args: looks.append(args))
        net(x)
    return not looks


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_chains_runs_at_once_from_its_third_call_on(
    name: str, is_frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = made(name, is_frozen), picture()
    expected = net(x)
    assert not runs_at_once(net, x, monkeypatch)
    for _ in range(2):
        assert torch.equal(net(x), expected)
    assert runs_at_once(net, x, monkeypatch)
    assert torch.equal(net(x), expected)
    assert torch.equal(net(x.contiguous(memory_format=torch.channels_last)), expected)
    assert not runs_at_once(net, picture(3), monkeypatch)
    assert not runs_at_once(net, picture(side=40), monkeypatch)


def twice(_: nn.Module, __: object, y: Tensor) -> Tensor:
    return 2 * y


def other_forward(block: nn.Module) -> None:
    forward = block.forward
    block.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def other_class(block: nn.Module) -> None:
    known = type(block)
    block.__class__ = type("Other", (known,), {"forward": lambda self, x: 2 * known.forward(self, x)})


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight in place": lambda net: net.layer1[0].conv2.weight.mul_(1.5),
    "last statistics in place": lambda net: list(net.children())[-3][-1].bn2.running_mean.add_(1),
    "weight replaced": lambda net: setattr(net.conv1, "weight", nn.Parameter(-net.conv1.weight)),
    ".data replaced": lambda net: setattr(net.layer2[0].conv1.weight, "data", 2 * net.layer2[0].conv1.weight.data),
    "state dict": lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}),
    "eps": lambda net: setattr(net.layer2[0].bn1, "eps", 0.5),
    "block removed": lambda net: setattr(net, "layer3", nn.Sequential(*net.layer3, nn.AvgPool2d(2))),
    "block appended": lambda net: net.layer3.append(nn.AvgPool2d(2)),
    "hook of a stage": lambda net: net.layer2.register_forward_hook(twice),
    "hook of a block": lambda net: net.layer2[0].register_forward_hook(twice),
    "hook of a projection": lambda net: net.layer2[0].downsample.register_forward_hook(twice),
    "hook of the stem": lambda net: net.relu.register_forward_hook(twice),
    "forward of a block": lambda net: other_forward(net.layer3[0]),
    "forward of a stage": lambda net: other_forward(net.layer3),
    "another activation": lambda net: setattr(net.layer1[0], "relu", nn.LeakyReLU(0.5)),
    "a pool": lambda net: setattr(net, "maxpool", nn.AvgPool2d(2)),
    "training": lambda net: net.layer1[0].train(),
    "class of a block": lambda net: other_class(net.layer1[0]),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["bottlenecks", "no pool", "converted"])
def test_a_changed_network_gives_what_a_copy_that_never_ran_gives(
    name: str, change: str, is_frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = made(name, is_frozen), picture()
    fresh = copy.deepcopy(net)
    for _ in range(3):
        before = net(x)
    assert runs_at_once(net, x, monkeypatch)
    CHANGES[change](net)
    CHANGES[change](fresh)
    expected = copy.deepcopy(fresh)(x)
    assert not torch.equal(expected, before)
    for _ in range(3):
        torch.testing.assert_close(net(x), expected if change != "training" else fresh(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bottlenecks", "converted"])
def test_settings_of_the_call_are_looked_at(name: str, is_frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = made(name, is_frozen), picture()
    for _ in range(3):
        net(x)
    assert runs_at_once(net, x, monkeypatch)
    with torch.enable_grad():
        assert net(x).requires_grad
    with dispatch.engine("reference"):
        assert not ops_called(lambda: net(x))["fusedres_cpu::eval_chain"]
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"the input is torch\.float64"):
        net(x.double())
    assert runs_at_once(net, x, monkeypatch)
    folding.freeze(net.layer1)
    assert not runs_at_once(net, x, monkeypatch)


@torch.no_grad()
def test_a_network_with_more_than_chains_is_never_run_at_once() -> None:
    class Doubled(ResNet):
        def _stem(self, x: Tensor) -> Tensor:
            return 2 * super()._stem(x)

    torch.manual_seed(0)
    odd = made("bottlenecks")
    odd.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    padded = CifarResNet(1).eval()
    for net in (odd, padded, Doubled(FusedBasicBlock, [1, 1, 1, 1]).eval()):
        x = picture()
        expected = copy.deepcopy(net)(x)
        for _ in range(4):
            assert torch.equal(net(x), expected)
        assert net not in recall._networks


@torch.no_grad()
def test_a_network_that_changes_at_every_call_is_soon_left_alone() -> None:
    net, x = made("no pool"), picture()
    for call in range(2 * recall._MOST_NOTES):
        net.calls = call
        net(x)
    assert recall._notes[net] == recall._MOST_NOTES


@torch.no_grad()
@pytest.mark.parametrize("name", ["no pool", "converted"])
def test_forgotten_networks_leave_nothing_behind(name: str, is_frozen: bool) -> None:
    net, x = made(name, is_frozen), picture()
    for _ in range(3):
        net(x)
    left = weakref.ref(net), weakref.ref(net.layer3[0].conv2)
    del net
    gc.collect()
    assert [reference() for reference in left] == [None, None]


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_stay_channels_last_from_the_stem_on(memory_format: torch.memory_format) -> None:
    """A network without a max-pool had left its stem in the images' format, and every block then converted twice."""
    net, x = CifarResNet(1, shortcut="B").eval(), picture().contiguous(memory_format=memory_format)
    assert net.forward_features(x).is_contiguous(memory_format=torch.channels_last)
    with torch.enable_grad():
        ops = ops_called(lambda: net.train()(x))
    assert ops["aten::clone"] == (memory_format == torch.contiguous_format)


@pytest.mark.parametrize("is_native", [True, False])
def test_both_guards_say_the_same(is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_native:
        monkeypatch.setattr(guards.native, "library_path", lambda: None)
    guards._all.cache_clear()
    bn, t = nn.BatchNorm2d(3), torch.ones(3)
    of_modules, of_tensors = (guards.Guard.of(bn),), (guards.Identity.of(t),)

    def hold() -> tuple[bool, bool]:
        return guards.all_hold(of_modules, (bn,)), guards.all_unchanged(of_tensors, (t,))

    assert hold() == (True, True)
    assert not guards.all_hold(of_modules, (bn, bn))
    assert not guards.all_hold(of_modules, ())
    assert not guards.all_hold(of_modules, (nn.BatchNorm2d(3),))
    assert not guards.all_unchanged(of_tensors, (torch.ones(3),))
    with torch.inference_mode():
        assert not guards.all_unchanged(of_tensors, (torch.ones(3),))
    hook = bn.register_forward_hook(twice)
    assert hold() == (False, True)
    hook.remove()
    t.add_(1)
    assert hold() == (True, False)
    of_tensors = (guards.Identity.of(t),)
    assert hold() == (True, True)
    t.data = torch.ones(3)
    assert hold() == (True, False)
    bn.eps = 2.0
    assert hold() == (False, False)
    guards._all.cache_clear()

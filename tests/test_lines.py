"""Converted networks: a pool joins the stem, chains in a row run at once, pool and last layer are one call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import images
from oracles import assert_steps_equal, needs_native, ops_called, shake, step
from torch import Tensor, nn
from torch.profiler import profile
from torchvision.models import resnet as torchvision_resnet
from torchvision.ops import FrozenBatchNorm2d

from fusedres import FusedBasicBlock, explain, freeze, fuse, recall, resnet18

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_native]

FLAG = False


class Block(nn.Module):
    """A conv, its BN and a shortcut, unless the flag of this module is up; it keeps a list to decide by."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.factors: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)) + x)
        for factor in self.factors:
            y = y * factor
        return -y if FLAG else y


class Net(nn.Module):
    """Stem, blocks and head, called by whatever ``body`` a test says."""

    def __init__(self, body: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Block(), FusedBasicBlock(8, 8))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8, 5)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        if self.body is not None:
            return self.body(self, x)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


def made(body: Callable[[Any, Tensor], Any] | None = None) -> nn.Module:
    torch.manual_seed(0)
    return shake(Net(body)).eval()


def picture() -> Tensor:
    return images(2, 16, torch.float32)


def calls(net: nn.Module, x: Tensor) -> dict[str, int]:
    """How often every op is called once the network has been called three times."""
    for _ in range(3):
        net(x)
    with profile() as profiled:
        net(x)
    return {event.key.partition("::")[2]: event.count for event in profiled.key_averages()}


def assert_equals_eager(net: nn.Module, eager: nn.Module) -> None:
    for _ in range(4):
        torch.testing.assert_close(net(picture()), eager(picture()), rtol=1e-4, atol=1e-5)


# --- the pool behind a conv, BN and ReLU ---


def stem(m: Any, x: Tensor) -> Tensor:
    return m.maxpool(m.relu(m.bn1(m.conv1(x))))


def stem_of_functions(m: Any, x: Tensor) -> Tensor:
    return m.maxpool(F.relu(m.bn1(m.conv1(x))))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("body", [stem, stem_of_functions])
def test_a_pool_joins_the_stem_in_training_and_in_eval(body: Any, memory_format: torch.memory_format) -> None:
    eager, x = made(body).double(), picture().double().contiguous(memory_format=memory_format)
    net = fuse(eager)
    (row,) = [row for row in explain(net) if row.name == ""]
    assert row.kind == "Net: conv-BN, ReLU, max-pool"
    assert_steps_equal(step(net.train(), x), step(eager.train(), x))
    net.eval(), eager.eval()
    with torch.no_grad():
        for _ in range(3):
            y = net(x)
            torch.testing.assert_close(y, eager(x), rtol=0, atol=1e-10)
            assert y.is_contiguous(memory_format=memory_format)
        assert calls(net, x).keys().isdisjoint({"max_pool2d", "max_pool2d_with_indices", "convolution"})
    assert "fusedres::bn_relu_maxpool" in ops_called(lambda: net.train()(x))


NO_STEMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "no ReLU": lambda m, x: m.maxpool(m.bn1(m.conv1(x))),
    "another reader": lambda m, x: (lambda y: m.maxpool(y) + F.avg_pool2d(y, 2))(m.relu(m.bn1(m.conv1(x)))),
    "another pool": lambda m, x: m.avgpool(m.relu(m.bn1(m.conv1(x)))),
    "two convs": lambda m, x: m.maxpool(F.relu(m.layer1[0].bn(m.layer1[0].conv(m.relu(m.bn1(m.conv1(x))))))),
    "a shortcut": lambda m, x: m.maxpool(m.relu(m.bn1(m.conv1(x)) + x.mean(1, keepdim=True))),
}


@pytest.mark.parametrize("case", NO_STEMS)
def test_a_pool_that_is_not_a_stems_runs_by_itself(case: str) -> None:
    eager = made(NO_STEMS[case])
    net = fuse(eager)
    assert not any("max-pool" in row.kind for row in explain(net))
    with torch.no_grad():
        assert_equals_eager(net, eager)


@torch.no_grad()
@pytest.mark.parametrize("change", [("ceil_mode", True), ("kernel_size", (3, 2)), ("dilation", 2)])
def test_a_pool_that_no_kernel_has_runs_by_itself(change: tuple[str, Any]) -> None:
    eager = made(stem)
    net = fuse(eager)
    for model in (net, eager):
        model(picture())
        setattr(model.maxpool, *change)
    assert_equals_eager(net, eager)


@torch.no_grad()
def test_an_image_without_a_batch_is_what_it_is_to_eager() -> None:
    eager = made(stem)
    with pytest.raises(ValueError, match="expected 4D input"):
        fuse(eager)(picture()[0])
    eager.bn1 = FrozenBatchNorm2d(8)
    torch.testing.assert_close(fuse(eager)(picture()[0]), eager(picture()[0]))


# --- chains in a row ---


@pytest.fixture(params=[True, False], ids=["frozen", "live"])
def is_frozen(request: pytest.FixtureRequest) -> bool:
    return request.param


def fused(eager: nn.Module, is_frozen: bool) -> nn.Module:
    return freeze(fuse(eager)) if is_frozen else fuse(eager)


@torch.no_grad()
@pytest.mark.parametrize("kind", [torchvision_resnet.BasicBlock, torchvision_resnet.Bottleneck])
def test_a_converted_network_is_the_calls_of_ours_bit_for_bit(kind: Any, is_frozen: bool) -> None:
    torch.manual_seed(0)
    eager = shake(torchvision_resnet.ResNet(kind, [1, 2, 1, 1], num_classes=5)).eval()
    net, x = fused(eager, is_frozen), images(2, 64, torch.float32)
    expected = net(x)
    counts = calls(net, x)
    assert counts["eval_network"] == counts["head_fprop"] == 1
    assert counts.keys().isdisjoint({"eval_chain", "max_pool2d", "linear", "convolution"})
    assert torch.equal(net(x), expected)
    torch.testing.assert_close(expected, eager(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_network_of_timms_is_one_call_up_to_its_head(is_frozen: bool) -> None:
    torch.manual_seed(0)
    eager = shake(timm.create_model("resnet18", num_classes=5)).eval()
    net, x = fused(eager, is_frozen), images(2, 64, torch.float32)
    counts = calls(net, x)
    assert counts["eval_network"] == 1
    assert "eval_chain" not in counts
    torch.testing.assert_close(net(x), eager(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blocks_of_ours_and_of_others_are_one_call(is_frozen: bool) -> None:
    eager = made()
    net = fused(eager, is_frozen)
    counts = calls(net, picture())
    assert counts["eval_network"] == 1
    assert "eval_chain" not in counts
    assert_equals_eager(net, eager)


def two_maps(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    first = m.layer1(m.maxpool(m.relu(m.bn1(m.conv1(x)))))
    return first, m.layer2(first)


@torch.no_grad()
def test_a_map_that_is_handed_out_ends_a_line(is_frozen: bool) -> None:
    eager = made(two_maps)
    net = fused(eager, is_frozen)
    assert calls(net, picture())["eval_network"] == 2
    for ours, theirs in zip(net(picture()), eager(picture()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Wrapped(nn.Module):
    """A network in a network, whose chains are in the line of the outer one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.features = made(lambda m, x: m.layer2(m.layer1(stem(m, x))))
        self.other = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.features(self.first(x)))


@torch.no_grad()
def test_a_line_may_hold_others(is_frozen: bool) -> None:
    eager = shake(Wrapped()).eval()
    net = fused(eager, is_frozen)
    assert calls(net, picture())["eval_network"] == 1
    assert_equals_eager(net, eager)
    eager.features.layer1[0].bn.eps = net.features.layer1[0].bn.eps = 0.5
    assert_equals_eager(net, eager)
    assert calls(net, picture())["eval_network"] == 1


def caring(m: Any, x: Tensor) -> Tensor:
    return torch.as_strided(m.layer2(m.layer1(stem(m, x))), (2, 8, 64), (512, 64, 1))


@torch.no_grad()
def test_a_line_hands_on_maps_in_the_format_that_eager_has() -> None:
    """At once it had given channels_last whatever came in."""
    eager = made(caring)
    net = fuse(eager)
    for memory_format in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        for _ in range(3):
            x = picture().contiguous(memory_format=memory_format)
            torch.testing.assert_close(net(x), eager(x), rtol=1e-4, atol=1e-5)


def writing(m: Any, x: Tensor) -> Tensor:
    x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
    y = m.layer1(x)
    x.mul_(2)
    return m.layer2(y) + x


@torch.no_grad()
def test_what_happens_between_two_steps_parts_them() -> None:
    eager = made(writing)
    assert_equals_eager(fuse(eager), eager)


BESIDE: dict[str, Callable[[nn.Module, pytest.MonkeyPatch], None]] = {
    "a global of the forward's": lambda net, patch: patch.setitem(globals(), "FLAG", True),
    "a method of the class's": lambda net, patch: patch.setattr(Block, "forward", lambda self, x: 3 * x),
    "what a list holds": lambda net, patch: net.layer1[1].factors.append(3),
    "a hook on all modules": lambda net, patch: None,
}


@torch.no_grad()
@pytest.mark.parametrize("change", BESIDE)
def test_what_no_module_tells_is_followed(change: str, is_frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = made()
    net = fused(eager, is_frozen)
    for _ in range(3):
        before = net(picture())
    for model in (net, eager):
        BESIDE[change](model, monkeypatch)
    seen: list[nn.Module] = []
    hook = None
    if change == "a hook on all modules":
        hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    assert_equals_eager(net, eager)
    if hook is not None:
        hook.remove()
        assert {net.layer1[0].conv, net.fc, net.maxpool} <= set(seen)
    else:
        assert not torch.allclose(net(picture()), before)


# --- pool and last layer ---

HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "function": lambda m, x: m.fc(torch.flatten(m.avgpool(stem(m, x)), 1)),
    "method": lambda m, x: m.fc(m.avgpool(stem(m, x)).flatten(1)),
    "module": lambda m, x: m.fc(m.flatten(m.avgpool(stem(m, x)))),
}


@torch.no_grad()
@pytest.mark.parametrize("form", HEADS)
def test_pool_and_last_layer_are_one_call(form: str) -> None:
    eager = made(HEADS[form])
    net = fuse(eager)
    counts = calls(net, picture())
    assert counts["head_fprop"] == 1
    assert counts.keys().isdisjoint({"linear", "adaptive_avg_pool2d", "mean"})
    assert_equals_eager(net, eager)


NO_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "something between": lambda m, x: m.fc(F.relu(torch.flatten(m.avgpool(stem(m, x)), 1))),
    "another reader": lambda m, x: (lambda y: m.fc(torch.flatten(y, 1)) + y.sum())(m.avgpool(stem(m, x))),
    "flattened otherwise": lambda m, x: m.fc(torch.flatten(m.avgpool(stem(m, x)), 1, 2).squeeze(2)),
    "another pool": lambda m, x: m.fc(torch.flatten(F.max_pool2d(stem(m, x), 8), 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("case", NO_HEADS)
def test_what_is_not_a_head_runs_module_by_module(case: str) -> None:
    eager = made(NO_HEADS[case])
    net = fuse(eager)
    counts = calls(net, picture())
    assert counts["eval_chain"] == 1
    assert "head_fprop" not in counts
    assert_equals_eager(net, eager)


@torch.no_grad()
@pytest.mark.parametrize("name", ["avgpool", "flatten", "fc"])
def test_hooks_of_a_head_are_called(name: str) -> None:
    eager = made(lambda m, x: m.fc(m.flatten(m.avgpool(stem(m, x)))))
    net = fuse(eager)
    assert calls(net, picture())["head_fprop"] == 1
    for model in (net, eager):
        model.get_submodule(name).register_forward_hook(lambda _, __, y: 2 * y)
    assert_equals_eager(net, eager)


def test_a_head_trains_as_eager() -> None:
    eager = made().double()
    x = picture().double()
    net = fuse(eager)
    formats = {"dy_format": torch.contiguous_format}
    assert_steps_equal(step(net.train(), x, **formats), step(eager.train(), x, **formats))


@torch.no_grad()
def test_copies_run_at_once_by_themselves() -> None:
    net = fuse(made())
    expected = net(picture())
    assert calls(net, picture())["eval_network"] == 1
    other = copy.deepcopy(net)
    other.layer1[0].bn.bias.add_(1)
    assert calls(other, picture())["eval_network"] == 1
    assert not torch.allclose(other(picture()), expected)
    assert torch.equal(net(picture()), expected)


@torch.no_grad()
def test_a_network_of_ours_within_another_keeps_its_own_call() -> None:
    net = fuse(nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), shake(resnet18()))).eval()
    counts = calls(net, images(1, 64, torch.float32))
    assert counts["eval_network"] == 1
    assert recall._running.recalled is None

"""``fuse`` and ``unfuse`` on small modules: what is fused, what is left alone and why, and what stays as it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from oracles import assert_steps_equal, batch, ops_called, shake, step
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d

import fusedres
from fusedres import NotFusedError, explain, fuse, unfuse

FLAG = True


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Small problems on a busy machine wait for their second thread longer than they compute."""


class Net(nn.Module):
    """A conv, its BN and ReLU, called by whatever ``body`` a test says."""

    def __init__(self, body: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(self.conv(x))) if self.body is None else self.body(self, x)


class TwoConvs(Net):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(body)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)


def input_(dtype: torch.dtype = torch.float64) -> Tensor:
    return batch(2, 4, 6, 7, dtype=dtype)


def made(net: nn.Module) -> nn.Module:
    return shake(net).double()


def chains(net: nn.Module) -> list[str]:
    """What each fused chain of ``net`` is."""
    return [row.kind.partition(": ")[2] for row in explain(net) if row.engine != "eager"]


def reason(net: nn.Module) -> str:
    """Why the one conv of ``net`` that is not fused is not."""
    (row,) = [row for row in explain(net) if row.engine == "eager"]
    return row.reason


def assert_equal(ours: nn.Module, theirs: nn.Module, x: Tensor | None = None) -> None:
    """A training step, and eval with and without gradients."""
    x = input_() if x is None else x
    for training in (True, False):
        assert_steps_equal(step(ours.train(training), x), step(theirs.train(training), x))
    with torch.no_grad():
        before = x.clone()
        for _ in range(2):  # the second call finds what the first one folded
            torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)
        assert torch.equal(x, before)


# --- what is fused ---


def augmented(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    y += x
    return m.relu(y)


FORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "module": (lambda m, x: m.relu(m.bn(m.conv(x))), "conv-BN, ReLU"),
    "function": (lambda m, x: F.relu(m.bn(m.conv(x))), "conv-BN, ReLU"),
    "in-place function": (lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True), "conv-BN, ReLU"),
    "method": (lambda m, x: m.bn(m.conv(x)).relu_(), "conv-BN, ReLU"),
    "torch": (lambda m, x: torch.relu(m.bn(m.conv(x))), "conv-BN, ReLU"),
    "no relu": (lambda m, x: m.bn(m.conv(x)), "conv-BN"),
    "another activation": (lambda m, x: F.silu(m.bn(m.conv(x))), "conv-BN"),
    "identity": (lambda m, x: m.relu(m.bn(m.conv(x)) + x), "conv-BN + input, ReLU"),
    "identity first": (lambda m, x: F.relu(x + m.bn(m.conv(x))), "conv-BN + input, ReLU"),
    "augmented add": (augmented, "conv-BN + input, ReLU"),
    "add without relu": (lambda m, x: torch.add(m.bn(m.conv(x)), x), "conv-BN + input"),
    "a given tensor": (lambda m, x: m.relu(m.bn(m.conv(x)) + x.sin()), "conv-BN + tensor, ReLU"),
    "a smaller tensor": (lambda m, x: m.relu(m.bn(m.conv(x)) + x.mean((2, 3), keepdim=True)), "conv-BN + tensor, ReLU"),
    "scaled add": (lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2), "conv-BN"),
    "a number added": (lambda m, x: m.bn(m.conv(x)) + 1, "conv-BN"),
    "itself added": (lambda m, x: (lambda y: y + y)(m.bn(m.conv(x))), "conv-BN"),
}


@pytest.mark.parametrize("form", FORMS)
def test_chain_is_found_in_every_form_and_equals_eager(form: str) -> None:
    body, expected = FORMS[form]
    eager = made(Net(body))
    fused = fuse(eager, strict=True)
    assert chains(fused) == [expected]
    assert_equal(fused, eager)


def adding_twice(m: Any, x: Tensor) -> Tensor:
    y = z = m.bn(m.conv(x))
    y += x
    y *= 2
    return y + z


def adding_to_a_number(m: Any, x: Tensor) -> Tensor:
    scale = both = x.shape[1]
    scale += 1
    return m.bn(m.conv(x)) * scale + both


@pytest.mark.parametrize("body", [adding_twice, adding_to_a_number])
def test_augmented_assignment_changes_tensors_for_every_name_and_numbers_for_one(body: Any) -> None:
    eager = made(Net(body))
    fused = fuse(eager)
    assert chains(fused) == ["conv-BN"]
    assert_equal(fused, eager)


def test_augmented_add_keeps_the_dtype_and_shape_of_the_branch() -> None:
    x = input_(torch.float32)
    wide = fuse(shake(Net(lambda m, x: m.bn(m.conv(x)).add_(x.double()))).eval())
    assert wide(x).dtype == torch.float32
    narrow = fuse(made(Net(lambda m, x: m.bn(m.conv(x[:1])).add_(x))).eval())
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        narrow(input_())


def test_units_in_a_row_become_one_chain() -> None:
    eager = made(TwoConvs(lambda m, x: m.relu(m.bn2(m.conv2(m.relu(m.bn(m.conv(x))))) + x)))
    fused = fuse(eager)
    assert chains(fused) == ["2 x conv-BN + input, ReLU"]
    assert_equal(fused, eager)


def test_projection_is_run_within_the_chain_that_adds_it() -> None:
    eager = made(TwoConvs(lambda m, x: m.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x)))))
    fused = fuse(eager)
    assert chains(fused) == ["conv-BN + projection, ReLU"]
    assert_equal(fused, eager)


def test_branch_that_reads_another_input_is_a_chain_of_its_own() -> None:
    eager = made(TwoConvs(lambda m, x: m.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x.cos())))))
    fused = fuse(eager)
    assert sorted(chains(fused)) == ["conv-BN", "conv-BN + tensor, ReLU"]
    assert_equal(fused, eager)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_blocks_of_torchvision_become_one_chain(kind: Any, norm: Any) -> None:
    def net() -> nn.Module:
        downsample = nn.Sequential(nn.Conv2d(4, 2 * kind.expansion, 1, 2, bias=False), norm(2 * kind.expansion))
        return nn.Sequential(kind(4, 2, 2, downsample, norm_layer=norm), kind(2 * kind.expansion, 2, norm_layer=norm))

    eager = made(net())
    fused = fuse(eager, strict=True)
    count = 2 if kind is BasicBlock else 3
    assert chains(fused) == [f"{count} x conv-BN + projection, ReLU", f"{count} x conv-BN + input, ReLU"]
    assert isinstance(fused[0], kind)
    assert_equal(fused, eager)


def test_identity_and_sequential_between_are_seen_through() -> None:
    eager = made(nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Identity(), nn.BatchNorm2d(4)), nn.ReLU()))
    fused = fuse(eager)
    assert chains(fused) == ["conv-BN, ReLU"]
    assert_equal(fused, eager)


def test_layers_of_torchvision_ops_are_fused() -> None:
    eager = made(nn.Sequential(Conv2dNormActivation(4, 6), Conv2dNormActivation(6, 4, 1, activation_layer=None)))
    fused = fuse(eager, strict=True)
    assert chains(fused) == ["conv-BN, ReLU", "conv-BN"]
    assert_equal(fused, eager)


def test_fused_chain_calls_no_conv_or_batch_norm_of_aten() -> None:
    fused = fuse(made(Net()))
    names = ops_called(lambda: fused(input_()))
    assert "fusedres::conv_fprop" in names
    assert not any(name.startswith(("aten::convolution", "aten::native_batch_norm")) for name in names)


def test_models_of_our_own_are_left_as_they_are() -> None:
    model = fusedres.cifar_resnet20()
    fused = fuse(model, strict=True)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    assert explain(fused).share == 1.0


class NormAct(nn.Module):
    """A conv, and BN and ReLU in one module of timm's."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = timm.layers.BatchNormAct2d(4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


@pytest.mark.parametrize("kind", [fusedres.FusedBasicBlock, fusedres.FusedBottleneck])
def test_blocks_of_our_own_keep_their_projections(kind: Any) -> None:
    """The shortcut of a block of ours had been converted for itself, and was no part of the block's chain any more."""
    block = kind(
        4, 4, 2, nn.Sequential(nn.Conv2d(4, 4 * kind.expansion, 1, 2, bias=False), nn.BatchNorm2d(4 * kind.expansion))
    )
    net = made(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), block))
    fused = fuse(net)
    assert [row.kind for row in explain(fused)] == ["Sequential: conv-BN", kind.__name__]
    assert type(fused[2].downsample) is nn.Sequential
    assert_equal(fused, net)


def test_norm_with_its_activation_inside_is_fused() -> None:
    for options, expected in (({}, "conv-BN, ReLU"), ({"apply_act": False}, "conv-BN + input")):
        eager = made(NormAct(**options))
        fused = fuse(eager)
        assert chains(fused) == [expected]
        assert_equal(fused, eager)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda bn: bn.register_forward_hook(lambda *a: -a[2]), "a hook is attached"),
        (lambda bn: bn.drop.register_forward_hook(lambda *a: -a[2]), "a hook is attached"),
        (lambda bn: bn.act.register_forward_hook(lambda *a: -a[2]), "a hook is attached"),
        (lambda bn: setattr(bn, "act", nn.SiLU()), "SiLU is not exactly ReLU or Identity"),
        (lambda bn: setattr(bn, "drop", nn.Hardtanh(0, 0.1)), "Hardtanh is not exactly Identity"),
    ],
)
def test_change_inside_such_a_norm_is_seen(change: Callable[[Any], object], said: str) -> None:
    eager = made(NormAct()).eval()
    fused = fuse(eager)
    before = fused(input_())
    for net in (fused, eager):
        change(net.bn)
    torch.testing.assert_close(fused(input_()), eager(input_()), rtol=0, atol=1e-10)
    assert not torch.allclose(fused(input_()), before)
    assert said in reason(fused)


# --- what is left alone ---


def second_reader(at: str) -> Callable[[Any, Tensor], Any]:
    def body(m: Any, x: Tensor) -> Any:
        z = m.conv(x)
        y = m.bn(z)
        return m.relu(y) + {"conv": z, "bn": y}[at]

    return body


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "second reader of the conv": (lambda m, x: (lambda z: m.bn(z) * z)(m.conv(x)), "read 2 times"),
    "conv returned": (lambda m, x: m.conv(x), "returned as it is"),
    "conv activated": (lambda m, x: m.bn(F.relu(m.conv(x))), "relu follows it, not a BN"),
    "choice by value": (lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else x, "chooses by the value"),
    "iteration": (lambda m, x: m.bn(m.conv(torch.stack(list(x)))), "iterates"),
    "chance": (lambda m, x: m.bn(m.conv(x)) if random.random() < 2 else x, "reads the global 'random'"),
    "own tensor": (lambda m, x: m.bn(m.conv(x)) + torch.ones(1, dtype=torch.float64), "a tensor of its own"),
    "type": (lambda m, x: m.bn(m.conv(x)) if isinstance(x, Tensor) else x, "calls isinstance"),
    "grad mode": (lambda m, x: m.bn(m.conv(x)) if torch.is_grad_enabled() else m.bn(m.conv(x)) * 1, "is_grad_enabled"),
    "called twice": (lambda m, x: m.bn(m.conv(m.relu(m.bn(m.conv(x))))), "called more than once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_reason_and_right_all_the_same(case: str) -> None:
    body, expected = REFUSED[case]
    eager = made(Net(body))
    fused = fuse(eager)
    assert not chains(fused)
    assert expected in reason(fused)
    assert_equal(fused, eager)
    with pytest.raises(NotFusedError, match="1 convolutions stay unfused:\n  conv: "):
        fuse(eager, strict=True)


def test_garbage_collected_while_a_forward_is_traced_is_not_the_forwards() -> None:
    def collected(phase: str, info: dict[str, int]) -> None:
        random.random()

    gc.callbacks.append(collected)
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        fused = fuse(made(Net()))
        assert chains(fused) == ["conv-BN, ReLU"]
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collected)


def writing_between(m: Any, x: Tensor) -> Tensor:
    x = x.sin()
    z = m.conv(x)
    x.mul_(2)
    return m.bn(z) + x


def test_input_written_to_between_conv_and_norm_is_read_before() -> None:
    eager = made(Net(writing_between)).eval()
    fused = fuse(eager)
    assert "its input may be written to before bn reads its output" in reason(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(input_()), eager(input_()), rtol=0, atol=1e-10)


def test_second_reader_of_the_norm_keeps_it() -> None:
    eager = made(Net(lambda m, x: (lambda y: F.relu(y) + y)(m.bn(m.conv(x)))))
    fused = fuse(eager)
    assert chains(fused) == ["conv-BN"]
    assert_equal(fused, eager)


class Context(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv(x)
        return self.bn(x)


class Counting(Net):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Logging(Net):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append("call")
        return super().forward(x)


class Drawing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.draws = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.draws.random() < 2 else x


class Importing(Net):
    def forward(self, x: Tensor) -> Tensor:
        import time

        return super().forward(x) if time.time() > 0 else x


class Shared(Net):
    settings: ClassVar[list[float]] = [1.0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.settings[0]


class Checkpointing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Context, "enters a context"),
        (Counting, "sets 'calls'"),
        (Logging, "changes the module"),
        (Checkpointing, "checkpoints"),
        (Drawing, "calls a method of a Random"),
        (Importing, "imports time"),
        (Shared, "keeps 'settings' for all its instances"),
    ],
)
def test_side_effects_of_a_forward_are_kept(kind: Any, expected: str) -> None:
    eager = made(kind())
    fused = fuse(eager, inplace=False)
    assert expected in reason(fused)
    x = input_()
    assert_equal(fused, eager, x)
    assert getattr(eager, "calls", 0) == getattr(fused, "calls", 0)
    assert getattr(eager, "log", None) == getattr(fused, "log", None)
    y = fused(x)
    assert y.requires_grad


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "padding mode": (lambda m: setattr(m.conv, "padding_mode", "reflect"), "padding_mode 'reflect'"),
    "hook on the conv": (lambda m: m.conv.register_forward_hook(lambda *a: 2 * a[2]), "hook is attached to a Conv2d"),
    "hook on the norm": (lambda m: m.bn.register_forward_pre_hook(lambda _, a: 2 * a[0]), "a hook is attached"),
    "parametrization": (lambda m: parametrizations.weight_norm(m.conv), "not exactly Conv2d"),
    "group norm": (lambda m: setattr(m, "bn", nn.GroupNorm(2, 4).double()), "GroupNorm follows it, not a BN"),
    "a subclass": (lambda m: setattr(m, "bn", type("Mine", (nn.BatchNorm2d,), {})(4).double()), "Mine is not exactly"),
    "replaced forward": (lambda m: setattr(m.conv, "forward", lambda x: x), "the forward of a Conv2d was replaced"),
    "one statistic": (lambda m: setattr(m.bn, "running_var", None), "only one of its running statistics"),
}


def changed(net: nn.Module, change: str) -> nn.Module:
    CHANGES[change][0](net)
    return net


def outcome(net: nn.Module, x: Tensor) -> Tensor | str:
    try:
        return net(x).detach()
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_change_before_or_after_fuse_is_honoured(change: str, when: str) -> None:
    eager = made(Net()).eval()
    x = input_()
    if when == "before":
        fused = fuse(changed(eager, change))
    else:
        fused = fuse(eager)
        fused(x)
        changed(fused, change)
        torch.manual_seed(0)
        changed(eager, change)
        fused.load_state_dict(eager.state_dict())
    assert CHANGES[change][1] in reason(fused)
    for _ in range(2):
        ours, theirs = outcome(fused, x), outcome(eager, x)
        if isinstance(theirs, str):
            assert ours == theirs
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_hook_on_a_skipped_identity_is_called() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Identity(), nn.BatchNorm2d(4), nn.ReLU())
    fused = fuse(made(net)).eval()
    x = input_()
    before = fused(x)
    fused[1].register_forward_hook(lambda *a: a[2] + 1)
    assert not torch.allclose(fused(x), before)


def test_global_hook_sees_every_module() -> None:
    fused = fuse(made(Net()))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        fused(input_())
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "Net"]


# --- changes of the model after fuse ---


class Switch(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale: float | None = None
        self.steps = ["conv", "bn"]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.steps:
            x = getattr(self, name)(x)
        x = F.dropout(x, 1.0, self.training)
        x = x if self.scale is None else x * self.scale
        return x if FLAG else -x


def test_attribute_list_mode_and_global_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = made(Switch()).eval()
    fused = fuse(eager)
    assert chains(fused) == ["conv-BN"]

    def assert_follows(change: Callable[[Any], object]) -> None:
        before = fused(input_())
        for net in (fused, eager):
            change(net)
        torch.testing.assert_close(fused(input_()), eager(input_()), rtol=0, atol=1e-10)
        assert not torch.allclose(fused(input_()), before)

    assert_follows(lambda net: setattr(net, "scale", 3.0))
    assert_follows(lambda net: net.steps.append("relu"))
    monkeypatch.setattr(f"{__name__}.FLAG", False)
    torch.testing.assert_close(fused(input_()), eager(input_()), rtol=0, atol=1e-10)
    assert_follows(lambda net: net.train())


class WithConstant(Net):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(super().forward(x))

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_constants_and_methods_of_the_class_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = made(WithConstant()).eval()
    fused = fuse(eager)
    assert chains(fused) == ["conv-BN, ReLU"]
    before = fused(input_())
    monkeypatch.setattr(WithConstant, "scale", 3.0)
    torch.testing.assert_close(fused(input_()), 3 * before, rtol=0, atol=1e-10)
    monkeypatch.setattr(WithConstant, "scaled", lambda self, x: -x)
    torch.testing.assert_close(fused(input_()), -before, rtol=0, atol=1e-10)
    monkeypatch.setattr(Net, "forward", lambda self, x: x)
    assert torch.equal(fused(input_()), -input_())
    monkeypatch.setattr(WithConstant, "forward", lambda self, x: x)
    assert torch.equal(fused(input_()), input_())


def test_swapped_modules_are_used() -> None:
    eager = made(nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.ReLU())).eval()
    fused = fuse(eager)
    fused(input_())
    other = made(nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        other.weight.mul_(3)
    for net in (fused, eager):
        net[0][1] = copy.deepcopy(other)
        net[1] = nn.Sigmoid()
    torch.testing.assert_close(fused(input_()), eager(input_()), rtol=0, atol=1e-10)
    assert chains(fused) == ["conv-BN"]


def test_frozen_norm_in_a_training_network_stays_fused() -> None:
    eager = made(Net()).train()
    fused = fuse(eager)
    for net in (fused, eager):
        net.bn.eval()
        net.bn.requires_grad_(False)
    assert_steps_equal(step(fused, input_()), step(eager, input_()))
    assert chains(fused) == ["conv-BN, ReLU"]


# --- in-place side effects ---


def in_place_between(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    z = m.bn(m.conv(x))
    x.add_(1)
    return m.relu(z) + x


def writes_the_shortcut(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    y = m.bn(m.conv(x))
    x += y
    return m.relu(x) + x


def activates_the_shortcut_late(m: Any, x: Tensor) -> Tensor:
    x = x - 0.5
    y = m.bn(m.conv(x))
    y = y + m.relu(x)
    return F.relu(y)


def activates_it_by_position(m: Any, x: Tensor) -> Tensor:
    x = x - 0.5
    y = m.bn(m.conv(x))
    return F.relu(y + F.relu(x, True))


def view_of_a_norm(m: Any, x: Tensor) -> Tensor:
    a = m.bn2(m.conv2(x))
    y = m.bn(m.conv(a.transpose(2, 3).transpose(2, 3)))
    m.relu(a)
    return F.relu(y)


@pytest.mark.parametrize(
    "body",
    [in_place_between, writes_the_shortcut, activates_the_shortcut_late, activates_it_by_position, view_of_a_norm],
)
def test_in_place_writes_keep_their_order(body: Callable[[Any, Tensor], Tensor]) -> None:
    eager = made(TwoConvs(body))
    assert_equal_outputs(fuse(eager), eager)


def assert_equal_outputs(ours: nn.Module, theirs: nn.Module) -> None:
    for training in (True, False):
        with torch.no_grad():
            expected = theirs.train(training)(input_())
            torch.testing.assert_close(ours.train(training)(input_()), expected, rtol=0, atol=1e-10)


# --- what stays as it was ---


def test_given_model_is_not_changed() -> None:
    eager = made(Net())
    kinds = [type(module) for module in eager.modules()]
    state = copy.deepcopy(eager.state_dict())
    attributes = dict(vars(eager))
    fused = fuse(eager)
    fused(input_())
    assert [type(module) for module in eager.modules()] == kinds
    assert dict(vars(eager)) == attributes
    assert all(torch.equal(tensor, eager.state_dict()[name]) for name, tensor in state.items())
    assert not {id(p) for p in fused.parameters()} & {id(p) for p in eager.parameters()}


def test_inplace_keeps_modules_parameters_and_hooks() -> None:
    eager = made(Net())
    modules, parameters, seen = list(eager.modules()), list(eager.parameters()), []
    eager.register_forward_hook(lambda *_: seen.append(1))
    fused = fuse(eager, inplace=True)
    assert fused is eager
    assert all(a is b for a, b in zip(fused.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(fused.parameters(), parameters, strict=True))
    fused(input_())
    assert seen == [1]
    assert chains(fused) == ["conv-BN, ReLU"]


def test_strict_in_place_leaves_the_model_alone_where_it_raises() -> None:
    eager = nn.Sequential(Net(), nn.Conv2d(4, 4, 1))
    with pytest.raises(NotFusedError, match="1: its output is returned as it is"):
        fuse(eager, inplace=True, strict=True)
    assert type(eager[0]) is Net


def test_fusing_twice_is_fusing_once() -> None:
    once = fuse(made(Net()))
    twice = fuse(once)
    assert type(twice) is type(once)
    assert chains(twice) == chains(once)


def test_class_name_repr_and_isinstance_are_eagers() -> None:
    eager = Net()
    fused = fuse(eager)
    assert isinstance(fused, Net)
    assert repr(fused) == repr(eager)
    assert type(fused).__name__ == "Net"
    assert explain(fused)[0].kind == "Net: conv-BN, ReLU"


def test_state_loads_strictly_both_ways() -> None:
    eager = made(Net()).eval()
    fused = fuse(Net().double()).eval()
    fused(input_())
    assert fused.load_state_dict(eager.state_dict(), strict=True)
    torch.testing.assert_close(fused(input_()), eager(input_()), rtol=0, atol=1e-10)
    other = Net().double().eval()
    assert other.load_state_dict(fused.state_dict(), strict=True)
    assert torch.equal(other(input_()), eager(input_()))


def test_unfuse_gives_the_eager_class_back_with_the_state() -> None:
    fused = fuse(nn.Sequential(made(Net()), BasicBlock(4, 4).double())).train()
    fused(input_()).sum().backward()
    with torch.no_grad():
        fused[0].conv.weight.mul_(2)
    eager = unfuse(fused)
    assert [type(module) for module in eager] == [Net, BasicBlock]
    assert not chains(eager)
    assert "has not converted it" in explain(eager)[0].reason
    assert all(torch.equal(t, eager.state_dict()[name]) for name, t in fused.state_dict().items())
    assert chains(fused), "the fused model stays fused"
    assert unfuse(fused, inplace=True) is fused
    assert type(fused[0]) is Net


def test_no_module_is_a_type_error() -> None:
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
            function(3)


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_and_apart(copied: Callable[[nn.Module], nn.Module]) -> None:
    fused = fuse(made(Net())).eval()
    expected = fused(input_()).detach()
    twin = copied(fused)
    assert chains(twin) == ["conv-BN, ReLU"]
    torch.testing.assert_close(twin(input_()), expected, rtol=0, atol=0)
    with torch.no_grad():
        twin.conv.weight.mul_(2)
    assert torch.equal(fused(input_()), expected)
    assert not torch.allclose(twin(input_()), expected)


def test_model_is_freed_with_its_last_reference() -> None:
    fused = fuse(made(nn.Sequential(Net(), BasicBlock(4, 4)))).eval()
    with torch.no_grad():
        fused(input_().contiguous())
    gone = weakref.ref(fused), weakref.ref(fused[0]), weakref.ref(fused[1].conv1)
    del fused
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_shared_module_stays_shared() -> None:
    block = BasicBlock(4, 4)
    eager = made(nn.Sequential(block, block))
    fused = fuse(eager)
    assert fused[0] is fused[1]
    assert chains(fused) == ["2 x conv-BN + input, ReLU"]
    assert_equal(fused, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_memory_format_are_eagers(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    eager = made(nn.Sequential(Net(), Net())).to(dtype).eval()
    fused = fuse(eager)
    x = input_(dtype).contiguous(memory_format=memory_format)
    ours, theirs = fused(x), eager(x)
    assert ours.dtype == theirs.dtype
    assert ours.is_contiguous(memory_format=memory_format)
    assert theirs.is_contiguous(memory_format=memory_format)


def test_map_is_copied_once_for_all_chains_of_a_network() -> None:
    eager = shake(nn.Sequential(Net(), nn.MaxPool2d(2), BasicBlock(4, 4), nn.Sequential(BasicBlock(4, 4)))).eval()
    fused = fuse(eager)
    x = input_(torch.float32).contiguous()
    with torch.no_grad():
        fused(x)
        seen = []
        handle = fused[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
        fused(x)
        handle.remove()
        assert seen == [True], "a hook sees what it sees in eager"
        names = ops_called(lambda: fused(x))
    assert names["aten::clone"] == 2, "in and out"


def reshaping(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.bn(m.conv(x)))
    return m.relu(m.bn2(m.conv2(y.view(y.shape[0], 4, -1, 1))))


def activating_its_input(m: Any, x: Tensor) -> Tensor:
    return m.bn2(m.conv2(m.bn(m.conv(m.relu(x)))))


@pytest.mark.parametrize("body", [reshaping, activating_its_input])
def test_forward_that_cares_for_the_memory_format_gets_eagers(body: Callable[[Any, Tensor], Tensor]) -> None:
    eager = made(TwoConvs(body)).eval()
    fused = fuse(eager)
    ours, theirs = input_().contiguous(), input_().contiguous()
    with torch.no_grad():
        torch.testing.assert_close(fused(ours), eager(theirs), rtol=0, atol=1e-10)
    assert torch.equal(ours, theirs), "written into as by eager"


def test_dropout_draws_as_in_eager() -> None:
    eager = made(nn.Sequential(Net(), nn.Dropout(0.5), Net())).train()
    fused = fuse(eager)
    x, results = input_().contiguous(), []
    for net in (fused, eager):
        torch.manual_seed(3)
        results.append(net(x))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_autocast_gives_eagers_dtype() -> None:
    eager = shake(Net(FORMS["identity"][0]))
    fused = fuse(eager)
    x = input_(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == eager(x).dtype


def test_sum_of_two_dtypes_has_eagers_dtype() -> None:
    eager = shake(Net(lambda m, x: m.bn(m.conv(x)) + x.double()))
    fused = fuse(eager)
    assert fused(input_(torch.float32)).dtype == torch.float64


def test_shortcut_larger_than_the_branch_is_broadcast_as_by_eager() -> None:
    class Larger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 1, 1), nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + x

    eager = made(Larger())
    assert_equal(fuse(eager), eager)


class ManyResults(Net):
    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = super().forward(x)
        return {"y": y * scale, "all": (y, [x, None])}


def test_structure_of_results_and_arguments_with_defaults_are_kept() -> None:
    eager = made(ManyResults()).eval()
    fused = fuse(eager)
    assert chains(fused) == ["conv-BN, ReLU"]
    for arguments in ((), (2.0,)):
        ours, theirs = fused(input_(), *arguments), eager(input_(), *arguments)
        torch.testing.assert_close(ours["y"], theirs["y"], rtol=0, atol=1e-10)
        assert (type(ours["all"]), ours["all"][1][1]) == (tuple, None)
    torch.testing.assert_close(fused(x=input_(), scale=3.0)["y"], 3 * eager(input_())["y"], rtol=0, atol=1e-10)


def test_bad_input_is_refused_as_by_eager() -> None:
    eager = made(Net())
    fused = fuse(eager)
    for x in (input_()[:, :3], "x", input_(torch.float32)):
        with pytest.raises(Exception) as theirs:  # noqa: PT011  # whatever eager raises
            eager(x)
        with pytest.raises((theirs.type, ValueError)):
            fused(x)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(training: bool) -> None:
    eager = made(nn.Sequential(Net(), BasicBlock(4, 4))).train(training)
    fused = fuse(eager)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_()), eager(input_()), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "recorded",
    [
        torch.jit.script,
        lambda net: torch.jit.trace(net, input_()),
        lambda net: torch.export.export(net, (input_(),)).module(),
    ],
    ids=["script", "trace", "export"],
)
def test_recorders_see_the_modules(recorded: Callable[[nn.Module], Any]) -> None:
    eager = made(nn.Sequential(BasicBlock(4, 4), nn.MaxPool2d(2))).eval()
    fused = fuse(eager)
    with torch.no_grad():
        fused(input_())
        found = recorded(fused)
        torch.testing.assert_close(found(input_()), eager(input_()), rtol=0, atol=1e-10)
    assert "fusedres::" not in str(found.graph)


def test_transforms_of_functions_see_the_modules() -> None:
    eager = made(Net()).eval()
    fused = fuse(eager)
    x = torch.stack([input_(), 2 * input_()])
    torch.testing.assert_close(torch.func.vmap(fused)(x), torch.func.vmap(eager)(x), rtol=0, atol=1e-10)
    ours, theirs = (torch.func.jvp(net, (input_(),), (input_().cos(),)) for net in (fused, eager))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input_(), input_())
        torch.testing.assert_close(*(torch.autograd.forward_ad.unpack_dual(net(dual)) for net in (fused, eager)))


def test_parameters_given_from_outside_are_used() -> None:
    eager = made(Net()).eval()
    fused = fuse(eager)
    given = {name: 2 * p.detach() for name, p in eager.named_parameters()}
    ours, theirs = (torch.func.functional_call(net, given, input_()) for net in (fused, eager))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert not torch.allclose(ours, fused(input_()))


def test_class_derived_from_a_fused_one_runs_fused_and_is_not_unfused_unseen() -> None:
    eager = made(Net()).eval()
    fused = fuse(eager)
    fused.__class__ = type("Wrapped", (type(fused),), {})
    torch.testing.assert_close(fused(input_()), eager(input_()), rtol=0, atol=1e-10)
    assert "fusedres::conv_fprop" in ops_called(lambda: fused(input_()))
    with pytest.raises(RuntimeError, match="Wrapped was derived"):
        unfuse(fused)


def test_forward_of_a_class_derived_from_a_fused_one_may_care_for_the_memory_format() -> None:
    """What is known of the fused class's forward had been taken for known of the derived one's."""
    eager = made(nn.Sequential(Net(), Net())).eval()
    fused = fuse(eager)
    known = type(fused[1])
    flat = {"forward": lambda self, x: known.forward(self, x.view(x.shape[0], -1).view(x.shape))}
    fused[1].__class__ = type("Flat", (known,), flat)
    with torch.no_grad():
        torch.testing.assert_close(fused(input_().contiguous()), eager(input_()), rtol=0, atol=1e-10)


class Registry(nn.Module):
    known: ClassVar[list[type]] = []

    def __init_subclass__(cls) -> None:
        cls.known.append(cls)


class Registered(Registry, Net):
    pass


def test_class_that_registers_its_subclasses_is_left_alone() -> None:
    fused = fuse(made(Registered()))
    assert Registry.known == [Registered]
    assert "wants to know of its subclasses" in reason(fused)


def test_other_threads_run_undisturbed_while_a_model_is_fused() -> None:
    other = fuse(made(Net())).eval()
    expected = other(input_()).detach()
    wrong, done = [], threading.Event()

    def serve() -> None:
        while not done.is_set():
            y = other(input_())
            if not (isinstance(y, Tensor) and torch.equal(y, expected)):
                wrong.append(y)

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(10):
        fuse(Net())
    done.set()
    thread.join()
    assert not wrong


def test_frozen_and_on_meta_it_runs_as_eager() -> None:
    eager = made(nn.Sequential(Net(), BasicBlock(4, 4))).eval()
    fused = fusedres.freeze(fuse(eager))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(input_()), eager(input_()), rtol=0, atol=1e-10)
    y = fuse(eager.to("meta"))(input_().to("meta"))
    assert (y.shape, y.device.type) == (input_().shape, "meta")


def test_wrapped_for_many_processes_it_trains_as_eager(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        eager = made(Net())
        fused = nn.parallel.DistributedDataParallel(fuse(eager))
        for net in (fused, eager):
            net(input_()).square().sum().backward()
        for ours, theirs in zip(fused.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    finally:
        torch.distributed.destroy_process_group()


# --- explain ---


def test_share_is_that_of_the_fused_convs() -> None:
    explanation = explain(fuse(nn.Sequential(Net(), nn.Conv2d(4, 4, 1))))
    assert (explanation.fused, explanation.convs, explanation.share) == (1, 2, 0.5)
    assert str(explanation).endswith("1 of 2 convolutions are fused")


def test_chains_of_one_module_are_named_by_their_convs() -> None:
    fused = fuse(
        made(
            nn.Sequential(
                nn.Sequential(
                    nn.Conv2d(4, 4, 1),
                    nn.BatchNorm2d(4),
                    nn.ReLU(),
                    nn.MaxPool2d(1),
                    nn.Conv2d(4, 4, 1),
                    nn.BatchNorm2d(4),
                    nn.MaxPool2d(1),
                )
            )
        )
    )
    assert [row.name for row in explain(fused)] == ["0.0", "0.4"]

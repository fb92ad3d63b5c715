"""What may be fused, and what runs module by module because a fused call would skip something the user attached."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from oracles import assert_steps_equal, batch, block_twins, is_fused
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as hooked_weight_norm

from fusedres import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU
from fusedres.inspection import batch_norm_reason, conv_reason, hook_reason, plain_reason, pool_reason

pytestmark = pytest.mark.usefixtures("one_thread")

double = torch.float64
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class ActivatedBN(nn.BatchNorm2d):
    """A subclass that does more than BN."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(min=0)  # what follows works in place, which a ReLU's backward forbids


class ScaledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class CappedReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=1)


def replace_forward(module: nn.Module) -> None:
    original = type(module).forward
    module.forward = lambda x: 2 * original(module, x)


def swap(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], object]:
    """Replace the child ``name`` by a module of another kind with the same state."""

    def change(block: nn.Module) -> None:
        old = block.get_submodule(name)
        new = make(old)
        new.load_state_dict(old.state_dict(), strict=False)
        parent, _, child = name.rpartition(".")
        block.get_submodule(parent).__setattr__(child, new)

    return change


def like(conv: nn.Conv2d, kind: type[nn.Conv2d] = nn.Conv2d, **kwargs: object) -> nn.Conv2d:
    geometry = {"stride": conv.stride, "padding": conv.padding, "bias": False, **kwargs}
    return kind(conv.in_channels, conv.out_channels, conv.kernel_size, **geometry)


#: What a user may do to a block of 8 channels -> what ``reason()`` says, None where the block stays fused.
CHANGES: dict[str, tuple[Callable[[nn.Module], object], str | None]] = {
    "forward hook": (lambda b: b.conv1.register_forward_hook(lambda m, a, y: 2 * y), "hook"),
    "forward hook with kwargs": (
        lambda b: b.bn1.register_forward_hook(lambda m, a, k, y: 2 * y, with_kwargs=True),
        "hook",
    ),
    "forward pre-hook": (lambda b: b.bn2.register_forward_pre_hook(lambda m, a: (2 * a[0],)), "hook"),
    "backward hook": (lambda b: b.conv2.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],)), "hook"),
    "backward pre-hook": (lambda b: b.conv2.register_full_backward_pre_hook(lambda m, go: (2 * go[0],)), "hook"),
    "hook on the activation": (lambda b: b.relu.register_forward_hook(lambda m, a, y: 0.5 * y), "hook"),
    "replaced forward": (lambda b: replace_forward(b.conv2), "forward of a Conv2d was replaced"),
    "BN subclass": (swap("bn2", lambda bn: ActivatedBN(bn.num_features)), "ActivatedBN"),
    "conv subclass": (swap("conv1", lambda c: like(c, ScaledConv)), "ScaledConv"),
    "activation subclass": (swap("relu", lambda r: CappedReLU()), "CappedReLU"),
    "another activation": (swap("relu", lambda r: nn.GELU()), "GELU"),
    "GroupNorm": (swap("bn1", lambda bn: nn.GroupNorm(2, bn.num_features)), "GroupNorm"),
    "Identity": (swap("bn1", lambda bn: nn.Identity()), "Identity"),
    "instance norm": (swap("bn2", lambda bn: nn.InstanceNorm2d(bn.num_features, affine=True)), "InstanceNorm2d"),
    "reflecting padding": (swap("conv2", lambda c: like(c, padding_mode="reflect")), "padding_mode 'reflect'"),
    "weight_norm": (lambda b: hooked_weight_norm(b.conv1), "hook"),
    "parametrization": (lambda b: parametrizations.weight_norm(b.conv1), "ParametrizedConv2d"),
    "spectral norm": (lambda b: parametrizations.spectral_norm(b.conv2), "ParametrizedConv2d"),
    "pruning": (lambda b: prune.l1_unstructured(b.conv1, "weight", 0.5), "hook"),
    "same padding": (swap("conv2", lambda c: like(c, padding="same")), None),
    "hook on a parameter": (lambda b: b.conv1.weight.register_hook(lambda g: 2 * g), None),
    "hook on the block": (lambda b: b.register_forward_hook(lambda m, a, y: 2 * y), None),
    "backward hook on the block": (lambda b: b.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],)), None),
}


@modes
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [FusedBasicBlock, FusedBottleneck])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_whatever_is_attached_acts_as_in_eager(kind: type[nn.Module], change: str, training: bool, engine: str) -> None:
    fused, eager = (m.double().train(training) for m in block_twins(kind, 8, 8 // kind.expansion))
    apply, said = CHANGES[change]
    for module in (fused, eager):
        torch.manual_seed(1)
        apply(module)
        module.double().train(training)
    reason = fused.reason()
    assert (reason is None) == (said is None)
    assert said is None or said in reason
    x = batch(2, 8, 5, 4, dtype=double)
    assert is_fused(lambda: fused(x)) == (said is None)
    eager(x)
    ours, theirs = (run(m, x) for m in (fused, eager))
    assert_steps_equal(ours, theirs)


def run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A step without copying the module, whose hooks may hold on to the original."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    gradients = {f"{n}.grad": p.grad for n, p in module.named_parameters()}
    return {"y": y.detach(), "x.grad": x.grad, **gradients, **dict(module.named_buffers())}


@modes
@pytest.mark.parametrize("change", ["forward hook", "backward hook", "BN subclass"])
def test_changed_downsample_runs_by_itself_beside_a_fused_branch(change: str, training: bool, engine: str) -> None:
    fused, eager = (m.double().train(training) for m in block_twins(FusedBottleneck, 8, 4, 2))
    for module in (fused, eager):
        if change == "forward hook":
            module.downsample[1].register_forward_hook(lambda m, a, y: 2 * y)
        elif change == "backward hook":
            module.downsample[0].register_full_backward_hook(lambda m, gi, go: (2 * gi[0],))
        else:
            swap("downsample.1", lambda bn: ActivatedBN(bn.num_features))(module)
            module.double().train(training)
    assert fused.reason() is None
    assert fused.projection is None
    x = batch(2, 8, 6, 5, dtype=double)
    assert_steps_equal(run(fused, x), run(eager, x))


@pytest.mark.parametrize("where", ["block", "submodule", "downsample"])
def test_hooks_fire_once_per_call(where: str, engine: str) -> None:
    block, _ = block_twins(FusedBottleneck, 8, 4, 2)
    target = {"block": block, "submodule": block.conv2, "downsample": block.downsample}[where]
    calls = []
    target.register_forward_pre_hook(lambda *_: calls.append("pre"))
    target.register_forward_hook(lambda *_: calls.append("forward"))
    target.register_full_backward_hook(lambda *_: calls.append("backward"))
    block(batch(2, 8, 6, 5).requires_grad_()).sum().backward()
    assert calls == ["pre", "forward", "backward"]


def test_block_fuses_again_after_its_hooks_are_gone(engine: str) -> None:
    block = FusedBasicBlock(8, 8)
    handle = block.bn1.register_forward_hook(lambda *_: None)
    assert block.reason() is not None
    handle.remove()
    assert block.reason() is None
    assert is_fused(lambda: block(batch(2, 8, 5, 4)))


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_global_hooks_see_every_submodule(register: str, engine: str) -> None:
    block, seen = FusedBasicBlock(8, 8), []
    block.relu = nn.ReLU()  # autograd refuses a ReLU in place on what a backward hook has wrapped
    handle = getattr(nn.modules.module, f"register_module_{register}")(lambda m, *_: seen.append(m))
    try:
        assert "global" in block.reason()
        block(batch(2, 8, 5, 4).requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert {type(m) for m in seen} == {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, FusedBasicBlock}
    assert block.reason() is None


def test_sync_batch_norm_is_found_converted_and_honoured(engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(FusedBottleneck, 8, 4, 2))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(fused))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == 4
    x = batch(2, 8, 6, 5)
    torch.testing.assert_close(converted(x), eager(x), rtol=1e-5, atol=1e-5)


def test_lazy_modules_are_initialised_by_their_first_call(engine: str) -> None:
    block = FusedBasicBlock(8, 8)
    block.conv1 = nn.LazyConv2d(8, 3, padding=1, bias=False)
    x = batch(2, 8, 5, 4)
    assert block(x).shape == x.shape
    assert block.reason() is None


@pytest.mark.parametrize("norm_layer", [lambda c: nn.GroupNorm(2, c), lambda c: nn.Identity()], ids=["group", "none"])
@modes
def test_layer_with_another_norm_equals_its_modules(
    norm_layer: Callable[[int], nn.Module], training: bool, engine: str
) -> None:
    layer = FusedConvBNReLU(8, 8, norm_layer=norm_layer).double().train(training)
    assert layer.reason() is not None
    x = batch(2, 8, 5, 4, dtype=double)
    assert not is_fused(lambda: layer(x))
    torch.testing.assert_close(layer(x), layer.relu(layer.bn(layer.conv(x))), rtol=0, atol=0)


def test_reasons_name_what_is_in_the_way() -> None:
    assert conv_reason(nn.Conv2d(4, 4, 3, padding_mode="circular")) == "padding_mode 'circular'"
    assert "uneven" in conv_reason(nn.Conv2d(4, 4, 2, padding="same"))
    assert conv_reason(nn.Conv2d(4, 4, 3, padding="same")) is None
    assert conv_reason(nn.Conv2d(4, 4, 3, padding="valid")) is None
    assert "ConvTranspose2d is not exactly Conv2d" in conv_reason(nn.ConvTranspose2d(4, 4, 3))
    half = nn.BatchNorm2d(4)
    half.running_var = None
    assert "only one of its running statistics" in batch_norm_reason(half)
    assert batch_norm_reason(nn.BatchNorm2d(4, affine=False, track_running_stats=False)) is None
    assert plain_reason(nn.ReLU(), nn.ReLU, nn.Identity) is None
    assert "ReLU6 is not exactly ReLU or Identity" in plain_reason(nn.ReLU6(), nn.ReLU, nn.Identity)
    assert hook_reason(nn.ReLU()) is None


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        (nn.MaxPool2d(3, 2, 1), None),
        (nn.MaxPool2d((2, 2)), None),
        (nn.MaxPool2d((3, 2)), "not square"),
        (nn.MaxPool2d(3, (2, 1)), "not square"),
        (nn.MaxPool2d(3, dilation=2), "dilation"),
        (nn.MaxPool2d(3, ceil_mode=True), "ceil_mode"),
        (nn.MaxPool2d(3, return_indices=True), "return_indices"),
        (nn.MaxPool2d(17), "more than 16"),
        (nn.AvgPool2d(2), "AvgPool2d"),
        (nn.Identity(), "Identity"),
    ],
    ids=str,
)
def test_pools_that_the_stem_takes(pool: nn.Module, said: str | None) -> None:
    reason = pool_reason(pool)
    assert (reason is None) == (said is None)
    assert said is None or said in reason

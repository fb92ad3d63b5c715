"""The blocks against torchvision's: names, numbers, dtypes and memory formats."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from oracles import (
    EAGER_BLOCKS,
    ENGINES,
    assert_accurate,
    assert_steps_equal,
    batch,
    block_twins,
    is_fused,
    output_results,
    step,
    step_results,
)
from torch import Tensor, nn

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = (FusedBasicBlock, FusedBottleneck)
double = torch.float64
kinds = pytest.mark.parametrize("kind", KINDS)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

#: Every block of ResNet-18 and ResNet-50: kind, inplanes, planes, stride, size of its map here.
GEOMETRIES = [
    *[(FusedBasicBlock, 64, 64, 1, 7), (FusedBasicBlock, 64, 128, 2, 7), (FusedBasicBlock, 128, 128, 1, 6)],
    *[(FusedBasicBlock, 128, 256, 2, 6), (FusedBasicBlock, 256, 256, 1, 4), (FusedBasicBlock, 256, 512, 2, 5)],
    *[(FusedBasicBlock, 512, 512, 1, 3), (FusedBottleneck, 64, 64, 1, 9), (FusedBottleneck, 256, 64, 1, 7)],
    *[(FusedBottleneck, 256, 128, 2, 7), (FusedBottleneck, 512, 128, 1, 6), (FusedBottleneck, 512, 256, 2, 6)],
    *[(FusedBottleneck, 1024, 256, 1, 5), (FusedBottleneck, 1024, 512, 2, 5), (FusedBottleneck, 2048, 512, 1, 3)],
]

#: Small blocks with everything that torchvision's constructors offer.
VARIANTS: dict[str, tuple[type[nn.Module], int, int, dict[str, Any]]] = {
    "basic": (FusedBasicBlock, 8, 8, {}),
    "basic-stride": (FusedBasicBlock, 6, 10, {"stride": 2}),
    "bottleneck": (FusedBottleneck, 16, 4, {}),
    "bottleneck-stride": (FusedBottleneck, 8, 4, {"stride": 2}),
    "bottleneck-dilated": (FusedBottleneck, 16, 4, {"dilation": 2}),
    "resnext": (FusedBottleneck, 16, 4, {"groups": 4, "base_width": 32}),
    "depthwise": (FusedBottleneck, 16, 4, {"groups": 4, "base_width": 16}),
    "wide-stride": (FusedBottleneck, 8, 4, {"stride": 2, "base_width": 128}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
half_variants = pytest.mark.parametrize("variant", ["basic-stride", "bottleneck", "resnext", "wide-stride"])


def variant_twins(variant: str, **more: Any) -> tuple[nn.Module, nn.Module]:
    kind, inplanes, planes, kwargs = VARIANTS[variant]
    return block_twins(kind, inplanes, planes, **kwargs, **more)


def variant_batch(variant: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return batch(3, VARIANTS[variant][1], 7, 6, dtype=dtype)


def half_batches(channels: int, dtype: torch.dtype, stored: torch.dtype) -> list[Tensor]:
    """Inputs for a median: small enough to turn a sign in few of them, or large enough to turn many in each."""
    size = (2, channels, 4, 4) if stored == torch.float16 else (16, channels, 14, 13)
    return [batch(*size, dtype=dtype, seed=i) for i in range(9)]


@kinds
def test_constructor_is_torchvisions(kind: type[nn.Module]) -> None:
    theirs = inspect.signature(EAGER_BLOCKS[kind].__init__).parameters
    ours = inspect.signature(kind.__init__).parameters
    assert [(n, p.default) for n, p in ours.items() if n != "memory"] == [(n, p.default) for n, p in theirs.items()]
    assert kind.expansion == EAGER_BLOCKS[kind].expansion


@variants
def test_modules_and_state_dict_are_torchvisions(variant: str) -> None:
    fused, eager = variant_twins(variant)
    assert {n: repr(m) for n, m in fused.named_children()} == {n: repr(m) for n, m in eager.named_children()}
    ours, theirs = fused.state_dict(), eager.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[k].shape == theirs[k].shape and ours[k].dtype == theirs[k].dtype for k in theirs)
    eager.load_state_dict(ours, strict=True)
    assert fused.stride == eager.stride


def test_constructors_refuse_what_torchvisions_refuse() -> None:
    for kwargs in ({"groups": 2}, {"base_width": 128}):
        with pytest.raises(ValueError, match="groups=1 and base_width=64"):
            FusedBasicBlock(8, 8, **kwargs)
    with pytest.raises(NotImplementedError, match="Dilation > 1"):
        FusedBasicBlock(8, 8, dilation=2)
    with pytest.raises(ValueError, match="'recompute', not 'less'"):
        FusedBottleneck(8, 2, memory="less")


@modes
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g[0].__name__}-{g[1]}-{g[2]}-{g[3]}")
def test_error_is_at_most_twice_eagers(geometry: tuple[Any, ...], training: bool) -> None:
    kind, inplanes, planes, stride, size = geometry
    fused, eager = (m.train(training) for m in block_twins(kind, inplanes, planes, stride))
    x = batch(4 if size < 5 else 2, inplanes, size, size)
    theirs, exact = step(eager, x), step(copy.deepcopy(eager).double(), x.double(), x.dtype)
    for name in ENGINES:
        with fusedres.engine(name):
            assert_accurate((step(fused, x), theirs, exact))
            if not training:
                assert_accurate(output_results(fused, eager, x))


@modes
@variants
@pytest.mark.parametrize("memory", ["standard", "recompute"])
def test_float64_agrees_to_ten_digits(variant: str, training: bool, memory: str, engine: str) -> None:
    fused, eager = (m.double().train(training) for m in variant_twins(variant, memory=memory))
    x = variant_batch(variant, double)
    assert is_fused(lambda: copy.deepcopy(fused)(x))
    assert_steps_equal(step(fused, x), step(eager, x))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-10, atol=1e-10)


@modes
@half_variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_error_is_at_most_twice_eagers(variant: str, training: bool, dtype: torch.dtype, engine: str) -> None:
    fused, eager = (m.to(dtype).train(training) for m in variant_twins(variant))
    batches = half_batches(VARIANTS[variant][1], dtype, dtype)
    assert_accurate(*(step_results(fused, eager, x) for x in batches), stored=dtype)
    if not training:
        assert_accurate(*(output_results(fused, eager, x) for x in batches))
    assert [t.dtype for t in fused.state_dict().values()] == [t.dtype for t in eager.state_dict().values()]


@modes
@kinds
def test_half_convs_with_float32_batch_norms(kind: type[nn.Module], training: bool, engine: str) -> None:
    fused, eager = block_twins(kind, 8, 8 // kind.expansion)
    for module in (fused.train(training), eager.train(training)):
        for m in module.modules():
            if isinstance(m, nn.Conv2d):
                m.bfloat16()
    batches = half_batches(8, torch.bfloat16, torch.bfloat16)
    assert_accurate(*(step_results(fused, eager, x) for x in batches), stored=torch.bfloat16)


@modes
@half_variants
def test_autocast_error_is_at_most_twice_eagers(variant: str, training: bool, engine: str) -> None:
    fused, eager = (m.train(training) for m in variant_twins(variant))
    with torch.autocast("cpu", torch.bfloat16):
        batches = half_batches(VARIANTS[variant][1], torch.float32, torch.bfloat16)
        draws = [step_results(fused, eager, x) for x in batches]
        with torch.no_grad():
            assert fused(batches[0]).dtype == torch.bfloat16
    ours = draws[0][0]
    assert ours["y"].dtype == torch.bfloat16
    assert {t.dtype for n, t in ours.items() if n.endswith((".grad", "running_mean", "running_var"))} == {torch.float32}
    assert_accurate(*draws, stored=torch.bfloat16)


@kinds
def test_hooked_block_under_autocast_has_eagers_dtype(kind: type[nn.Module], engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(kind, 8, 8 // kind.expansion))
    for module in (fused, eager):
        module.conv1.register_forward_hook(lambda *call: None)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (module(batch(2, 8, 5, 4)) for module in (fused, eager))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_autocast_leaves_float64_alone(engine: str) -> None:
    fused, eager = (m.double() for m in block_twins(FusedBottleneck, 8, 2))
    x = batch(2, 8, 5, 4, dtype=double)
    with torch.autocast("cpu", torch.bfloat16):
        assert_steps_equal(step(fused, x), step(eager, x))


@kinds
@modes
@pytest.mark.parametrize("frozen", ["bn1", "bn2", "all convs", "downsample"])
def test_partly_frozen_block_equals_eager(kind: type[nn.Module], training: bool, frozen: str, engine: str) -> None:
    fused, eager = (m.double().train(training) for m in block_twins(kind, 6, 8, 2))
    for module in (fused, eager):
        for name, p in module.named_parameters():
            p.requires_grad_(not (name.startswith(frozen) or (frozen == "all convs" and "conv" in name)))
    assert_steps_equal(step(fused, batch(2, 6, 7, 5, dtype=double)), step(eager, batch(2, 6, 7, 5, dtype=double)))


@kinds
def test_no_grad_in_train_mode_moves_statistics_as_eager_does(kind: type[nn.Module], engine: str) -> None:
    fused, eager = (m.double() for m in block_twins(kind, 6, 8, 2))
    x = batch(2, 6, 7, 5, dtype=double)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(fused(x), eager(x), rtol=1e-10, atol=1e-10)
    assert_steps_equal(dict(fused.named_buffers()), dict(eager.named_buffers()))
    assert fused.bn2.num_batches_tracked == 2


@kinds
def test_inference_mode_in_eval_equals_eager(kind: type[nn.Module], engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(kind, 8, 8 // kind.expansion))
    x = batch(2, 8, 7, 5)
    with torch.inference_mode():
        born_there = copy.deepcopy(fused)
        for _ in range(2):
            y = fused(x)
            assert y.is_inference()
            torch.testing.assert_close(y, eager(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(born_there(x), eager(x), rtol=1e-5, atol=1e-5)
        born_there.bn1.weight.mul_(2)
        eager.bn1.weight.mul_(2)
        torch.testing.assert_close(born_there(x), eager(x), rtol=1e-5, atol=1e-5)


@kinds
@modes
@pytest.mark.parametrize("shape", [(2, 16, 5, 5), (1, 16, 5, 4), (2, 16, 1, 1), (2, 16, 1, 5)], ids=str)
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last, "sliced"], ids=str)
@pytest.mark.parametrize("dy_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_memory_format_gives_eagers_numbers_and_format(
    kind: type[nn.Module], training: bool, shape: tuple[int, ...], x_format: Any, dy_format: Any, engine: str
) -> None:
    fused, eager = (m.double().train(training) for m in block_twins(kind, 16, 16 // kind.expansion))
    if x_format == "sliced":
        x = torch.randn(shape[0], 2 * shape[1], *shape[2:], dtype=double)[:, ::2]
    else:
        x = torch.randn(shape, dtype=double).contiguous(memory_format=x_format)
    dy = torch.randn(shape, dtype=double).contiguous(memory_format=dy_format)
    results = []
    for module in (fused, eager):
        x = x.detach().requires_grad_()
        y = module(x)
        y.backward(dy)
        results.append({"y": y.detach(), "dx": x.grad, **{n: p.grad for n, p in module.named_parameters()}})
    assert_steps_equal(*results)
    if x_format is torch.channels_last:
        assert results[0]["y"].is_contiguous(memory_format=torch.channels_last)
        assert results[0]["dx"].is_contiguous(memory_format=torch.channels_last)


class PooledShortcut(nn.Sequential):
    """The shortcut of ResNet-D: it pools, then projects."""

    def __init__(self) -> None:
        super().__init__(nn.AvgPool2d(2, 2), nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))


@modes
@pytest.mark.parametrize(
    "downsample",
    [
        PooledShortcut(),
        nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)),
        nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.GroupNorm(2, 16)),
        nn.Sequential(nn.Conv2d(8, 16, 1, 2, groups=2), nn.BatchNorm2d(16)),
        nn.Conv2d(8, 16, 1, 2),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)),
    ],
    ids=["pooled", "3x3", "group-norm", "groups", "bare-conv", "broadcasting"],
)
def test_any_downsample_module_equals_eager(downsample: nn.Module, training: bool, engine: str) -> None:
    for kind, planes in ((FusedBasicBlock, 16), (FusedBottleneck, 4)):
        twins = block_twins(kind, 8, planes, 2, downsample=copy.deepcopy(downsample))
        fused, eager = (m.double().train(training) for m in twins)
        x = batch(3, 8, 6, 8, dtype=double)
        assert_steps_equal(step(fused, x), step(eager, x))
        with torch.no_grad():
            torch.testing.assert_close(fused(x), eager(x), rtol=1e-10, atol=1e-10)


@modes
def test_identity_shortcut_of_one_channel_broadcasts_as_in_eager(training: bool, engine: str) -> None:
    for kind in KINDS:
        fused = kind(1, 2).double().train(training)
        eager = EAGER_BLOCKS[kind](1, 2).double().train(training)
        eager.load_state_dict(fused.state_dict())
        assert_steps_equal(step(fused, batch(3, 1, 6, 5, dtype=double)), step(eager, batch(3, 1, 6, 5, dtype=double)))


@pytest.mark.parametrize("shared", ["conv", "bn", "both"])
@modes
def test_modules_used_twice_in_a_block_equal_eager(shared: str, training: bool, engine: str) -> None:
    fused, eager = (m.double().train(training) for m in block_twins(FusedBasicBlock, 8, 8))
    for module in (fused, eager):
        if shared != "bn":
            module.conv2 = module.conv1
        if shared != "conv":
            module.bn2 = module.bn1
    x = batch(2, 8, 5, 4, dtype=double)
    assert_steps_equal(step(fused, x), step(eager, x))


def test_conv_shared_with_another_branch_is_left_as_it_was(engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(FusedBasicBlock, 8, 8))
    x, weight = batch(2, 8, 5, 4), fused.conv1.weight.detach().clone()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(x), eager(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(fused.conv1(x), eager.conv1(x), rtol=0, atol=0)
    assert torch.equal(fused.conv1.weight, weight)


def test_submodules_stay_usable_alone(engine: str) -> None:
    fused, eager = block_twins(FusedBottleneck, 8, 2)
    x = batch(2, 8, 5, 4)
    fused(x), eager(x)
    ours, theirs = (m.relu(m.bn1(m.conv1(x))) for m in (fused, eager))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

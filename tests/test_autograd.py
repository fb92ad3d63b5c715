"""The calculus: gradients by finite differences, what is kept for backward, and autograd's contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import assert_steps_equal, batch, block_twins, ops_called, saved_maps, shake, step
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from fusedres import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU, measure
from fusedres.engines.cpu import CPU
from fusedres.engines.reference import REFERENCE
from fusedres.functional import ConvBN, unit_spec
from fusedres.problem import ConvProblem
from fusedres.specs import UnitSpec, is_closed

pytestmark = pytest.mark.usefixtures("one_thread")

MEMORIES = ("standard", "recompute")
double = torch.float64

#: name -> (module, input shape, how many of its units are closed in training)
CHAINS: dict[str, tuple[Callable[[str], nn.Module], tuple[int, ...], int]] = {
    "basic": (lambda m: FusedBasicBlock(3, 3, memory=m), (2, 3, 3, 4), 0),
    "basic-stride": (lambda m: block_twins(FusedBasicBlock, 2, 3, 2, memory=m)[0], (2, 2, 5, 4), 0),
    "basic-closed-projection": (lambda m: block_twins(FusedBasicBlock, 1, 2, 2, memory=m)[0], (2, 1, 5, 4), 1),
    "bottleneck-closed": (lambda m: FusedBottleneck(4, 1, memory=m), (2, 4, 3, 3), 1),
    "bottleneck-few-pixels": (lambda m: FusedBottleneck(8, 2, memory=m), (2, 8, 1, 2), 0),
    "bottleneck-closed-stride": (lambda m: block_twins(FusedBottleneck, 2, 1, 2, memory=m)[0], (2, 2, 4, 3), 2),
    "bottleneck-stored-projection": (lambda m: block_twins(FusedBottleneck, 3, 1, memory=m)[0], (2, 3, 2, 3), 1),
    "bottleneck-groups": (lambda m: FusedBottleneck(8, 2, groups=2, base_width=32, memory=m), (2, 8, 3, 2), 1),
    "bottleneck-dilated": (lambda m: FusedBottleneck(4, 1, dilation=2, memory=m), (2, 4, 3, 4), 1),
    "layer": (lambda m: FusedConvBNReLU(2, 3, stride=2, dilation=(2, 1), bias=True, memory=m), (2, 2, 5, 4), 0),
    "layer-closed": (lambda m: FusedConvBNReLU(1, 3, 1, memory=m), (2, 1, 3, 3), 1),
    "layer-closed-stride": (lambda m: FusedConvBNReLU(1, 2, 1, stride=2, relu=False, memory=m), (3, 1, 3, 4), 1),
    "layer-depthwise": (lambda m: FusedConvBNReLU(3, 3, groups=3, memory=m), (2, 3, 3, 3), 0),
}


def closed_units(fn: Callable[[], object]) -> int:
    return ops_called(fn)["fusedres::input_moments"]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CHAINS)
def test_gradients_match_finite_differences(name: str, training: bool, memory: str, engine: str) -> None:
    build, shape, closed = CHAINS[name]
    module = shake(build(memory).double()).train(training)
    x = batch(*shape, dtype=double).requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)
    assert closed_units(lambda: module(x)) == (closed if training else 0)

    def fn(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(fn, (x, *(p.detach().requires_grad_() for p in parameters)), fast_mode=True)


@pytest.mark.parametrize("kind", [FusedBasicBlock, FusedBottleneck])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck_passes_entry_by_entry(kind: type[nn.Module], training: bool, engine: str) -> None:
    module = shake(kind(4, 4 // kind.expansion).double()).train(training)
    assert gradcheck(module, batch(2, 4, 2, 2, dtype=double).requires_grad_())


def test_is_closed_wants_a_widening_pointwise_conv_with_batch_statistics_and_many_pixels() -> None:
    def unit(training: bool = True, **conv: int) -> UnitSpec:
        return unit_spec(ConvBN(nn.Conv2d(4, 8, 1, **conv), nn.BatchNorm2d(8).train(training)))

    def closed(spec: UnitSpec, x: tuple[int, ...], w: tuple[int, ...]) -> bool:
        return is_closed(spec, ConvProblem.of(torch.Size(x), torch.Size(w), *spec.conv), 4, flops_per_byte=10)

    assert closed(unit(), (1, 4, 4, 4), (8, 4, 1, 1))
    assert not closed(unit(), (1, 4, 4, 3), (8, 4, 1, 1))
    assert not closed(unit(), (1, 4, 4, 4), (7, 4, 1, 1))
    assert not closed(unit(), (1, 4, 9, 9), (8, 4, 3, 3))
    assert not closed(unit(padding=1), (1, 4, 9, 9), (8, 4, 1, 1))
    assert not closed(unit(groups=2), (1, 4, 9, 9), (8, 2, 1, 1))
    assert not closed(unit(training=False), (1, 4, 9, 9), (8, 4, 1, 1))


@pytest.mark.parametrize(
    ("width", "batch_size", "closed"), [(64, 1, True), (128, 8, True), (256, 8, False), (256, 128, True), (512, 8, False)]
)
def test_units_are_closed_on_a_cpu_where_traffic_costs_more_than_the_products(
    width: int, batch_size: int, closed: bool
) -> None:
    """The last convs of ResNet-50's bottlenecks at 224x224."""
    spec = unit_spec(ConvBN(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width).train()))
    size = 56 * 64 // width
    problem = ConvProblem(batch_size, width, size, size, 4 * width, 1, 1)
    assert is_closed(spec, problem, 4, CPU.flops_per_byte) == closed
    assert is_closed(spec, problem, 2, REFERENCE.flops_per_byte) == (problem.gemm_m >= 4 * width)
    assert not is_closed(spec, problem, 4, flops_per_byte=0)


@pytest.mark.parametrize(
    ("memory", "pixels", "kept"),
    [("standard", 8, "12y"), ("recompute", 8, "2y"), ("standard", 2, "123y"), ("recompute", 2, "2y")],
)
def test_bottleneck_keeps_raw_conv_outputs_and_its_output_alone(
    memory: str, pixels: int, kept: str, engine: str
) -> None:
    """With many pixels the third unit is closed and needs no ``z3`` even in "standard" mode."""
    block = shake(FusedBottleneck(32, 8, memory=memory)).train()
    x = batch(2, 32, pixels, pixels).requires_grad_()
    with torch.no_grad():
        z1 = block.conv1(x)
        z2 = block.conv2(block.bn1(z1).relu())
        z3 = block.conv3(block.bn2(z2).relu())
    expected = {"1": z1, "2": z2, "3": z3, "y": (block.bn3(z3) + x).relu()}
    maps = saved_maps(block, x)[1:]  # without x
    assert len(maps) == len(kept)
    for name in kept:
        assert sum(m.shape == expected[name].shape and torch.allclose(m, expected[name], atol=1e-4) for m in maps) == 1


@pytest.mark.parametrize("memory", MEMORIES)
def test_basic_block_keeps_nothing_normalised_or_activated(memory: str, engine: str) -> None:
    block = shake(FusedBasicBlock(8, 8, memory=memory)).train()
    x = batch(2, 8, 7, 5).requires_grad_()
    with torch.no_grad():
        z1 = block.conv1(x)
        z2 = block.conv2(block.bn1(z1).relu())
        y = (block.bn2(z2) + x).relu()
    maps = saved_maps(block, x)[1:]  # without x
    expected = [z1, z2, y] if memory == "standard" else [z1, y]
    assert len(maps) == len(expected)
    for t in expected:
        assert any(torch.allclose(m, t, atol=1e-4) for m in maps)


def test_bottleneck_saves_what_the_budget_says() -> None:
    """In units u of its narrow maps: 6 in both modes' budget (z1, z2, y), 5 with recompute; eager keeps twice that."""
    x = batch(2, 64, 14, 14).requires_grad_()
    u = 2 * 16 * 14 * 14 * 4
    fused, eager = block_twins(FusedBottleneck, 64, 16)
    small = 2 * (16 * 17 + 64 * 17) * 4 + 4 * 4 * (16 + 16 + 64)  # moments and BN vectors
    assert 6 * u <= measure.saved_bytes(fused, x) <= 6 * u + small
    fused.memory = "recompute"
    assert 5 * u <= measure.saved_bytes(fused, x) <= 5 * u + small
    assert measure.saved_bytes(eager, x) >= 12 * u


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_derivative_is_refused(training: bool, engine: str) -> None:
    block = FusedBottleneck(4, 1).double().train(training)
    x = batch(2, 4, 3, 3, dtype=double).requires_grad_()
    (g,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()


@pytest.mark.parametrize("kind", [FusedBasicBlock, FusedBottleneck])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_expanded_and_sliced_output_gradients_are_read_right_and_left_alone(
    kind: type[nn.Module], training: bool, engine: str
) -> None:
    block = shake(kind(8, 8 // kind.expansion).double()).train(training)
    x = batch(2, 8, 5, 4, dtype=double).requires_grad_()
    shape = block(x).shape
    ones = torch.ones(shape, dtype=double)

    def gradients(backward: Callable[[Tensor], object]) -> list[Tensor]:
        for t in (x, *block.parameters()):
            t.grad = None
        backward(block(x))
        return [t.grad for t in (x, *block.parameters())]

    expected = gradients(lambda y: y.backward(ones))
    by_sum = gradients(lambda y: y.sum().backward())
    expanded = torch.ones(1, dtype=double).expand(shape)
    by_expanded = gradients(lambda y: y.backward(expanded))
    big = torch.ones(shape[0], 2 * shape[1], *shape[2:], dtype=double)
    big[:, 1::2] = 7
    before = big.clone()
    by_slice = gradients(lambda y: y.backward(big[:, ::2]))
    for actual in (by_sum, by_expanded, by_slice):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert torch.equal(big, before)


@pytest.mark.parametrize("memory", MEMORIES)
def test_second_backward_through_a_retained_graph_doubles_the_gradients(memory: str, engine: str) -> None:
    block = shake(FusedBottleneck(8, 2, memory=memory)).train()
    x = batch(2, 8, 5, 4).requires_grad_()
    g = batch(2, 8, 5, 4, seed=3)
    before = g.clone()
    y = block(x)
    y.backward(g, retain_graph=True)
    first = [t.grad.clone() for t in (x, *block.parameters())]
    y.backward(g)
    for t, once in zip((x, *block.parameters()), first, strict=True):
        assert torch.equal(t.grad, 2 * once)
    assert torch.equal(g, before)


@pytest.mark.parametrize("wanted", ["x", "conv1.weight", "bn2.bias", "bn3.weight", "downsample.0.weight", "all but x"])
@pytest.mark.parametrize("planes", [1, 4], ids=["closed", "stored"])
def test_only_the_gradients_asked_for_are_computed_and_they_are_right(wanted: str, planes: int, engine: str) -> None:
    fused, eager = block_twins(FusedBottleneck, 2, planes, 2)
    fused, eager, x = fused.double(), eager.double(), batch(2, 2, 6, 5, dtype=double)
    for module in (fused, eager):
        for name, p in module.named_parameters():
            p.requires_grad_(wanted in (name, "all but x"))
    results = []
    for module in (fused, eager):
        leaf = x.clone().requires_grad_(wanted == "x")
        module(leaf).square().sum().backward()
        named = {"x": leaf, **dict(module.named_parameters())}
        results.append({name: t.grad for name, t in named.items() if t.grad is not None})
    assert_steps_equal(*results)


@pytest.mark.parametrize("kind", [FusedBasicBlock, FusedBottleneck])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_block_leaves_its_input_alone(kind: type[nn.Module], mode: str, engine: str) -> None:
    fused, eager = block_twins(kind, 8, 8 // kind.expansion)
    x = batch(2, 8, 5, 4).requires_grad_()
    before = x.detach().clone()
    fused.train(mode == "train"), eager.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        y = fused(x)
    assert torch.equal(x, before)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    if mode == "no_grad":
        return
    (y + 2 * x).sum().backward()
    ours, x.grad = x.grad, None
    (eager(x) + 2 * x).sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-3, atol=1e-4)
    assert torch.equal(x, before)


def test_writing_into_the_output_before_backward_is_noticed(engine: str) -> None:
    y = FusedBasicBlock(4, 4)(batch(2, 4, 5, 5).requires_grad_())
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("memory", MEMORIES)
def test_checkpointed_block_equals_checkpointed_eager(use_reentrant: bool, memory: str, engine: str) -> None:
    fused, eager = (m.double() for m in block_twins(FusedBottleneck, 8, 2, memory=memory))
    x = batch(2, 8, 5, 4, dtype=double)

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=use_reentrant)

    ours = step(Checkpointed(fused), x)
    assert_steps_equal(ours, step(Checkpointed(eager), x))
    assert ours["block.bn1.num_batches_tracked"] == 2
    plain = step(fused, x)
    assert all(torch.equal(ours[f"block.{n}.grad"], plain[f"{n}.grad"]) for n, _ in fused.named_parameters())


def test_two_forwards_then_one_backward(engine: str) -> None:
    fused, eager = (m.double() for m in block_twins(FusedBottleneck, 8, 2))

    class Twice(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x[:2]) + self.block(x[2:])

    x = batch(4, 8, 5, 4, dtype=double)
    ours = step(Twice(fused), x)
    assert_steps_equal(ours, step(Twice(eager), x))
    assert ours["block.bn3.num_batches_tracked"] == 2


def test_output_requires_no_gradient_where_no_operand_does(engine: str) -> None:
    block = FusedBasicBlock(4, 4)
    for p in block.parameters():
        p.requires_grad_(False)
    assert not block(batch(2, 4, 5, 5)).requires_grad

"""Frozen parts: what nobody needs is neither kept for backward nor computed there, and the rest equals eager's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import images, small_twins
from oracles import assert_steps_equal, batch, block_twins, ops_called, saved_maps, shake
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fusedres import FusedBasicBlock, FusedBottleneck

pytestmark = pytest.mark.usefixtures("one_thread")

double = torch.float64
WGRADS = ("fusedres::conv_wgrad", "fusedres::pointwise_wgrad")
DGRADS = ("fusedres::conv_dgrad", "fusedres::pointwise_dgrad")


def freeze(module: nn.Module, *prefixes: str) -> nn.Module:
    """Parameters whose names begin with one of ``prefixes`` need no gradient."""
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(prefixes))
    return module


def eval_batch_norms(module: nn.Module) -> nn.Module:
    """Every BN in eval, and its parameters frozen, as detection code does it."""
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.eval().requires_grad_(False)
    return module


def launches(y: Tensor) -> tuple[int, int]:
    """(weight gradients, input gradients) that the backward from ``y`` launches."""
    calls = ops_called(lambda: y.sum().backward())
    return sum(calls[op] for op in WGRADS), sum(calls[op] for op in DGRADS)


#: A training Bottleneck of few pixels whose input needs no gradient. Frozen prefixes -> wgrads, dgrads, maps kept, and
#: those kept with "recompute", where x brings z1 back and z2 brings z3 back.
TRAINING = {
    (): (3, 2, "x123y", "x2y"),
    ("conv1",): (2, 2, "123y", "x2y"),
    ("conv1", "bn1"): (2, 1, "123y", "x2y"),
    ("conv1", "bn1", "conv2"): (1, 1, "23y", "2y"),
    ("conv1", "bn1", "conv2", "bn2"): (1, 0, "23y", "2y"),
    ("conv1", "conv2", "conv3", "bn1", "bn2"): (0, 0, "3y", "2y"),
    ("conv1", "conv2", "conv3", "bn1", "bn2.weight", "bn3"): (0, 1, "23y", "2y"),
    ("conv1", "conv2", "conv3", "bn1", "bn2", "bn3.weight"): (0, 0, "y", "y"),
    ("conv1", "conv2", "conv3", "bn1", "bn2", "bn3"): (0, 0, "", ""),
}


@pytest.mark.parametrize("memory", ["standard", "recompute"])
@pytest.mark.parametrize("frozen", TRAINING, ids=lambda frozen: " ".join(frozen) or "nothing")
def test_training_block_launches_and_keeps_only_what_its_unfrozen_parts_need(
    frozen: tuple[str, ...], memory: str, engine: str
) -> None:
    wgrads, dgrads, *kept_by_memory = TRAINING[frozen]
    kept = kept_by_memory[memory == "recompute"]
    block = freeze(shake(FusedBottleneck(32, 8, memory=memory)), *frozen)
    x = batch(2, 32, 2, 2)
    expected = maps_of(block, x)
    assert_maps(saved_maps(block, x), [expected[name] for name in kept])
    y = block(x)
    assert y.requires_grad == bool(kept)
    if kept:
        assert launches(y) == (wgrads, dgrads)


def maps_of(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The maps of a Bottleneck by the names used here: its input, its convs' outputs, its output."""
    with torch.no_grad():
        z1 = block.conv1(x)
        z2 = block.conv2(block.bn1(z1).relu())
        z3 = block.conv3(block.bn2(z2).relu())
        return {"x": x, "1": z1, "2": z2, "3": z3, "y": (block.bn3(z3) + x).relu()}


def assert_maps(maps: list[Tensor], expected: list[Tensor]) -> None:
    assert len(maps) == len(expected)
    for e in expected:
        assert sum(m.shape == e.shape and torch.allclose(m, e, atol=1e-4) for m in maps) == 1


@pytest.mark.parametrize("norm", ["eval", "FrozenBatchNorm2d"])
def test_constant_batch_norm_keeps_no_output_of_the_last_conv(norm: str, engine: str) -> None:
    """With constants ``dz = scale*g``: z1 and z2 are read as operands and for their signs, z3 by nobody."""
    if norm == "eval":
        block = eval_batch_norms(shake(FusedBottleneck(32, 8)))
    else:
        block = shake(FusedBottleneck(32, 8, norm_layer=FrozenBatchNorm2d))
    x = batch(2, 32, 5, 4)
    expected = maps_of(block, x)
    assert_maps(saved_maps(block, x), [expected[name] for name in "x12y"])
    assert launches(block(x)) == (3, 2)
    assert launches(block(x.requires_grad_())) == (3, 3)


def test_frozen_projection_costs_nothing_where_the_input_needs_no_gradient(engine: str) -> None:
    block = freeze(block_twins(FusedBottleneck, 8, 8, 2)[0], "downsample")
    x = batch(2, 8, 4, 4)
    wide = [m for m in saved_maps(block, x) if m.shape[1] == 32]
    assert len(wide) == 2  # the output and z3, but not the projection's
    assert launches(block(x)) == (3, 2)
    assert launches(block(x.requires_grad_())) == (3, 4)


def test_weight_that_needs_no_gradient_closes_no_unit(engine: str) -> None:
    """A closed unit would take its BN's sums from the weight gradient; with a frozen weight they come from ``z``."""
    block, x = shake(FusedBottleneck(16, 4)), batch(2, 16, 6, 6).requires_grad_()
    assert ops_called(lambda: block(x).sum().backward())["fusedres::pointwise_wgrad"] == 1
    freeze(block, "conv3")
    assert launches(block(x)) == (2, 3)
    assert ops_called(lambda: block(x).sum().backward())["fusedres::pointwise_wgrad"] == 0


def random_choice(parameters: list[str], seed: int) -> tuple[set[str], bool]:
    """Some of the parameters, and whether the input needs a gradient; never nothing at all."""
    draw = random.Random(seed)
    share = draw.choice((0.1, 0.5, 0.9))
    chosen = {name for name in parameters if draw.random() < share}
    return chosen or {draw.choice(parameters)}, draw.random() < 0.5


#: name -> (kind, inplanes, planes, stride, size of the map): units closed and stored, with and without a projection
BLOCKS: dict[str, tuple[type[nn.Module], int, int, int, tuple[int, int]]] = {
    "basic": (FusedBasicBlock, 6, 6, 1, (5, 4)),
    "basic-projection": (FusedBasicBlock, 6, 8, 2, (5, 4)),
    "bottleneck": (FusedBottleneck, 8, 2, 1, (5, 4)),
    "bottleneck-projection": (FusedBottleneck, 2, 4, 2, (6, 5)),
    "bottleneck-few-pixels": (FusedBottleneck, 8, 4, 2, (3, 2)),
}


@pytest.mark.parametrize("memory", ["standard", "recompute"])
@pytest.mark.parametrize("name", BLOCKS)
def test_any_choice_of_frozen_parameters_and_batch_norms_gives_eagers_gradients(
    name: str, memory: str, engine: str
) -> None:
    kind, inplanes, planes, stride, size = BLOCKS[name]
    fused, eager = (m.double() for m in block_twins(kind, inplanes, planes, stride, memory=memory))
    for module in (fused, eager):
        module.conv2.bias = nn.Parameter(torch.linspace(-1, 1, module.conv2.out_channels, dtype=double))
    x = batch(3, inplanes, *size, dtype=double)
    names = [n for n, _ in fused.named_parameters()]
    for seed in range(12):
        wanted, needs_x = random_choice(names, seed)
        in_eval, _ = random_choice([n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)], seed)
        results = []
        for module in (fused, eager):
            for n, p in module.named_parameters():
                p.requires_grad_(n in wanted)
                p.grad = None
            for n, m in module.named_modules():
                m.training = n not in in_eval
            leaf = x.clone().requires_grad_(needs_x)
            y = module(leaf)
            y.square().sum().backward()
            gradients = {"x": leaf.grad, **{n: p.grad for n, p in module.named_parameters()}}
            results.append({"y": y.detach(), **{n: g for n, g in gradients.items() if g is not None}})
        assert set(results[0]) - {"x", "y"} == wanted
        assert_steps_equal(*results)


def frozen_until(net: nn.Module, stage: int) -> nn.Module:
    """Stem and the first stages without gradients: torchvision's ``trainable_layers`` of detection backbones."""
    return freeze(net, "conv1", "bn1", *(f"layer{i}" for i in range(1, stage + 1)))


@pytest.mark.parametrize("norm", ["train", "eval", "FrozenBatchNorm2d"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_frozen_stem_and_stage_keep_and_compute_nothing(kind: str, norm: str, engine: str) -> None:
    more: dict[str, Any] = {"norm_layer": FrozenBatchNorm2d} if norm == "FrozenBatchNorm2d" else {}
    net = frozen_until(small_twins(kind, torch.float32, **more)[0], 1)
    if norm == "eval":
        eval_batch_norms(net)
    x = images(2, 64, torch.float32)
    with torch.no_grad():
        stem = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    sizes = {m.shape[2:] for m in saved_maps(net, x)}
    assert x.shape[2:] not in sizes  # the image
    assert (32, 32) not in sizes  # the stem's conv
    assert [m.shape for m in saved_maps(net, x) if m.shape[2:] == stem.shape[2:]] == entering_layer2(net, stem)
    count = sum(isinstance(m, nn.Conv2d) for stage in (2, 3, 4) for m in getattr(net, f"layer{stage}").modules())
    wgrads, dgrads = launches(net(x))
    assert (wgrads, dgrads) == (count, count - 2)  # no dgrad into layer1: not by conv1, not by the projection
    assert all(p.grad is None for n, p in net.named_parameters() if not p.requires_grad)


def entering_layer2(net: nn.Module, stem: Tensor) -> list[torch.Size]:
    """The maps of layer1's size that backward reads: layer2's input, and a Bottleneck's z1 before it strides."""
    channels = net.layer2[0].conv1.in_channels
    sizes = [channels] if isinstance(net.layer2[0], FusedBasicBlock) else [channels, net.layer2[0].conv1.out_channels]
    return [torch.Size((stem.shape[0], c, *stem.shape[2:])) for c in sizes]


def test_maps_kept_under_constant_batch_norms_are_half_of_eagers() -> None:
    """Eager's BN in eval keeps its input for the gradient of its weight, whether somebody needs that or not."""
    fused, eager = (eval_batch_norms(frozen_until(n, 1)) for n in small_twins("bottleneck", torch.float32))
    x = images(2, 64, torch.float32)
    ours, theirs = (sum(m.untyped_storage().nbytes() for m in saved_maps(net, x)) for net in (fused, eager))
    assert ours <= 0.55 * theirs


def test_frozen_first_conv_compiles_with_dynamic_sizes() -> None:
    """Its input's gradient needs the input's size, not the input."""
    block = freeze(block_twins(FusedBottleneck, 8, 4, 2)[0].double(), "conv1", "downsample")
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for size in ((2, 8, 10, 9), (3, 8, 12, 11)):
        gradients = []
        for call in (block, compiled):
            x = batch(*size, dtype=double).requires_grad_()
            call(x).square().sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)
    assert len(graphs) == 1

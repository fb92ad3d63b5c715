"""Blocks that share an autograd Function compute, save and move what they do one by one, in less traffic."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from oracles import assert_steps_equal, batch, block_twins, ops_called, projection, saved_maps, shake, step
from torch import Tensor, nn

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, ResNet, stages
from fusedres.stages import run_stage

pytestmark = pytest.mark.usefixtures("one_thread")

CL = torch.channels_last


class Stage(nn.Module):
    """A stage that is told whether to chain."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks, self.chained = blocks, True

    def forward(self, x: Tensor) -> Tensor:
        return run_stage(self.blocks, x, self.chained)


def made(block: type[nn.Module] = FusedBottleneck, count: int = 3, **options: object) -> Stage:
    torch.manual_seed(0)
    planes = 3 if block is FusedBottleneck else 12
    first = block(8, planes, 2, projection(8, 12, 2), **options)
    return Stage(shake(nn.Sequential(first, *(block(12, planes, **options) for _ in range(count - 1)))))


def twins(stage: Stage) -> tuple[Stage, Stage]:
    """``stage``, and a copy that runs block by block."""
    other = copy.deepcopy(stage)
    other.chained = False
    return stage, other


def picture(n: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return batch(n, 8, 9, 7, dtype=dtype).contiguous(memory_format=CL)


def is_chained(stage: nn.Module, x: Tensor) -> bool:
    return ops_called(lambda: stage(x).float().square().sum().backward())["fusedres::conv_dgrad_drelu_dbn"] > 0


def frozen_first(stage: Stage) -> None:
    stage.blocks[0].eval().requires_grad_(False)


def frozen_affine(stage: Stage) -> None:
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def constant_statistics(stage: Stage) -> None:
    stage.blocks[1].bn2.eval()
    stage.blocks[-1].bn1.eval()


def bias(stage: Stage) -> None:
    conv = stage.blocks[1].conv1
    conv.bias = nn.Parameter(torch.ones(conv.out_channels))


FORMS: dict[str, Callable[[], Stage]] = {
    "basic": lambda: made(FusedBasicBlock),
    "bottleneck": made,
    "two": lambda: made(count=2),
    "six": lambda: made(count=6),
    "recompute": lambda: made(memory="recompute"),
    "basic, recompute": lambda: made(FusedBasicBlock, memory="recompute"),
    "dilated": lambda: made(dilation=2),
}
CHANGES: dict[str, Callable[[Stage], object]] = {
    "nothing": lambda stage: None,
    "first block frozen": frozen_first,
    "affine frozen": frozen_affine,
    "some statistics constant": constant_statistics,
    "a bias": bias,
    "one weight trains": lambda stage: (stage.requires_grad_(False), stage.blocks[1].conv2.weight.requires_grad_()),
}


@pytest.mark.parametrize("needs_x", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_the_blocks_bit_for_bit(form: str, change: str, needs_x: bool, engine: str) -> None:
    stage = FORMS[form]()
    CHANGES[change](stage)
    chained, blocks = twins(stage)
    for seed in range(4):  # called, recorded, replayed
        x = batch(3, 8, 9, 7, seed=seed).contiguous(memory_format=CL).requires_grad_(needs_x)
        results = []
        for module in (chained, blocks):
            given = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_x)
            y = module(given)
            module.zero_grad()
            if y.requires_grad:
                y.backward(torch.ones_like(y) / 7)
            gradients = [p.grad for p in module.parameters()]
            results.append([y, given.grad, *gradients, *module.buffers()])
        for ours, theirs in zip(*results, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


def others(ops: Counter[str]) -> dict[str, int]:
    """The ops that chaining leaves alone."""
    changed = ("fusedres::drelu_dbn", "fusedres::conv_dgrad", "fusedres::conv_dgrad_drelu_dbn")
    return {op: n for op, n in ops.items() if op.startswith("fusedres::") and op not in changed}


@pytest.mark.parametrize(("form", "count"), [("basic", 3), ("bottleneck", 3), ("two", 2), ("six", 6)])
def test_the_gradient_between_two_blocks_is_masked_where_it_is_made(form: str, count: int) -> None:
    chained, blocks = twins(FORMS[form]())
    x = picture().requires_grad_()
    ours, theirs = (ops_called(lambda m=m: m(x).sum().backward()) for m in (chained, blocks))
    functions = -(-count // stages.MOST_BLOCKS)
    assert theirs["fusedres::drelu_dbn"] == count
    assert ours["fusedres::drelu_dbn"] == functions
    assert ours["fusedres::conv_dgrad_drelu_dbn"] == count - functions
    assert theirs["fusedres::conv_dgrad"] - ours["fusedres::conv_dgrad"] == count - functions
    assert others(ours) == others(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_parameters_and_gradients_stay_float32(dtype: torch.dtype) -> None:
    chained, blocks = twins(made())
    x = picture(dtype=dtype)
    gradients = []
    for module in (chained, blocks):
        with torch.autocast("cpu", dtype):
            assert is_chained(module, x) == (module is chained)
        gradients.append([p.grad for p in module.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_networks_chain_where_the_engine_gains_by_it_or_they_are_told_to() -> None:
    net, x = ResNet(FusedBottleneck, [2, 1, 1, 1], num_classes=3), batch(2, 3, 32, 32)
    with fusedres.engine("reference"):
        assert not is_chained(net, x)
        net.set_chained_blocks()
        assert is_chained(net, x)
        assert set(net.state_dict()) == set(ResNet(FusedBottleneck, [2, 1, 1, 1], num_classes=3).state_dict())
        net.set_grad_checkpointing()
        assert not is_chained(net, x)
        net.set_grad_checkpointing(False)
        net.set_chained_blocks(False)
        assert not is_chained(net, x)
        net.set_chained_blocks(None)
    if fusedres.native.missing is None:
        assert is_chained(net, x)


class Odd(FusedBottleneck):
    """A user's block."""


LOOKED_AT: dict[str, Callable[[Stage], object]] = {
    "hook of a block": lambda stage: stage.blocks[1].register_forward_hook(lambda _, __, y: 2 * y),
    "backward hook of a block": lambda stage: stage.blocks[1].register_full_backward_hook(lambda _, g, __: (3 * g[0],)),
    "hook of the stage": lambda stage: stage.blocks.register_forward_hook(lambda _, __, y: 2 * y),
    "hook of a conv": lambda stage: stage.blocks[2].conv1.register_forward_hook(lambda _, __, y: 2 * y),
    "another activation": lambda stage: setattr(stage.blocks[1], "relu", nn.LeakyReLU(0.2)),
    "a subclass": lambda stage: setattr(stage.blocks[1], "__class__", Odd),
    "a shortcut of its own": lambda stage: setattr(stage.blocks[1], "downsample", nn.Sequential(nn.Identity())),
    "a forward of its own": lambda stage: setattr(stage.blocks[1], "forward", lambda x: 2 * x),
}


@pytest.mark.parametrize("look", LOOKED_AT)
def test_whoever_looks_in_between_gets_blocks(look: str) -> None:
    chained, blocks = twins(made())
    for module in (chained, blocks):
        LOOKED_AT[look](module)
    x = picture().requires_grad_()
    assert not is_chained(chained, x)
    results = []
    for module in (chained, blocks):
        module.zero_grad()
        y = module(picture())
        y.square().sum().backward()
        results.append([y, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_bad_input_is_refused_before_any_statistics_move() -> None:
    stage = made()
    stage.blocks[2].conv1 = nn.Conv2d(11, 3, 1)
    before = copy.deepcopy(stage.state_dict())
    with pytest.raises(ValueError, match="expected 11 channels"):
        stage(picture().requires_grad_())
    assert all(torch.equal(t, before[name]) for name, t in stage.state_dict().items())


def test_an_identity_of_another_shape_is_refused_as_by_the_blocks() -> None:
    stage = made()
    stage.blocks[1].conv3, stage.blocks[1].bn3 = nn.Conv2d(3, 13, 1), nn.BatchNorm2d(13)
    with pytest.raises(ValueError, match="the shortcut has shape"):
        stage(picture().requires_grad_())


@pytest.mark.parametrize("memory", ["standard", "recompute"])
@pytest.mark.parametrize("block", [FusedBasicBlock, FusedBottleneck])
def test_what_is_kept_for_backward_is_what_the_blocks_keep(block: type[nn.Module], memory: str) -> None:
    chained, blocks = twins(made(block, memory=memory))

    def kept(module: Stage) -> Counter[tuple[int, ...]]:
        maps = saved_maps(module, picture().requires_grad_())
        return Counter(tuple(t.shape) for t in maps)

    assert kept(chained) == kept(blocks)


def test_second_derivatives_are_refused() -> None:
    x = picture().requires_grad_()
    with pytest.raises(RuntimeError, match=r"twice|second|create_graph"):
        torch.autograd.grad(made()(x).sum(), x, create_graph=True)[0].sum().backward()


def test_images_in_their_own_order_go_block_by_block_and_leave_in_it() -> None:
    stage = made()
    x = picture().contiguous().requires_grad_()
    assert not is_chained(stage, x)
    assert stage(x).is_contiguous()


def test_blocks_of_one_stage_equal_eager_in_float64() -> None:
    fused, eager = zip(*(block_twins(FusedBottleneck, 12, 3) for _ in range(3)), strict=True)
    x = batch(2, 12, 7, 6, dtype=torch.float64).contiguous(memory_format=CL)
    stages = (Stage(nn.Sequential(*blocks)).double() for blocks in (fused, eager))
    assert_steps_equal(*(step(stage, x) for stage in stages))

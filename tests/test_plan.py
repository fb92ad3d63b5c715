"""Plans: what meta tensors say would be launched is what is launched, and bytes are those counted by hand."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from oracles import needs_native
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fusedres
from fusedres import dispatch, measure, plan
from fusedres.cli.networks import EagerBlock
from fusedres.engines.cuda import CUDA
from fusedres.plan import Launch
from fusedres.traffic import traffic_of

N, C, SIDE = 4, 64, 16  # a bottleneck of width C: u = N*SIDE*SIDE*C/4 elements on its narrow maps
U = N * SIDE * SIDE * (C // 4)


def on_meta(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("meta")


def bottleneck(downsample: bool = False) -> nn.Module:
    projection = nn.Sequential(nn.Conv2d(C // 2, C, 1, 2, bias=False), nn.BatchNorm2d(C)) if downsample else None
    block = fusedres.FusedBottleneck(C // 2 if downsample else C, C // 4, 2 if downsample else 1, projection)
    return block.to(memory_format=torch.channels_last)


class Head(nn.Module):
    """A network of one block: its map as logits."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Identity()  # x requires a gradient only behind a launch, as in a network
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x + 0).mean((2, 3))


def walked(block: nn.Module, training: bool, device_type: str = "cpu") -> list[Launch]:
    """The launches of ``block`` alone, whose input requires a gradient in training."""
    net = on_meta(Head(block))
    x = torch.empty(N, block.conv1.in_channels, SIDE, SIDE, device="meta", requires_grad=training)
    x = x.to(memory_format=torch.channels_last)
    target = torch.empty(N, dtype=torch.long, device="meta") if training else None
    with dispatch.meta_as(device_type):
        launches = plan.walk(net, {"block": net.block}, x, target)
    return [launch for launch in launches if launch.layer == "block"]


def activations(launches: list[Launch], phase: str) -> float:
    """Bytes of activations in units of u float32 elements."""
    return sum(launch.activation_bytes for launch in launches if launch.phase == phase) / (4 * U)


def test_eager_traffic_of_a_bottleneck_is_that_of_the_design() -> None:
    eager = EagerBlock(bottleneck())
    training = walked(eager, True)
    assert activations(walked(eager, False), "forward") == 48
    assert activations(training, "forward") == 54
    assert activations(training, "backward") == 84
    computing = [launch for launch in training if launch.ops != ("aten::copy_",)]  # of a weight gradient, in torch 2.11
    assert Counter(launch.phase for launch in computing) == {"forward": 13, "backward": 13}


def test_fused_traffic_of_a_bottleneck() -> None:
    pytest.importorskip("triton", reason="needs triton: its engine plans for CUDA")
    fused = bottleneck()
    assert activations(walked(fused, False), "forward") == 16
    cuda = [launch for launch in walked(fused, True, "cuda") if launch.ops[0].startswith("fusedres::")]
    assert activations(cuda, "forward") == 24
    # dy, y, z3 -> g: 16; conv3: 9 and 10; conv2: 3 and 4; conv1: 6 and 10
    assert activations(cuda, "backward") == 58
    ops = Counter(launch.ops[0] for launch in cuda)
    assert ops["fusedres::drelu_dbn"] + ops["fusedres::conv_wgrad"] + ops["fusedres::conv_dgrad"] == 7


def test_tails_of_an_engine_asked_for_by_name_stand_between_the_convs_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="needs triton: its engine plans for CUDA")
    planned = walked(bottleneck(), True, "cuda")
    monkeypatch.setattr(CUDA, "missing", None)
    dispatch._choose.cache_clear()
    with fusedres.engine("cuda"):
        assert dispatch.choose("drelu_dbn", "cuda", torch.float32).engine is CUDA
        assert dispatch.choose("conv_fprop", "cuda", torch.float32).engine.name == "triton"
        by_name = walked(bottleneck(), True, "cuda")
    dispatch._choose.cache_clear()
    assert [(launch.ops, launch.bytes) for launch in by_name] == [(launch.ops, launch.bytes) for launch in planned]


@pytest.mark.parametrize("downsample", [False, True])
def test_a_block_in_one_launch_reads_its_input_and_writes_its_output(downsample: bool) -> None:
    launches = plan.fuse(walked(bottleneck(downsample), False), lambda launch: launch.layer)
    assert len(launches) == 1
    x, y = (N * C // 2 * SIDE**2, N * C * (SIDE // 2) ** 2) if downsample else (4 * U, 4 * U)
    assert launches[0].activation_bytes == 4 * (x + y)


def test_a_fused_training_block_keeps_what_its_backward_reads() -> None:
    alone = walked(bottleneck(), True, "meta")
    forward, backward = plan.fuse(alone, lambda launch: launch.phase)
    read = {operand.key for operand in backward.reads}
    assert {operand.key for operand in forward.writes if operand.is_activation} & read
    gradients = sum(operand.bytes for operand in backward.writes if not operand.is_activation)
    assert gradients >= 4 * sum(p.numel() for p in bottleneck().parameters() if p.dim() == 4)
    assert forward.flops + backward.flops == sum(launch.flops for launch in alone)


def test_strided_pointwise_convs_read_the_pixels_they_use() -> None:
    x = torch.empty(2, 8, 7, 6, device="meta").to(memory_format=torch.channels_last)
    for kernel, pixels in ((1, 4 * 3), (3, 7 * 6)):
        conv = nn.Conv2d(8, 8, kernel, 2, kernel // 2, bias=False, device="meta")
        (launch,) = plan.walk(conv, {}, x)
        assert launch.reads[0].bytes == 2 * 8 * pixels * 4


def real_and_planned(arch: str, engine: str, training: bool) -> tuple[Counter, Counter]:
    """Ops called on CPU tensors, and ops planned for them."""
    with dispatch.engine(engine):
        model = fusedres.models.MODELS[arch](num_classes=4).train(training).to(memory_format=torch.channels_last)
        x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
        target = torch.tensor([0, 1])

        def step() -> torch.Tensor:
            return nn.functional.cross_entropy(model(x), target)

        with torch.set_grad_enabled(training):
            real = measure.count_launches(step if training else lambda: model(x))
        with dispatch.meta_as("cpu"):
            meta_target = target.to("meta") if training else None
            launches = plan.walk(on_meta(model), {}, x.to("meta"), meta_target)
    planned = Counter(launch.ops[0].partition(".")[0] for launch in launches)
    return Counter(real.forward_ops) + Counter(real.backward_ops), planned


def of_fusedres(ops: Counter) -> Counter:
    return Counter({op: count for op, count in ops.items() if op.startswith("fusedres::")})


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "cifar_resnet20"])
@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_training_plan_names_the_ops_really_called(arch: str, engine: str) -> None:
    real, planned = real_and_planned(arch, engine, True)
    assert of_fusedres(planned) == of_fusedres(real)
    assert sum(of_fusedres(planned).values()) > 90


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "cifar_plain20"])
def test_an_eval_plan_names_the_ops_really_called_but_for_folding(arch: str) -> None:
    real, planned = real_and_planned(arch, "reference", False)
    folding = {"fusedres::bn_constants", "fusedres::bn_fold"}
    assert of_fusedres(planned) == Counter({op: n for op, n in of_fusedres(real).items() if op not in folding})


def test_an_eager_plan_names_the_ops_really_called() -> None:
    from torchvision.models import resnet18

    model, x, target = resnet18(num_classes=4), torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    real = measure.count_launches(lambda: nn.functional.cross_entropy(model(x), target))
    planned = Counter(
        launch.ops[0].partition(".")[0] for launch in plan.walk(on_meta(model), {}, x.to("meta"), target.to("meta"))
    )
    for op in (
        "aten::convolution",
        "aten::native_batch_norm",
        "aten::relu_",
        "aten::threshold_backward",
        "aten::convolution_backward",
    ):
        assert planned[op] == (Counter(real.forward_ops) + Counter(real.backward_ops))[op] > 0


def test_planned_flops_of_eager_are_those_the_flop_counter_finds() -> None:
    net, target = Head(EagerBlock(bottleneck(downsample=True))), torch.zeros(N, dtype=torch.long)
    x = torch.randn(N, C // 2, SIDE, SIDE)
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(net(x), target).backward()
    launches = plan.walk(on_meta(net), {}, x.to("meta"), target.to("meta"))
    assert sum(launch.flops for launch in launches) == counter.get_total_flops()


def test_fused_blocks_multiply_as_much_as_eager_ones() -> None:
    def flops(block: nn.Module, training: bool) -> int:
        return sum(launch.flops for launch in walked(block, training))

    basic = fusedres.FusedBasicBlock(C, C)  # closes no unit
    for training in (False, True):
        assert flops(basic, training) == flops(EagerBlock(basic), training)
    closed, m, c = bottleneck(), N * SIDE**2, C // 4
    extra = m * c * (c + 1) + 2 * m * c**2 + 3 * 2 * C * c**2  # moments, B a', and three C x c x c products
    assert flops(closed, False) == flops(EagerBlock(closed), False)
    assert flops(closed, True) == flops(EagerBlock(closed), True) + extra


def test_layers_forward_and_backward_are_told_apart() -> None:
    net = on_meta(fusedres.cifar_resnet20())
    layers = {f"layer{i}": getattr(net, f"layer{i}") for i in (1, 2, 3)}
    launches = plan.walk(
        net, layers, torch.empty(2, 3, 32, 32, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    )
    names = ["stem", *layers, "head"]
    assert list(dict.fromkeys((launch.phase, launch.layer) for launch in launches)) == [
        *(("forward", name) for name in names),
        *(("backward", name) for name in reversed(names)),
    ]
    wgrads = Counter(launch.layer for launch in launches if "wgrad" in launch.ops[0])
    assert wgrads == {"stem": 1, "layer1": 6, "layer2": 6, "layer3": 6}


def test_tensors_with_data_are_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        plan.walk(nn.Conv2d(3, 3, 1), {}, torch.empty(1, 3, 4, 4, device="meta"))


def test_no_hook_and_no_gradient_stays_behind() -> None:
    net = on_meta(Head(bottleneck()))
    plan.walk(
        net,
        {"block": net.block},
        torch.empty(N, C, SIDE, SIDE, device="meta"),
        torch.empty(N, dtype=torch.long, device="meta"),
    )
    assert not net.block._forward_hooks
    assert not net.block._forward_pre_hooks
    assert all(p.grad is None for p in net.parameters())


# Counting what really runs


def test_traffic_of_a_call_is_that_of_its_plan() -> None:
    block = bottleneck()
    for module in (block, EagerBlock(block)):
        x = torch.randn(N, C, SIDE, SIDE).to(memory_format=torch.channels_last).requires_grad_()
        with dispatch.engine("reference"):
            found = traffic_of(lambda module=module, x=x: module(x))
            counted = measure.count_launches(lambda module=module, x=x: module(x))
            planned = [launch for launch in walked(module, True, "cpu") if launch.phase == "forward"]
        assert found.launches == counted.forward == len(planned)
        assert found.flops == sum(launch.flops for launch in planned)
        assert found.bytes == sum(launch.bytes for launch in planned)


@needs_native
@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_chain_in_one_launch_multiplies_as_much_and_moves_its_ends(downsample: bool, frozen: bool) -> None:
    block = bottleneck(downsample).eval()
    if frozen:
        fusedres.freeze(block)
    x = torch.randn(N, block.conv1.in_channels, SIDE, SIDE).to(memory_format=torch.channels_last)
    with torch.inference_mode(), dispatch.engine("cpu"):
        y = block(x)
        found = traffic_of(lambda: block(x))
    assert found.launches == 1
    assert found.flops == sum(launch.flops for launch in walked(EagerBlock(block), False))
    side = {block.conv3: y.shape[2]}  # of what comes into the others it is that of the block's input
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    weights = [packed(conv, side.get(conv, SIDE)) if frozen else conv.weight for conv in convs]
    vectors = 1 if frozen else 4  # a channel: folded BN is a bias
    read = sum(w.numel() + vectors * conv.out_channels for w, conv in zip(weights, convs, strict=True))
    assert 0 <= found.bytes - 4 * (x.numel() + y.numel() + read) < 100  # eps of every BN


def packed(conv: nn.Conv2d, side: int) -> Tensor:
    """The weight as the frozen chain reads it in place of the conv's own."""
    geometry = conv.stride, conv.padding, conv.dilation
    return torch.ops.fusedres_cpu.conv_pack(conv.weight, (side, side), *geometry)

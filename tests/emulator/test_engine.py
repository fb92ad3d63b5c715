"""Networks through the ``cuda`` engine with emulated kernels: launches counted, numbers against eager's."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from emulated_engine import EmulatedCUDA, emulated_engine
from networks import shaken
from oracles import assert_accurate, batch, block_twins, output_results
from torch import nn
from torchvision.models import resnet as eager_resnet

import fusedres
from fusedres.cli.networks import EagerNet
from fusedres.measure import count_launches

DTYPES = (torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def engine() -> Iterator[EmulatedCUDA]:
    with emulated_engine() as engine, fusedres.engine("cuda"):
        yield engine


def frozen_twins(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    fused, eager = getattr(fusedres, name)(num_classes=10), getattr(eager_resnet, name)(num_classes=10)
    fused, eager = (m.eval().to(memory_format=torch.channels_last) for m in shaken(fused, eager, dtype))
    return fusedres.freeze(fused), eager


def launches(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    with torch.no_grad():
        model(x)  # folds
        return dict(count_launches(lambda: model(x)).forward_ops)


def test_resnet50_is_a_launch_for_stem_and_head_one_a_served_block_and_else_one_a_conv() -> None:
    fused, eager = frozen_twins("resnet50", torch.float16)
    x = batch(1, 3, 32, 32, dtype=torch.float16)
    assert launches(fused, x) == {
        "fusedres_cuda::stem_fprop": 1,
        "fusedres_cuda::bottleneck_fprop": 3 + 4 + 6,
        "fusedres::conv_fprop": 3 + 3 + 3 + 1,  # layer4, its projection last
        "fusedres_cuda::head_fprop": 1,
    }
    assert_accurate(output_results(fused, eager, x))


def test_resnet18_is_a_launch_a_block_in_its_narrow_stages() -> None:
    fused, eager = frozen_twins("resnet18", torch.bfloat16)
    x = batch(1, 3, 32, 32, dtype=torch.bfloat16)
    found = launches(fused, x)
    assert found["fusedres_cuda::stem_fprop"] == 1
    assert found["fusedres_cuda::basic_block_fprop"] == 2 + 2
    assert found["fusedres::conv_fprop"] == 2 * 5
    assert_accurate(output_results(fused, eager, x))


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_cifar_resnet_is_a_launch_for_the_stem_and_one_a_block(shortcut: str) -> None:
    net = fusedres.cifar.CifarResNet(1, shortcut=shortcut).eval().to(memory_format=torch.channels_last)
    fused, eager = shaken(net, EagerNet(net).eval(), torch.float16)
    x = batch(2, 3, 16, 16, dtype=torch.float16)
    found = launches(fusedres.freeze(fused), x)
    assert found["fusedres_cuda::stem_fprop"] == 1
    assert found["fusedres_cuda::basic_block_fprop"] == {"A": 1, "B": 3}[shortcut]
    assert found.get("fusedres::conv_fprop", 0) == {"A": 2 * 2, "B": 0}[shortcut]
    assert_accurate(output_results(fused, eager, x))
    rows = {row.name: row for row in fusedres.explain(fused)}
    assert (rows["conv1"].kind, rows["conv1"].folded) == ("CifarResNet: stem", "cuda")


def test_a_chain_like_a_stem_that_adds_a_tensor_is_not_taken_for_one() -> None:
    """Its launch would leave the shortcut out."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.other = nn.Conv2d(3, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.bn(self.conv(x)) + self.other(x))

    eager, x = Net().half().eval(), batch(1, 3, 6, 7, dtype=torch.float16)
    fused = fusedres.fuse(copy.deepcopy(eager))
    assert "fusedres_cuda::stem_fprop" not in launches(fused, x)
    assert_accurate(output_results(fused, eager, x))


def test_explain_names_the_engine_of_eval_and_why_a_wide_block_has_another() -> None:
    rows = {row.name: row for row in fusedres.explain(fusedres.resnet50().half())}
    assert (rows["layer3.5"].engine, rows["layer3.5"].folded) == ("reference", "cuda")
    assert (rows["layer4.0"].engine, rows["layer4.0"].folded) == ("reference", "reference")
    assert (rows["fc"].kind, rows["fc"].engine, rows["fc"].folded) == ("ResNet: head", "eager", "cuda")
    assert "cuda: bottleneck_fprop is for widths to 256, not 512" in rows["layer4.0"].reason


def test_a_block_that_needs_more_shared_memory_than_there_is_runs_a_launch_a_conv(engine: EmulatedCUDA) -> None:
    fused, eager = block_twins(fusedres.FusedBottleneck, 64, 64)
    fused, eager, x = fused.half().eval(), eager.half().eval(), batch(1, 64, 8, 8, dtype=torch.float16)
    engine.limit = 48 << 10
    assert launches(fused, x)["fusedres::conv_fprop"] == 4
    (row,) = fusedres.explain(fused)
    assert "bottleneck_fprop of width 64 and stride 1 needs" in row.reason
    assert f"bytes of shared memory of {48 << 10}" in row.reason
    assert_accurate(output_results(fused, eager, x))


@dtypes
def test_folded_weights_follow_their_parameters(dtype: torch.dtype) -> None:
    fused, eager = (m.to(dtype).eval() for m in block_twins(fusedres.FusedBottleneck, 24, 16, 2))
    x = batch(2, 24, 9, 7, dtype=dtype)
    assert_accurate(output_results(fused, eager, x))
    with torch.no_grad():
        for module in (fused, eager):
            module.bn2.running_mean += 1
            module.downsample[1].weight *= -2
    assert_accurate(output_results(fused, eager, x))


def test_a_view_that_begins_in_the_middle_of_16_bytes_is_served() -> None:
    fused, _ = block_twins(fusedres.FusedBasicBlock, 8, 8)
    fused, x = fused.half().eval(), batch(1, 8, 6, 5, dtype=torch.float16)
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    view = memory.view(1, 6, 5, 8).permute(0, 3, 1, 2).copy_(x)
    assert view.data_ptr() % 16 == 2
    with torch.no_grad():
        assert torch.equal(fused(view), fused(x))


def test_training_and_gradients_do_not_go_through_block_kernels() -> None:
    fused, _ = block_twins(fusedres.FusedBottleneck, 64, 16)
    x = batch(1, 64, 6, 6, dtype=torch.float16)
    found = count_launches(lambda: fused.half().eval()(x)).forward_ops
    assert not any(name.startswith("fusedres_cuda") for name in found)

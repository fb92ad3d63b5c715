"""The ImageNet ResNets against torchvision's: signatures, state, options and numbers."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
import torchvision
from networks import BLOCKS, CHILDREN, Twins, as_maps, assert_step_equal, decide_relus, images, shaken, small_twins
from oracles import assert_accurate, output_results, step_results
from torch import nn
from torchvision.models import resnet as eager_resnet
from torchvision.ops import FrozenBatchNorm2d

import fusedres
from fusedres.resnet import VARIANTS, ResNet

names = pytest.mark.parametrize("name", VARIANTS)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture(scope="module", params=VARIANTS)
def twins(request: pytest.FixtureRequest) -> Twins:
    """(fused, torchvision's) as their constructors make them after the same seed. Large: one pair lives at a time."""
    torch.manual_seed(7)
    fused = getattr(fusedres, request.param)()
    torch.manual_seed(7)
    return fused, getattr(torchvision.models, request.param)()


# --- the constructors ---


@names
def test_constructor_signature_is_torchvisions(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (fusedres, torchvision.models))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]
    assert ours.return_annotation == "ResNet"


@names
def test_constructor_documents_itself(name: str) -> None:
    constructor = getattr(fusedres, name)
    assert (constructor.__name__, constructor.__module__) == (name, "fusedres.resnet")
    assert VARIANTS[name].title in constructor.__doc__
    assert str(VARIANTS[name].layers) in constructor.__doc__


def test_class_signature_is_torchvisions_and_memory() -> None:
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (ResNet, eager_resnet.ResNet))
    *shared, memory = ours.values()
    assert [(p.name, p.kind, p.default) for p in shared] == [(p.name, p.kind, p.default) for p in theirs.values()]
    assert (memory.name, memory.kind, memory.default) == ("memory", inspect.Parameter.KEYWORD_ONLY, "standard")


def test_keyword_that_contradicts_the_name_is_refused_as_by_torchvision() -> None:
    for module in (fusedres, torchvision.models):
        with pytest.raises(ValueError, match="'groups' expected value 32 but got 1"):
            module.resnext50_32x4d(groups=1)
        with pytest.raises(ValueError, match="'width_per_group' expected value 128 but got 64"):
            module.wide_resnet50_2(width_per_group=64)


def test_wrong_dilation_list_is_refused_as_by_torchvision() -> None:
    for module in (fusedres, torchvision.models):
        with pytest.raises(ValueError, match="3-element tuple"):
            module.resnet50(replace_stride_with_dilation=[True])
        with pytest.raises(NotImplementedError, match="Dilation > 1"):
            module.resnet18(replace_stride_with_dilation=[False, True, True])


def test_unknown_memory_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="memory"):
        fusedres.resnet18(memory="infinite")


# --- all ten: state and numbers ---


def test_same_seed_gives_torchvisions_state_bit_for_bit(twins: Twins) -> None:
    ours, theirs = (net.state_dict() for net in twins)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_state_dicts_load_strictly_both_ways(twins: Twins) -> None:
    fused, eager = twins
    fused.load_state_dict(eager.state_dict(), strict=True)
    eager.load_state_dict(fused.state_dict(), strict=True)


def test_children_and_attributes_are_torchvisions(twins: Twins) -> None:
    fused, eager = twins
    assert [name for name, _ in fused.named_children()] == CHILDREN
    for attribute in ("inplanes", "dilation", "groups", "base_width", "_norm_layer"):
        assert getattr(fused, attribute) == getattr(eager, attribute), attribute


def test_error_of_a_training_step_is_at_most_twice_eagers(twins: Twins) -> None:
    """Three batches: among hundreds of tensors, one draw of a single one may lie beyond twice in either direction."""
    fused, eager = (as_maps(decide_relus(net)) for net in shaken(*twins))
    assert_accurate(*(step_results(fused, eager, images(dtype=torch.float32, seed=seed)) for seed in range(3)))


def test_error_of_the_logits_is_at_most_twice_eagers(twins: Twins) -> None:
    fused, eager = (net.eval() for net in shaken(*twins))
    assert_accurate(output_results(fused, eager, images(dtype=torch.float32)))


# --- every option, to ten digits ---


@modes
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_float64_step_equals_torchvisions(name: str, training: bool) -> None:
    fused, eager = shaken(getattr(fusedres, name)(), getattr(torchvision.models, name)(), torch.float64)
    assert_step_equal(fused.train(training), eager.train(training), images())


class EvenGroupNorm(nn.GroupNorm):
    """A norm that is no BN, made from a number of channels alone."""

    def __init__(self, channels: int) -> None:
        super().__init__(4, channels)


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "groups": ("bottleneck", {"groups": 4, "width_per_group": 16}),
    "depthwise": ("bottleneck", {"groups": 64, "width_per_group": 1}),
    "width": ("bottleneck", {"width_per_group": 96}),
    "dilation": ("bottleneck", {"replace_stride_with_dilation": [False, True, True]}),
    "zero-init": ("bottleneck", {"zero_init_residual": True}),
    "zero-init-basic": ("basic", {"zero_init_residual": True}),
    "frozen": ("basic", {"norm_layer": FrozenBatchNorm2d}),
    "frozen-eps": ("bottleneck", {"norm_layer": functools.partial(FrozenBatchNorm2d, eps=0.0)}),
    "norm-arguments": ("basic", {"norm_layer": functools.partial(nn.BatchNorm2d, eps=1e-2, momentum=0.3)}),
    "no-tracking": ("basic", {"norm_layer": functools.partial(nn.BatchNorm2d, track_running_stats=False)}),
    "group-norm": ("bottleneck", {"norm_layer": EvenGroupNorm}),
    "memory": ("bottleneck", {"memory": "recompute"}),
}


@modes
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_equals_torchvisions(option: str, training: bool, engine: str) -> None:
    kind, kwargs = OPTIONS[option]
    fused, eager = small_twins(kind, **kwargs)
    assert list(fused.state_dict()) == list(eager.state_dict())
    assert_step_equal(fused.train(training), eager.train(training), images())


@pytest.mark.parametrize("kind", BLOCKS)
def test_zero_init_residual_starts_where_torchvisions_starts(kind: str) -> None:
    nets = []
    for net, block in zip((ResNet, eager_resnet.ResNet), BLOCKS[kind], strict=True):
        torch.manual_seed(3)
        nets.append(net(block, [1, 1, 1, 1], zero_init_residual=True).state_dict())
    assert all(torch.equal(nets[0][name], tensor) for name, tensor in nets[1].items())
    last = {"basic": "bn2", "bottleneck": "bn3"}[kind]
    assert not nets[0][f"layer3.0.{last}.weight"].any()


def test_foreign_blocks_are_accepted() -> None:
    layers = [1, 1, 1, 1]
    fused = ResNet(eager_resnet.BasicBlock, layers)
    eager = eager_resnet.ResNet(eager_resnet.BasicBlock, layers)
    assert_step_equal(*shaken(fused, eager, torch.float64), images())


def test_builds_and_runs_without_torchvision() -> None:
    script = """
import sys
sys.modules["torchvision"] = None
import torch, fusedres
fusedres.resnet18(num_classes=10)(torch.randn(2, 3, 64, 64)).sum().backward()
try:
    fusedres.resnet18(weights="DEFAULT")
except ImportError as error:
    assert "torchvision" in str(error), error
else:
    raise AssertionError("weights= found torchvision")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

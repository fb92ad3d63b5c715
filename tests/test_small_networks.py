"""The CIFAR ResNets and the plain networks: depth, parameters, shortcuts, and numbers against their modules."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import as_maps, assert_step_equal, images
from oracles import shake
from torch import nn

import fusedres
from fusedres.cifar import BLOCKS_PER_STAGE, PaddedShortcut
from fusedres.cli.networks import EagerNet
from fusedres.models import MODELS

#: He et al. 2015, table 6: millions of parameters by depth.
PAPER_PARAMETERS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}


def weighted_layers(net: nn.Module) -> int:
    """Convolutions on the main path, and the classifier: what the paper counts as depth."""
    main = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in name]
    return len(main) + 1


@pytest.mark.parametrize("depth", BLOCKS_PER_STAGE)
def test_cifar_resnet_has_the_papers_depth_and_parameters(depth: int) -> None:
    with torch.device("meta"):
        net = MODELS[f"cifar_resnet{depth}"]()
    assert weighted_layers(net) == depth
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    digits = 2 if PAPER_PARAMETERS[depth] < 1 else 1
    assert round(millions, digits) == pytest.approx(PAPER_PARAMETERS[depth], abs=0.011 if digits == 2 else 0.051)


@pytest.mark.parametrize("name", [name for name in MODELS if "plain" in name])
def test_plain_net_is_the_resnet_without_shortcuts(name: str) -> None:
    with torch.device("meta"):
        plain, residual = MODELS[name](), MODELS[name.replace("plain", "resnet")]()
    assert weighted_layers(plain) == weighted_layers(residual) == int("".join(filter(str.isdigit, name)))
    shapes = [
        [tuple(m.weight.shape) for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
        for net in (plain, residual)
    ]
    assert shapes[0] == shapes[1]


def test_option_a_pads_with_zeros_and_has_no_parameters() -> None:
    shortcut = PaddedShortcut(3, 2)
    x = torch.randn(2, 4, 5, 5)
    y = shortcut(x)
    assert not list(shortcut.parameters())
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert not y[:, 4:].any()


def test_option_b_projects() -> None:
    projections = [m for m in fusedres.cifar_resnet20(shortcut="B").modules() if isinstance(m, nn.Sequential)]
    assert sum(isinstance(m[0], nn.Conv2d) for m in projections) == 2


def test_unknown_shortcut_is_refused() -> None:
    with pytest.raises(ValueError, match="shortcut must be 'A' or 'B'"):
        fusedres.cifar_resnet20(shortcut="C")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cifar_resnet20", {}),
        ("cifar_resnet20", {"shortcut": "B", "memory": "recompute"}),
        ("cifar_resnet20", {"in_channels": 1}),
        ("cifar_plain20", {}),
        ("cifar_plain20", {"memory": "recompute"}),
        ("plain18", {}),
    ],
    ids=str,
)
def test_step_equals_the_modules_one_by_one(name: str, kwargs: dict, training: bool, engine: str) -> None:
    fused = shake(MODELS[name](num_classes=10, **kwargs)).double().train(training)
    x = images(n=2, side=17 if "cifar" in name else 65)[:, : kwargs.get("in_channels", 3)].contiguous()
    assert_step_equal(fused, EagerNet(copy.deepcopy(fused)), x)
    assert as_maps(fused)(x).shape == (2, 10, 1, 1)

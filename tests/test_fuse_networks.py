"""``fuse`` on the networks of torchvision and timm: numbers of eager's accuracy, and how many convs are fused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from networks import as_maps, decide_relus, images
from oracles import assert_accurate, assert_steps_equal, output_results, shake, step, step_results
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

import fusedres

RESNETS = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
VGGS = ["vgg11_bn", "vgg19_bn"]
SEGMENTERS = ["fcn_resnet50", "deeplabv3_resnet50"]

#: The convs that are fused, of those that there are: the others are followed by no BN.
SHARES = {
    **dict.fromkeys((*RESNETS, *VGGS, "googlenet"), 1.0),
    "fcn_resnet50": 54 / 55,
    "deeplabv3_resnet50": 60 / 61,
}
TIMM_SHARES = {
    "resnet18": 1.0,
    "resnet50": 1.0,
    "resnet50d": 1.0,
    "resnext50_32x4d": 1.0,
    "seresnet50": 53 / 85,  # the others are in squeeze-and-excitation
    "wide_resnet50_2": 1.0,
    "resnetaa50": 1.0,
    "resnetrs50": 56 / 88,
    "resnetv2_50": 32 / 54,  # norms come before convs: the third of a block has none behind it
    "skresnet18": 36 / 44,  # the others choose between branches
    "ecaresnet50t": 1.0,
    "resnet26t": 1.0,
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Small problems on a busy machine wait for their second thread longer than they compute."""


class Maps(nn.Module):
    """The first tensor that a network returns, as (N, K, P, Q)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        y = next(iter(y.values())) if isinstance(y, dict) else y if isinstance(y, Tensor) else y[0]
        return y if y.dim() == 4 else y[:, :, None, None]


@functools.lru_cache(1)  # all of them together are gigabytes
def torchvision_net(name: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None, "num_classes": 4}
    if name in SEGMENTERS:
        options["weights_backbone"] = None
    if name == "googlenet":
        options.update(init_weights=False, aux_logits=False, dropout=0.0)
    net = models.get_model(name, **options)
    if name in VGGS:  # no large matrices
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 4)
    for dropout in net.modules():
        if isinstance(dropout, nn.Dropout):
            dropout.p = 0.0
    return net


@functools.lru_cache(1)  # all of them together are gigabytes
def timm_net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4)


def explained(net: nn.Module, name: str) -> float:
    explanation = fusedres.explain(net)
    print(f"{name}: {explanation.fused} of {explanation.convs} convolutions fused")
    return explanation.share


def assert_eval_accurate(make: Callable[[str], nn.Module], name: str, share: float, side: int = 33) -> None:
    eager = shake(make(name)).eval()
    fused = fusedres.fuse(eager)
    assert explained(fused, name) == pytest.approx(share)
    assert list(fused.state_dict()) == list(eager.state_dict())
    assert_accurate(output_results(Maps(fused), Maps(eager), images(2, side, torch.float32)))


def assert_step_accurate(make: Callable[[str], nn.Module], name: str, side: int = 33) -> None:
    eager = decide_relus(shake(make(name))).train()
    inputs = (images(4, side, torch.float32, seed) for seed in (1, 2, 3))  # some gradient is always luckier in eager
    assert_accurate(*(step_results(Maps(fusedres.fuse(eager)), Maps(eager), x) for x in inputs))


@pytest.mark.parametrize("name", SHARES)
def test_torchvision_network_errs_no_more_than_eager_in_eval(name: str) -> None:
    assert_eval_accurate(torchvision_net, name, SHARES[name])


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "googlenet", *VGGS, *SEGMENTERS])
def test_torchvision_network_errs_no_more_than_eager_in_a_training_step(name: str) -> None:
    assert_step_accurate(torchvision_net, name)


class Features(nn.Module):
    """All maps of a pyramid in one tensor (entries, 1, 1, 1)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([feature.flatten() for feature in self.backbone(x).values()])[:, None, None, None]


@functools.lru_cache(1)  # all of them together are gigabytes
def detector() -> nn.Module:
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None, "num_classes": 3, "min_size": 64, "max_size": 96}
    return shake(models.get_model("fasterrcnn_resnet50_fpn", **options))


@pytest.mark.parametrize("frozen", [False, True], ids=["bn", "frozen-bn"])
def test_backbone_of_a_detector_errs_no_more_than_eager(frozen: bool) -> None:
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    options = {"backbone_name": "resnet50", "weights": None, "norm_layer": norm, "trainable_layers": 3}
    eager = Features(shake(models.detection.backbone_utils.resnet_fpn_backbone(**options)))
    fused = fusedres.fuse(eager)
    assert_accurate(output_results(fused.eval(), eager.eval(), images(1, 65, torch.float32)))
    decide_relus(eager)
    assert_accurate(step_results(fusedres.fuse(eager).train(), eager.train(), images(2, 65, torch.float32)))


def test_detector_finds_what_eager_finds() -> None:
    eager = detector().eval().double()
    fused = fusedres.fuse(eager)
    assert explained(fused, "fasterrcnn_resnet50_fpn") == pytest.approx(53 / 64)
    picture = [images(1, 80)[0].contiguous()]
    with torch.no_grad():
        (ours,), (theirs,) = fused(picture), eager(picture)
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-8, atol=1e-8)


def test_losses_of_a_detector_are_eagers() -> None:
    eager = detector().train().double()
    fused = fusedres.fuse(eager)
    picture, boxes = images(1, 80)[0].contiguous(), torch.tensor([[5.0, 5.0, 60.0, 70.0]], dtype=torch.float64)
    losses = []
    for net in (fused, eager):
        torch.manual_seed(0)  # the detector samples its proposals
        found = net([picture], [{"boxes": boxes, "labels": torch.tensor([1])}])
        sum(found.values()).backward()
        losses.append(found)
    assert list(losses[0]) == list(losses[1])
    for name, expected in losses[1].items():
        torch.testing.assert_close(losses[0][name], expected, rtol=1e-8, atol=1e-8)
    for (name, ours), theirs in zip(fused.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("name", TIMM_SHARES)
def test_timm_network_errs_no_more_than_eager_in_eval(name: str) -> None:
    assert_eval_accurate(timm_net, name, TIMM_SHARES[name])


@pytest.mark.parametrize("name", [name for name in TIMM_SHARES if "wide" not in name])
def test_training_step_of_a_timm_network_equals_eagers_in_float64(name: str) -> None:
    """Where gates make gradients a billion times smaller than weights, one float32 draw says little of either error."""
    eager = decide_relus(shake(copy.deepcopy(timm_net(name)))).double().train()
    x = images(4, 33)
    assert_steps_equal(step(as_maps(fusedres.fuse(eager)), x), step(as_maps(eager), x))

"""What timm asks of a network, against timm's own ResNets of the same weights; and the networks in its registry."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from networks import Twins, as_maps, images, shaken, small_twins
from oracles import assert_steps_equal, is_fused, step
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from timm.models import resnet as eager_resnet
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import fusedres
import fusedres.timm
from fusedres.backbone import IMAGENET_CFG
from fusedres.models import MODELS
from fusedres.resnet import VARIANTS

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

BLOCKS = {
    "basic": (fusedres.FusedBasicBlock, eager_resnet.BasicBlock),
    "bottleneck": (fusedres.FusedBottleneck, eager_resnet.Bottleneck),
}


@functools.cache
def _originals(kind: str) -> Twins:
    layers = [1, 1, 1, 1]
    fused, eager = BLOCKS[kind]
    return shaken(fusedres.ResNet(fused, layers, 10), eager_resnet.ResNet(eager, layers, 10), torch.float64)


def timm_twins(kind: str = "basic") -> Twins:
    """(fused, timm's) with one block a stage, shaken, in float64."""
    return copy.deepcopy(_originals(kind))


def cifar_net(**kwargs: Any) -> nn.Module:
    return fusedres.CifarResNet(1, **kwargs).double()


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert_steps_equal(*({str(i): t.detach() for i, t in enumerate(tensors)} for tensors in (ours, theirs)))


# --- features and head ---


@modes
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_and_head_are_timms(name: str, training: bool) -> None:
    results = []
    for net in shaken(getattr(fusedres, name)(), timm.create_model(name), torch.float64):
        features = net.train(training).forward_features(images())
        pooled = net.forward_head(features, pre_logits=True)
        results.append([features, pooled, net.forward_head(features), net(images()), *net.buffers()])
    assert_equal(*results)


@modes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": (3, 1, 1), "stop_early": True},
        {"indices": [0], "stop_early": True},
        {"intermediates_only": True},
    ],
    ids=str,
)
def test_intermediates_are_timms(options: dict[str, Any], training: bool) -> None:
    results = []
    for net in timm_twins():
        result = net.train(training).forward_intermediates(images(), **options)
        last, maps = ([], result) if options.get("intermediates_only") else ([result[0]], result[1])
        results.append([*last, *maps, *net.buffers()])
    assert_equal(*results)


@pytest.mark.parametrize("indices", [0, 5, -1, [4], [-5], []], ids=str)
def test_maps_that_are_not_there_are_refused(indices: Any) -> None:
    with pytest.raises(ValueError, match="there are 4 maps"):
        cifar_net().forward_intermediates(images(), indices)


def test_other_formats_of_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="NLC"):
        cifar_net().forward_intermediates(images(), output_fmt="NLC")


@pytest.mark.parametrize(
    "net",
    [
        lambda: small_twins("bottleneck")[0],
        lambda: small_twins("bottleneck", replace_stride_with_dilation=[False, True, True])[0],
        lambda: fusedres.plain18().double(),
        cifar_net,
        lambda: fusedres.cifar_plain20().double(),
    ],
    ids=["resnet", "dilated", "plain", "cifar", "cifar-plain"],
)
def test_feature_info_tells_the_shapes_of_the_maps(net: Any) -> None:
    net = net()
    _, maps = net.forward_intermediates(images(2, 64))
    shapes = [(info["num_chs"], 64 // info["reduction"]) for info in net.feature_info]
    assert shapes == [(m.shape[1], m.shape[2]) for m in maps]
    assert net.num_features == maps[-1].shape[1]
    assert all(isinstance(net.get_submodule(info["module"]), nn.Module) for info in net.feature_info)


def test_dropout_before_the_classifier_is_timms() -> None:
    results = []
    for net in timm_twins():
        net.drop_rate = 0.5
        torch.manual_seed(3)
        results.append([net.train()(images()), net.eval()(images())])
    assert_equal(*results)


# --- the classifier ---


@pytest.mark.parametrize("pool", [None, "avg", "max", ""])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_reset_classifier_is_timms(num_classes: int, pool: str | None) -> None:
    fused, eager = (net.eval() for net in timm_twins())
    for net in (fused, eager):
        assert net.get_classifier() is net.fc
        net.reset_classifier(num_classes, pool)
        assert (net.num_classes, net.fc.training) == (num_classes, False)
        assert net.num_features == eager.num_features
    assert fused.get_classifier(name_only=True) == eager.get_classifier(name_only=True) == "fc"
    fused.load_state_dict(eager.state_dict(), strict=True)
    if pool == "" and num_classes:
        features = images(2, 1)[:, :1].expand(-1, fused.num_features, 3, fused.num_features)
        assert_equal([fused.forward_head(features)], [eager.forward_head(features)])
    else:
        assert_equal([fused(images())], [eager(images())])


def test_new_classifier_has_the_old_ones_dtype_device_and_mode() -> None:
    net = fusedres.cifar_resnet20().to("meta", torch.bfloat16)
    for num_classes in (0, 7):  # from nothing, the rest of the network tells
        net.reset_classifier(num_classes)
    assert (net.fc.weight.shape, net.fc.weight.dtype, net.fc.weight.device.type) == ((7, 64), torch.bfloat16, "meta")
    assert net.fc.training
    net.fc.double()
    net.reset_classifier(5)
    assert net.fc.weight.dtype == torch.float64


def test_network_stays_in_channels_last_with_a_new_classifier() -> None:
    net = cifar_net().to(memory_format=torch.channels_last)
    net.reset_classifier(3)
    assert net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert net(images()).shape == (4, 3)


def test_unknown_pooling_is_refused_and_changes_nothing() -> None:
    net = cifar_net()
    fc = net.fc
    with pytest.raises(ValueError, match="catavgmax"):
        net.reset_classifier(3, "catavgmax")
    assert net.fc is fc
    assert net.num_classes == 10


def test_pooling_that_the_user_replaced_is_still_flattened() -> None:
    """torchvision's users set ``avgpool = nn.Identity()`` and give ``fc`` the whole map."""
    fused, eager = small_twins()
    for net in (fused, eager):
        torch.manual_seed(4)
        net.avgpool, net.fc = nn.Identity(), nn.Linear(512 * 4, 3, dtype=torch.float64)
    assert_equal([fused(images())], [eager(images())])


# --- checkpointing ---


def _partly_in_eval() -> nn.Module:
    net = cifar_net()
    net.layer2.eval()
    return net


CHECKPOINTED = {
    "basic": lambda: timm_twins("basic")[0],
    "bottleneck": lambda: timm_twins("bottleneck")[0],
    "recompute": lambda: cifar_net(memory="recompute"),
    "frozen": lambda: cifar_net(norm_layer=FrozenBatchNorm2d),
    "untracked": lambda: cifar_net(norm_layer=functools.partial(nn.BatchNorm2d, track_running_stats=False)),
    "averaging": lambda: cifar_net(norm_layer=functools.partial(nn.BatchNorm2d, momentum=None)),
    "partly-in-eval": _partly_in_eval,
    "plain": lambda: fusedres.cifar_plain20().double(),
}


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_step_is_the_same_bit_for_bit_with_checkpointing(kind: str, engine: str) -> None:
    """Output, gradients, running statistics and counters."""
    net = CHECKPOINTED[kind]()
    expected = step(as_maps(net), images())
    net.set_grad_checkpointing()
    for name, tensor in step(as_maps(net), images()).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("fails", [False, True])
def test_bn_tracks_statistics_again_after_backward(fails: bool) -> None:
    net = cifar_net()
    net.layer1[0].bn1.track_running_stats = False
    tracking = [getattr(module, "track_running_stats", None) for module in net.modules()]
    net.set_grad_checkpointing()
    loss = net(images()).sum()

    def fail(*_: Any) -> None:
        raise RuntimeError("not again")

    if fails:
        net.layer3[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="not again") if fails else nullcontext():
        loss.backward()
    assert [getattr(module, "track_running_stats", None) for module in net.modules()] == tracking


def test_checkpointing_runs_blocks_again_until_switched_off() -> None:
    net, calls = cifar_net(), []
    net.layer1[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable, expected in ((True, 2), (False, 1)):
        net.set_grad_checkpointing(enable)
        calls.clear()
        net(images()).sum().backward()
        assert len(calls) == expected


def test_stages_are_checkpointed_whatever_they_are() -> None:
    """A stage may have been replaced by a single module."""
    net = cifar_net()
    net.layer2, net.layer3 = nn.Sequential(), nn.Conv2d(16, 64, 1, dtype=torch.float64)
    results = []
    for enable in (False, True):
        twin = copy.deepcopy(net)
        twin.set_grad_checkpointing(enable)
        maps = twin.forward_intermediates(images(), intermediates_only=True)
        sum(m.square().mean() for m in maps).backward()
        gradients = [p.grad for p in twin.parameters() if p.grad is not None]
        results.append([*maps, *gradients, *twin.buffers()])
    assert_equal(*results)


def test_compiled_step_with_checkpointing_is_the_step_without() -> None:
    net, compiled = cifar_net(), cifar_net()
    compiled.load_state_dict(net.state_dict())
    compiled.set_grad_checkpointing()
    results = []
    for module, call in ((net, net), (compiled, torch.compile(compiled, backend="aot_eager", fullgraph=True))):
        y = call(images())
        y.square().mean().backward()
        results.append([y, *(p.grad for p in module.parameters()), *module.buffers()])
    assert_equal(*results)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_copies_keep_what_was_set(duplicate: Any) -> None:
    net = cifar_net()
    net.set_grad_checkpointing()
    net.reset_classifier(5, "max")
    twin = duplicate(net)
    assert (twin.grad_checkpointing, twin.num_classes, twin.feature_info) == (True, 5, net.feature_info)
    assert torch.equal(twin.eval()(images()), net.eval()(images()))


# --- the registry ---


def test_fusedres_does_not_import_timm() -> None:
    script = "import sys, fusedres; fusedres.cifar_resnet20(); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_every_network_is_registered() -> None:
    names = {f"fusedres_{name}" for name in MODELS}
    assert set(timm.list_models("fusedres_*")) == names
    assert all(callable(getattr(fusedres.timm, name)) for name in names)


@pytest.mark.parametrize("name", VARIANTS)
def test_timms_weights_fit_and_are_published_by_the_same_tags(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = (timm.create_model(prefix + name).state_dict() for prefix in ("fusedres_", ""))
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}
    tagged = timm.list_models(f"{name}.*", pretrained=True)
    assert timm.list_models(f"fusedres_{name}.*", pretrained=True) == [f"fusedres_{tag}" for tag in tagged] != []
    for tag in (name, *tagged):
        cfgs = [get_pretrained_cfg(prefix + tag).to_dict() for prefix in ("fusedres_", "")]
        assert cfgs[0].pop("architecture") == "fusedres_" + cfgs[1].pop("architecture")
        assert cfgs[0] == cfgs[1]


def test_created_network_has_the_options_asked_for() -> None:
    net = timm.create_model(
        "fusedres_resnet18", num_classes=10, in_chans=1, drop_rate=0.25, memory="recompute", dtype=torch.float64
    )
    assert type(net) is fusedres.ResNet
    assert net.train()(images()[:, :1]).shape == (4, 10)
    assert (net.drop_rate, net.layer1[0].memory, net.conv1.in_channels) == (0.25, "recompute", 1)
    headless = timm.create_model("fusedres_cifar_resnet20", num_classes=0, global_pool="")
    assert headless(images(dtype=torch.float32)).shape == (4, 64, 9, 9)


def test_weights_are_adapted_to_classes_and_channels_as_timm_does(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    options = {"pretrained": True, "num_classes": 3, "in_chans": 1}
    overlay = {"file": str(tmp_path / "weights.pth")}
    ours, theirs = (
        timm.create_model(name, pretrained_cfg_overlay=overlay, **options).state_dict()
        for name in ("fusedres_resnet18", "resnet18")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if not key.startswith("fc."))
    assert ours["fc.weight"].shape == (3, 512)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_features_only_is_timms(feature_cls: str) -> None:
    options = {"features_only": True, "feature_cls": feature_cls, "out_indices": (0, 2, 3)}
    ours, theirs = (timm.create_model(prefix + "resnet18", **options).double() for prefix in ("fusedres_", ""))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for method in ("channels", "reduction"):
        assert getattr(ours.feature_info, method)() == getattr(theirs.feature_info, method)()
    results = [net(images()) for net in (ours, theirs)]
    assert_equal(*(list(maps.values()) if isinstance(maps, dict) else maps for maps in results))
    assert_equal(list(ours.buffers()), list(theirs.buffers()))


@modes
def test_getter_of_features_runs_fused(training: bool) -> None:
    net = timm.create_model("fusedres_resnet18", features_only=True, feature_cls="getter").train(training)
    with torch.set_grad_enabled(training):
        assert is_fused(lambda: net(images(dtype=torch.float32)))


def test_features_only_of_small_networks_has_four_maps() -> None:
    net = timm.create_model("fusedres_cifar_plain20", features_only=True)
    assert [m.shape[1:] for m in net(images(side=32, dtype=torch.float32))] == [
        (16, 32, 32),
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
    ]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("indices", [[0], [1, 2], 1], ids=str)
def test_pruned_network_is_timms(indices: Any, kind: str) -> None:
    fused, eager = timm_twins(kind)
    taken = fused.prune_intermediate_layers(indices)
    assert taken == eager.prune_intermediate_layers(indices)
    assert fused.num_features == eager.num_features
    assert list(fused.state_dict()) == list(eager.state_dict())
    assert_equal(*([net(images()), *net.forward_intermediates(images(), taken)[1]] for net in (fused, eager)))


def test_images_are_prepared_as_for_torchvisions_weights() -> None:
    theirs = get_pretrained_cfg("resnet18.tv_in1k").to_dict()
    assert {key: theirs[key] for key in IMAGENET_CFG} == IMAGENET_CFG
    net = fusedres.plain18()
    assert net.default_cfg == net.pretrained_cfg == IMAGENET_CFG
    assert resolve_data_config(model=fusedres.cifar_resnet20())["input_size"] == (3, 32, 32)
    for network in (net, fusedres.cifar_resnet20()):
        assert isinstance(network.get_submodule(network.default_cfg["first_conv"]), nn.Conv2d)
        assert isinstance(network.get_submodule(network.default_cfg["classifier"]), nn.Linear)

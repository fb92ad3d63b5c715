"""What users do with a ResNet: take it apart, save, copy, freeze and adapt it; each case a fact that must hold."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
import torchvision
from networks import CHILDREN, SIDE, as_maps, assert_step_equal, decide_relus, images, shaken, small_twins
from oracles import assert_accurate, assert_steps_equal, is_fused, step, step_results
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import fusedres

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def batch_norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def buffers(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def assert_outputs_equal(ours: Tensor, theirs: Tensor) -> None:
    assert_steps_equal({"y": ours.detach()}, {"y": theirs.detach()})


# --- taken apart ---


def test_children_in_a_sequential_apply_the_stem_once() -> None:
    fused, eager = (net.eval() for net in small_twins())
    assert [name for name, _ in fused.named_children()] == CHILDREN
    x = images(1, 64)
    ours, theirs = (nn.Sequential(*list(net.children())[:-2])(x) for net in (fused, eager))
    assert ours.shape == (1, 512, 2, 2)
    assert_outputs_equal(ours, theirs)


@modes
def test_intermediate_layer_getter_finds_torchvisions_features(training: bool) -> None:
    layers = {"layer1": "a", "layer4": "b"}
    ours, theirs = (IntermediateLayerGetter(net.train(training), layers)(images()) for net in small_twins())
    assert list(ours) == list(theirs) == ["a", "b"]
    for name, feature in theirs.items():
        assert_outputs_equal(ours[name], feature)


@modes
@pytest.mark.parametrize("nodes", [["layer3"], ["relu", "maxpool", "layer2.0.relu", "layer4.0.relu_1", "fc"]], ids=str)
def test_feature_extractor_finds_torchvisions_nodes(nodes: list[str], training: bool) -> None:
    ours, theirs = (create_feature_extractor(net.train(training), nodes)(images()) for net in small_twins())
    assert list(ours) == list(theirs) == nodes
    for name, feature in theirs.items():
        assert_outputs_equal(ours[name], feature)


def test_stem_and_head_may_be_replaced() -> None:
    """The usual change for small images: a 3x3 stem without pooling, another classifier."""
    fused, eager = small_twins()
    for net in (fused, eager):
        torch.manual_seed(5)
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=True, dtype=torch.float64)
        net.maxpool = nn.Identity()
        net.fc = nn.Linear(512, 3, dtype=torch.float64)
    assert_step_equal(fused, eager, images(side=17))


@pytest.mark.parametrize("target", ["relu", "maxpool", "bn1", "layer2.0.bn1", "layer3.0", "layer4"])
def test_hooks_see_what_they_see_in_torchvision(target: str) -> None:
    seen: list[Tensor] = []
    for net in small_twins():
        net.eval().get_submodule(target).register_forward_hook(lambda _, args, output: seen.append(output.clone()))
        net(images())
    ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert_outputs_equal(a, b)


# --- saved and copied ---


def test_missing_and_unexpected_keys_are_never_loaded_quietly() -> None:
    fused, _ = small_twins()
    state = fused.state_dict()
    state["extra.bias"] = state.pop("layer1.0.bn1.bias")
    with pytest.raises(RuntimeError, match=r"layer1\.0\.bn1\.bias"):
        fused.load_state_dict(state, strict=True)
    missing, unexpected = fused.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["layer1.0.bn1.bias"], ["extra.bias"])


def test_output_is_the_same_after_a_round_trip_through_torchvision() -> None:
    fused, eager = (net.eval() for net in small_twins())
    expected = fused(images())
    eager.load_state_dict(fused.state_dict(), strict=True)
    for parameter in fused.parameters():
        nn.init.zeros_(parameter)
    fused.load_state_dict(eager.state_dict(), strict=True)
    assert torch.equal(fused(images()), expected)


def _through_a_file(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _through_a_file])
def test_copy_after_a_forward_shares_nothing_with_the_original(duplicate: object) -> None:
    assert callable(duplicate)
    fused, _ = small_twins(dtype=torch.float32)
    x = images(dtype=torch.float32)
    fused.eval()(x)
    fused.train()(x)  # a graph hangs in the air, as in BYOL
    twin = duplicate(fused)
    fused.eval(), twin.eval()
    assert len(list(twin.parameters())) == len(list(fused.parameters()))
    assert len(list(twin.buffers())) == len(list(fused.buffers()))
    with torch.no_grad():
        before = fused(x)
        assert torch.equal(twin(x), before)
        twin.conv1.weight.data.mul_(2)
        assert not torch.equal(twin(x), before)
        assert torch.equal(fused(x), before)


# --- BN as each model has it ---


@modes
@pytest.mark.parametrize("eps", [None, 0.0])
def test_frozen_batch_norm_never_trains(eps: float | None, training: bool) -> None:
    norm_layer = FrozenBatchNorm2d if eps is None else functools.partial(FrozenBatchNorm2d, eps=eps)
    fused, eager = (net.train(training) for net in small_twins(norm_layer=norm_layer))
    before = buffers(fused)
    assert_step_equal(fused, eager, images())
    fused(images()).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in fused.named_buffers())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in eager.named_parameters()]


def test_running_variance_is_unbiased_in_every_layer() -> None:
    """32x32 images leave 1x1 maps in layer4: four values per channel, where a biased update is off by 4/3."""
    fused, eager = small_twins()
    for net in (fused, eager):
        for bn in batch_norms(net):
            bn.momentum = 1.0
        net(images(side=32))
    assert_steps_equal(buffers(fused), buffers(eager))
    assert {bn.num_batches_tracked.item() for bn in batch_norms(fused)} == {1}


def test_momentum_none_averages_over_all_batches_until_reset() -> None:
    fused, _ = small_twins()
    for bn in batch_norms(fused):
        bn.momentum = None
        bn.reset_running_stats()
    batches = [images(seed=seed) + seed for seed in range(3)]
    moments = [torch.var_mean(fused.conv1(x), dim=(0, 2, 3)) for x in batches]
    for x in batches:
        fused(x)
    var, mean = (torch.stack(column).mean(0) for column in zip(*moments, strict=True))
    assert_outputs_equal(fused.bn1.running_mean, mean)
    assert_outputs_equal(fused.bn1.running_var, var)
    assert fused.bn1.num_batches_tracked == 3
    for bn in batch_norms(fused):
        bn.reset_running_stats()
    fused(batches[2])
    assert_outputs_equal(fused.bn1.running_mean, moments[2][1])
    assert_outputs_equal(fused.bn1.running_var, moments[2][0])


def test_gradients_in_eval_treat_statistics_as_constants() -> None:
    fused, eager = (net.eval() for net in small_twins())
    before = buffers(fused)
    assert_step_equal(fused, eager, images())
    gradients = []
    for n in (4, 1):
        x = images()[:n].requires_grad_()
        fused(x).square().sum().backward()
        gradients.append(x.grad[0])
    assert_outputs_equal(*gradients)
    assert all(torch.equal(buffer, before[name]) for name, buffer in fused.named_buffers())


def test_error_of_gradients_in_eval_is_at_most_twice_eagers() -> None:
    fused, eager = shaken(fusedres.resnet18(), torchvision.models.resnet18())
    fused, eager = (as_maps(decide_relus(net.eval())) for net in (fused, eager))
    assert_accurate(step_results(fused, eager, images(dtype=torch.float32)))


def test_one_value_per_channel_is_refused_and_leaves_the_model_alive() -> None:
    """The layers before have counted the batch, as in eager; the BN that refuses it has not, which eager's has."""
    fused, eager = small_twins()
    for net in (fused, eager):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            net(images(1, 32))
    assert all(buffer.isfinite().all() for buffer in fused.buffers())
    assert fused.layer4[0].bn1.num_batches_tracked == 0
    eager.layer4[0].bn1.num_batches_tracked.zero_()
    assert_steps_equal(buffers(fused), buffers(eager))
    assert_step_equal(fused, eager, images(1, 64))


# --- how it runs ---


@modes
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_whole_network_runs_fused(kind: str, training: bool) -> None:
    fused, _ = small_twins(kind, torch.float32)
    fused.train(training)
    assert [row.kind for row in fusedres.explain(fused) if row.engine == "eager"] == ["ResNet: head"]
    with torch.set_grad_enabled(training):
        assert is_fused(lambda: fused(images(dtype=torch.float32)))


def test_gradients_are_the_same_bit_for_bit_from_run_to_run() -> None:
    fused, _ = small_twins("bottleneck", torch.float32)
    first, second = (step(as_maps(fused), images(2, SIDE, torch.float32)) for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

"""Field cases of conversion: what a fused model shares, keeps and hands on is what the eager model does."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from field_nets import EAGER, Place, assert_near, eager_net, resnet18, same_bits, saved, small_net
from oracles import batch, block_twins, shake
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck
from fusedres.functional import conv_bn_relu

NAMES = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]


class TwoPaths(nn.Module):
    """One conv on two paths, normalised on one of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(self.conv(x)), self.conv(y)


class FusedTwoPaths(TwoPaths):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return conv_bn_relu(x, self.conv, self.bn, relu=False), self.conv(y)


class SharedConv(nn.Module):
    """A block whose first conv is used by a second branch too."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.branch = block.conv1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(x), self.branch(x)


@pytest.mark.case("F01")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_conv_of_two_paths_is_normalised_on_one_of_them_alone(training: bool, place: Place) -> None:
    eager = shake(TwoPaths()).train(training)
    fused = FusedTwoPaths().train(training)
    fused.load_state_dict(eager.state_dict())
    fused, eager = place.put(fused, eager)
    x, y = place.put(batch(2, 4, 5, 6), batch(2, 4, 5, 6, seed=2))
    weight = fused.conv.weight.detach().clone()
    for _ in range(2):  # the second call finds what the first one folded
        with torch.no_grad():
            for ours, theirs in zip(fused(x, y), eager(x, y), strict=True):
                assert_near(ours, theirs, place.tolerance)
    assert torch.equal(fused.conv.weight, weight)


@pytest.mark.case("F01")
@pytest.mark.parametrize("kind", [FusedBasicBlock, FusedBottleneck])
def test_conv_shared_with_a_second_branch_is_left_as_it_was(kind: type[nn.Module], place: Place) -> None:
    fused, eager = (SharedConv(block).eval() for block in block_twins(kind, 8, 8 // kind.expansion))
    fused, eager = place.put(fused, eager)
    x = place.put(batch(2, 8, 5, 6))
    before = saved(fused)
    for _ in range(2):
        with torch.no_grad():
            for ours, theirs in zip(fused(x), eager(x), strict=True):
                assert_near(ours, theirs, place.tolerance)
    assert same_bits(fused, before)


class BNAct(nn.BatchNorm2d):
    """A BN with an activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.case("F07")
@pytest.mark.parametrize("where", ["bn1", "bn2", "bn3"])
def test_activation_inside_a_batch_norm_subclass_is_kept(where: str, place: Place) -> None:
    fused, eager = block_twins(FusedBottleneck, 8, 2)
    for block in (fused, eager):
        norm = BNAct(getattr(block, where).num_features)
        norm.load_state_dict(getattr(block, where).state_dict())
        setattr(block, where, norm)
    fused, eager = place.put(fused.eval(), eager.eval())
    x = place.put(batch(2, 8, 5, 6))
    with torch.no_grad():
        assert_near(fused(x), eager(x), place.tolerance)


@pytest.mark.case("F07")
def test_all_batch_norms_are_found_by_the_conversion_to_sync_batch_norm(drop_in: Callable) -> None:
    eager = eager_net(resnet18).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(drop_in(resnet18, eager))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 20
    x = batch(2, 3, 64, 64)
    with torch.no_grad():
        assert_near(converted(x), eager(x), 1e-4)


@pytest.mark.case("F10")
def test_children_and_features_are_those_of_torchvision(drop_in: Callable, place: Place) -> None:
    eager = eager_net(resnet18).eval()
    fused = drop_in(resnet18, eager).to(place.device).eval()
    eager.to(place.device)
    assert [name for name, _ in fused.named_children()] == NAMES
    x = batch(1, 3, 64, 64).to(place.device)
    with torch.no_grad():
        ours, theirs = (nn.Sequential(*list(model.children())[:-2])(x) for model in (fused, eager))
        assert ours.shape == (1, 512, 2, 2)
        assert_near(ours, theirs, 1e-4)
        for extract in (
            lambda model: IntermediateLayerGetter(model, {"layer1": "a", "layer4": "b"}),
            lambda model: create_feature_extractor(model, ["layer3"]),
        ):
            ours, theirs = extract(fused)(x), extract(eager)(x)
            assert list(ours) == list(theirs)
            for name, feature in theirs.items():
                assert_near(ours[name], feature, 1e-4, name)


@pytest.mark.case("F11")
@pytest.mark.parametrize("finish", [lambda model: model, fusedres.freeze], ids=["trainable", "frozen"])
def test_state_dicts_load_strictly_both_ways_with_equal_outputs(finish: Callable, drop_in: Callable) -> None:
    eager = eager_net(resnet18).eval()
    fused = finish(drop_in(resnet18, eager)).eval()
    x = batch(2, 3, 64, 64)
    with torch.no_grad():
        fused(x)  # whatever is folded now must not show in the state
    theirs, ours = eager.state_dict(), fused.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [(k, v.shape, v.dtype) for k, v in theirs.items()]
    other = shake(EAGER.resnet18(), seed=3).eval()
    fused.load_state_dict(other.state_dict(), strict=True)
    with torch.no_grad():
        assert_near(fused(x), other(x), 1e-4)
    eager.load_state_dict(fused.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(eager(x), other(x))


@pytest.mark.case("F11")
def test_missing_keys_raise_or_are_returned(drop_in: Callable) -> None:
    eager = eager_net(small_net)
    fused = drop_in(small_net, eager)
    state = eager.state_dict()
    for key in ("bn1.num_batches_tracked", "layer2.0.conv1.weight"):
        part = {name: tensor for name, tensor in state.items() if name != key}
        if "num_batches" not in key:  # torch fills in a counter that an old checkpoint lacks
            with pytest.raises(RuntimeError, match=key):
                fused.load_state_dict(part)
            assert fused.load_state_dict(part, strict=False).missing_keys == [key]
        assert fused.load_state_dict({**state, "extra.bias": torch.zeros(1)}, strict=False).unexpected_keys == [
            "extra.bias"
        ]


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.case("F13")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file], ids=["deepcopy", "file"])
def test_copy_between_forward_and_backward_is_whole_and_apart(
    duplicate: Callable, drop_in: Callable, place: Place
) -> None:
    fused = drop_in(small_net, eager_net(small_net)).to(place.device).train()
    x = batch(2, 3, 64, 64).to(place.device)
    y = fused(x)
    twin = duplicate(fused)
    y.sum().backward()
    for count in (nn.Module.parameters, nn.Module.buffers):
        assert len(list(count(twin))) == len(list(count(fused)))
    fused.eval()
    twin.eval()
    with torch.no_grad():
        before = fused(x)
        assert torch.equal(twin(x), before)
        twin.conv1.weight.data.mul_(2)
        assert torch.equal(fused(x), before)
        assert not torch.allclose(twin(x), before)


@pytest.mark.case("F13")
def test_moving_average_follows_without_touching_the_model(drop_in: Callable) -> None:
    fused = drop_in(small_net, eager_net(small_net)).eval()
    average = torch.optim.swa_utils.AveragedModel(fused, use_buffers=True)
    x = batch(2, 3, 64, 64)
    with torch.no_grad():
        first = fused(x)
        average.update_parameters(fused)
        for parameter in fused.parameters():
            parameter.mul_(1.5)
        average.update_parameters(fused)
        expected = copy.deepcopy(average.module).eval()(x)
        assert not torch.allclose(fused(x), first)
        assert_near(average.eval()(x), expected, 1e-6)
        halfway = copy.deepcopy(average.module)
        for mine, theirs in zip(halfway.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs * (1.25 / 1.5), rtol=1e-5, atol=1e-7)


WITHOUT_STATISTICS = partial(resnet18, norm_layer=partial(nn.BatchNorm2d, track_running_stats=False))


@pytest.mark.case("F02")
def test_batch_norm_without_running_statistics_uses_the_batch_in_eval(drop_in: Callable, place: Place) -> None:
    eager = eager_net(WITHOUT_STATISTICS).eval()
    fused = drop_in(WITHOUT_STATISTICS, eager).eval()
    fused, eager = place.put(fused, eager)
    x = place.put(batch(4, 3, 64, 64))
    with torch.no_grad():
        y = fused(x)
        assert_near(y, eager(x), place.tolerance)
        x[1:] = x[1:].flip(0) * 3
        assert_near(fused(x), eager(x), place.tolerance)
        assert not torch.allclose(fused(x)[0], y[0], rtol=1e-3)  # sample 0 sees the other samples

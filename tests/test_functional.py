"""The functions under the modules: any conv and BN, the stem, special values, and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    EAGER_BLOCKS,
    assert_accurate,
    assert_steps_equal,
    batch,
    block_twins,
    is_fused,
    ops_called,
    shake,
    step,
    step_results,
)
from torch import Tensor, nn

from fusedres import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU, functional

pytestmark = pytest.mark.usefixtures("one_thread")

double = torch.float64
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
kinds = pytest.mark.parametrize("kind", [FusedBasicBlock, FusedBottleneck])


class Stem(nn.Module):
    """conv1 bn1 relu maxpool, fused or one by one."""

    def __init__(self, conv: nn.Module, pool: nn.Module, fused: bool) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = conv, nn.BatchNorm2d(8), nn.ReLU(inplace=True), pool
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return functional.stem(x, self.conv1, self.bn1, self.relu, self.maxpool)
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


def stem_twins(pool: nn.Module | None = None, **conv: object) -> tuple[nn.Module, nn.Module]:
    arguments = {"kernel_size": 7, "stride": 2, "padding": 3, "bias": False, **conv}
    stem = shake(Stem(nn.Conv2d(3, 8, **arguments), pool or nn.MaxPool2d(3, 2, 1), True))
    eager = copy.deepcopy(stem)
    eager.fused = False
    return stem, eager


@modes
@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d((3, 2)), nn.Identity()],
    ids=str,
)
def test_stem_equals_its_modules(pool: nn.Module, training: bool, engine: str) -> None:
    stem, eager = (m.double().train(training) for m in stem_twins(pool))
    for size in ((2, 3, 21, 18), (1, 3, 16, 16)):
        x = batch(*size, dtype=double)
        assert_steps_equal(step(stem, x), step(eager, x))
        with torch.no_grad():
            torch.testing.assert_close(stem(x), eager(x), rtol=1e-10, atol=1e-10)
    assert_steps_equal(dict(stem.named_buffers()), dict(eager.named_buffers()))


@modes
def test_stem_error_is_at_most_twice_eagers(training: bool, engine: str) -> None:
    stem, eager = (m.train(training) for m in stem_twins(bias=True))
    assert_accurate(*(step_results(stem, eager, batch(4, 3, 33, 30, seed=i)) for i in range(5)))


def test_stem_trains_in_one_op_behind_its_conv(engine: str) -> None:
    stem, x = stem_twins()[0], batch(2, 3, 32, 32)
    calls = ops_called(lambda: stem(x))
    assert calls["fusedres::bn_relu_maxpool"] == calls["fusedres::conv_fprop"] == 1
    assert calls["aten::max_pool2d_with_indices"] == 0


def test_stem_keeps_its_conv_output_alone(engine: str) -> None:
    """x, z, the taps in eight bits and vectors; neither the normalised nor the activated map, nor a weight in vain."""
    stem, x = stem_twins()[0], batch(2, 3, 32, 32)
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = stem(x)
    kept = sorted((t.shape[2:], t.dtype) for t in saved.values() if t.dim() == 4)
    assert kept == sorted([((16, 16), x.dtype), ((8, 8), torch.uint8), ((32, 32), x.dtype)], key=lambda k: k[0])
    assert y.requires_grad


@modes
def test_stem_with_a_hook_runs_its_modules(training: bool, engine: str) -> None:
    stem, x = stem_twins()[0].train(training), batch(2, 3, 32, 32)
    seen = []
    stem.relu.register_forward_hook(lambda *_: seen.append(1))
    stem(x)
    assert seen == [1]
    stem.maxpool.register_forward_hook(lambda *_: seen.append(2))
    stem(x)
    assert seen == [1, 1, 2]


@modes
@pytest.mark.parametrize("ending", [True, False, nn.ReLU(), nn.ReLU(inplace=True), nn.GELU()], ids=str)
def test_conv_bn_relu_ends_as_it_is_told(ending: bool | nn.Module, training: bool, engine: str) -> None:
    conv, bn = nn.Conv2d(6, 8, 3, padding=1).double(), shake(nn.BatchNorm2d(8)).double().train(training)
    x = batch(2, 6, 5, 7, dtype=double)
    with torch.no_grad():
        z = copy.deepcopy(bn)(conv(x))
        expected = z if ending is False else F.relu(z) if ending is True else ending(z)
        torch.testing.assert_close(functional.conv_bn_relu(x, conv, bn, ending), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ending", [True, False])
def test_conv_bn_relu_falls_back_to_the_same_ending(ending: bool, engine: str) -> None:
    conv, norm, x = nn.Conv2d(6, 8, 3, padding=1), nn.GroupNorm(2, 8), batch(2, 6, 5, 7)
    z = norm(conv(x))
    assert torch.equal(functional.conv_bn_relu(x, conv, norm, ending), F.relu(z) if ending else z)


ENDINGS: dict[str, Callable[[FusedConvBNReLU], object]] = {
    "another activation": lambda layer: setattr(layer, "relu", nn.SiLU()),
    "none": lambda layer: setattr(layer, "relu", nn.Identity()),
    "a hook on the ReLU": lambda layer: layer.relu.register_forward_hook(lambda *call: 2 * call[2]),
}


@modes
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("ending", ENDINGS)
def test_layer_ends_in_the_module_that_is_there(ending: str, relu: bool, training: bool, engine: str) -> None:
    layer = shake(FusedConvBNReLU(4, 4, relu=relu)).double().train(training)
    layer(batch(2, 4, 5, 6, dtype=double))
    ENDINGS[ending](layer)
    eager = nn.Sequential(OrderedDict(copy.deepcopy(layer).named_children()))
    assert_steps_equal(step(layer, batch(2, 4, 5, 6, dtype=double)), step(eager, batch(2, 4, 5, 6, dtype=double)))
    with torch.no_grad():
        torch.testing.assert_close(layer(batch(2, 4, 5, 6, dtype=double)), eager(batch(2, 4, 5, 6, dtype=double)))


@modes
def test_nan_reaches_the_gradient_of_a_bias_that_the_norm_absorbs(training: bool, engine: str) -> None:
    layer = FusedConvBNReLU(4, 4, bias=True).train(training)
    x = batch(2, 4, 5, 6)
    layer(x).sum().backward()
    assert layer.conv.bias.grad.isfinite().all()
    assert not training or not layer.conv.bias.grad.any()
    x[0, 0, 2, 2] = torch.nan
    layer.zero_grad()
    layer(x).sum().backward()
    assert bool(layer.conv.bias.grad.isnan().all()) == training


@modes
@kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_nan_and_infinity_pass_as_in_eager(
    kind: type[nn.Module], value: float, dtype: torch.dtype, training: bool, grad: bool, engine: str
) -> None:
    fused, eager = (m.to(dtype).train(training) for m in block_twins(kind, 16, 16 // kind.expansion))
    x = torch.randn(1, 16, 5, 5).to(dtype)
    with torch.set_grad_enabled(grad):
        fused(x)  # whatever is remembered of finite inputs must not matter
        x[0, 0, 2, 2] = value
        ours, theirs = fused(x), copy.deepcopy(eager)(x)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours == torch.inf, theirs == torch.inf)
    if not training:
        assert 0 < ours.isfinite().sum() < ours.numel() or kind is FusedBasicBlock
    if value != value and kind is FusedBottleneck:
        assert ours.isnan().sum() == (400 if training else 144)


@kinds
def test_nan_in_the_output_passes_the_gradient_as_in_eager(kind: type[nn.Module], engine: str) -> None:
    fused, eager = (m.double().eval() for m in block_twins(kind, 16, 16 // kind.expansion))
    x = torch.randn(1, 16, 5, 5, dtype=double)
    x[0, 0, 2, 2] = torch.nan
    ours, theirs = step(fused, x), step(eager, x)
    for name, expected in theirs.items():
        assert torch.equal(ours[name].isnan(), expected.isnan()), name
    torch.testing.assert_close(ours["x.grad"], theirs["x.grad"], rtol=1e-9, atol=1e-9, equal_nan=True)


@modes
def test_nan_wins_the_stems_pool(training: bool, engine: str) -> None:
    stem, eager = (m.train(training) for m in stem_twins())
    x = batch(2, 3, 32, 32)
    x[1, 2, 10, 20] = torch.nan
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(stem(x).isnan(), eager(x).isnan())


@pytest.mark.parametrize("large", [1e30, 3e38])
def test_overflow_inside_a_block_is_eagers(large: float, engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(FusedBottleneck, 16, 4))
    x = batch(2, 16, 5, 5) * large
    with torch.no_grad():
        ours, theirs = fused(x), eager(x)
    assert not ours.isnan().any() or theirs.isnan().any()
    assert torch.equal(fused(batch(2, 16, 5, 5)).isfinite(), torch.ones(2, 16, 5, 5, dtype=torch.bool))


#: Bad calls of a block in training -> what is raised; eager raises for every one of them.
def _wrong_channels(block: nn.Module) -> Tensor:
    return block(batch(2, 6, 5, 5))


def _three_dimensions(block: nn.Module) -> Tensor:
    return block(torch.randn(8, 5, 5))


def _integers(block: nn.Module) -> Tensor:
    return block(torch.ones(2, 8, 5, 5, dtype=torch.int64))


def _other_dtype(block: nn.Module) -> Tensor:
    return block(batch(2, 8, 5, 5, dtype=double))


def _empty_running_mean(block: nn.Module) -> Tensor:
    block.bn2.running_mean = torch.zeros(0)
    return block(batch(2, 8, 5, 5))


def _long_running_variance(block: nn.Module) -> Tensor:
    block.bn1.running_var = torch.ones(99)
    return block(batch(2, 8, 5, 5))


def _short_bn_weight(block: nn.Module) -> Tensor:
    block.bn2.weight = nn.Parameter(torch.ones(1))
    return block(batch(2, 8, 5, 5))


def _short_conv_bias(block: nn.Module) -> Tensor:
    block.conv2.bias = nn.Parameter(torch.ones(3))
    return block(batch(2, 8, 5, 5))


def _weight_of_other_channels(block: nn.Module) -> Tensor:
    block.conv2.weight = nn.Parameter(torch.ones(2, 3, 3, 3))
    return block(batch(2, 8, 5, 5))


def _groups_that_do_not_divide(block: nn.Module) -> Tensor:
    block.conv1 = nn.Conv2d(8, 6, 3, padding=1)
    block.conv1.groups, block.conv1.weight = 4, nn.Parameter(torch.ones(6, 2, 3, 3))
    block.bn1, block.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, block.conv2.out_channels, 3, padding=1)
    return block(batch(2, 8, 6, 6))


def _shortcut_of_other_shape(block: nn.Module) -> Tensor:
    block.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Identity())
    return block(batch(2, 8, 6, 6))


def _projection_of_other_shape(block: nn.Module) -> Tensor:
    block.downsample = nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8))
    return block(batch(2, 8, 6, 6))


def _map_smaller_than_the_kernel(block: nn.Module) -> Tensor:
    block.conv2.kernel_size, block.conv2.padding = (3, 3), (0, 0)
    block.conv2.weight = nn.Parameter(torch.ones(block.conv2.out_channels, block.conv2.in_channels, 3, 3))
    return block(batch(2, 8, 2, 2))


def _meta_input(block: nn.Module) -> Tensor:
    return block(torch.empty(2, 8, 5, 5, device="meta"))


def _none(block: nn.Module) -> Tensor:
    return block(None)


def _sparse(block: nn.Module) -> Tensor:
    return block(torch.randn(2, 8, 5, 5).to_sparse())


BAD_CALLS = [
    *[_wrong_channels, _three_dimensions, _integers, _other_dtype, _empty_running_mean, _long_running_variance],
    *[_short_bn_weight, _short_conv_bias, _weight_of_other_channels, _shortcut_of_other_shape, _none, _sparse],
    *[_projection_of_other_shape, _map_smaller_than_the_kernel, _meta_input, _groups_that_do_not_divide],
]


@kinds
@modes
@pytest.mark.parametrize("bad_call", BAD_CALLS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_bad_arguments_raise_before_any_statistics_move(
    kind: type[nn.Module], bad_call: object, training: bool, grad: bool, engine: str
) -> None:
    block = kind(8, 8 // kind.expansion).train(training)
    tracked = {name: b.clone() for name, b in block.named_buffers()}
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError, TypeError)):
        bad_call(block)
    for name, b in block.named_buffers():
        assert name not in tracked or b.shape != tracked[name].shape or torch.equal(b, tracked[name]), name


def test_no_bad_argument_ends_the_process() -> None:
    """All of the above in a process of its own, whose exit is no signal."""
    code = """
import test_functional as t
for kind in (t.FusedBasicBlock, t.FusedBottleneck):
    for training in (True, False):
        for bad_call in t.BAD_CALLS:
            try:
                bad_call(kind(8, 8 // kind.expansion).train(training))
            except (ValueError, RuntimeError, TypeError):
                continue
            raise SystemExit(f"{bad_call.__name__} was accepted")
print("all refused")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "all refused\n"), result.stderr


@kinds
def test_messages_name_shapes_and_dtypes(kind: type[nn.Module], engine: str) -> None:
    block = kind(8, 8 // kind.expansion)
    with pytest.raises(ValueError, match=r"expected 8 channels .* got \(2, 6, 5, 5\)"):
        _wrong_channels(block)
    with pytest.raises(RuntimeError, match=r"torch.float64, the weight torch.float32"):
        _other_dtype(block)
    with pytest.raises(RuntimeError, match=r"BN running_mean has shape \(0,\), expected \(\d,\)"):
        _empty_running_mean(kind(8, 8 // kind.expansion))
    with pytest.raises(RuntimeError, match="the input is on meta, the weight on cpu"):
        _meta_input(kind(8, 8 // kind.expansion))


@modes
@kinds
def test_empty_batch_equals_eager(kind: type[nn.Module], training: bool, engine: str) -> None:
    fused, eager = (m.train(training) for m in block_twins(kind, 8, 8 // kind.expansion))
    outcomes = []
    for module in (fused, eager):
        try:
            outcomes.append(module(torch.zeros(0, 8, 5, 5)).shape)
        except (ValueError, RuntimeError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


@kinds
@modes
def test_meta_device_gives_shapes(kind: type[nn.Module], training: bool) -> None:
    block = block_twins(kind, 8, 8, 2)[0].to("meta").train(training)
    y = block(torch.empty(2, 8, 6, 5, device="meta"))
    assert (y.shape, y.device.type) == ((2, 8 * kind.expansion, 3, 3), "meta")
    y.sum().backward()
    with torch.no_grad():
        assert block(torch.empty(2, 8, 6, 5, device="meta")).shape == y.shape


@modes
@pytest.mark.parametrize(
    "geometry", [{"stride": 3}, {"dilation": (1, 2)}, {"padding": "same"}, {"padding": "valid"}], ids=str
)
def test_conv_geometries_beyond_resnets(geometry: dict, training: bool, engine: str) -> None:
    def changed(block: nn.Module) -> nn.Module:
        padding = {"padding": 1, **geometry}
        block.conv1 = nn.Conv2d(6, 8, (3, 5), **padding)
        block.downsample = nn.Sequential(nn.Conv2d(6, 8, (3, 5), **padding), nn.BatchNorm2d(8))
        return block.double().train(training)

    fused = changed(FusedBasicBlock(6, 8))
    eager = changed(EAGER_BLOCKS[FusedBasicBlock](6, 8))
    eager.load_state_dict(fused.state_dict())
    x = batch(2, 6, 9, 11, dtype=double)
    assert is_fused(lambda: copy.deepcopy(fused)(x))
    assert_steps_equal(step(fused, x), step(eager, x))


def test_functional_call_and_func_grad_work_as_in_eager(engine: str) -> None:
    fused, eager = (m.double().eval() for m in block_twins(FusedBottleneck, 8, 4, 2))
    x = batch(2, 8, 6, 5, dtype=double)

    def loss(module: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    results = []
    for module in (fused, eager):
        parameters = {n: 2 * p.detach() for n, p in module.named_parameters()}
        results.append(torch.func.grad(partial(loss, module))(parameters))
    assert_steps_equal(*results)

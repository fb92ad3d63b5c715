"""Folded weights follow every change of what they came from, and travel with nothing."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from oracles import assert_accurate, batch, block_twins, needs_native, ops_called, output_results, shake
from torch import Tensor, nn

from fusedres import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU, folding, recall

pytestmark = pytest.mark.usefixtures("one_thread")


def optimizer_step(block: nn.Module) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5, momentum=0.9)
    with torch.enable_grad():
        block(batch(2, 8, 6, 5, seed=7)).square().mean().backward()
    optimizer.step()


def train_step_without_gradients(block: nn.Module) -> None:
    block.train()(batch(2, 8, 6, 5, seed=7))
    block.eval()


def set_single_entry(block: nn.Module) -> None:
    block.conv2.weight.data[1, 2, 1, 1] += 3


def set_through_numpy(block: nn.Module) -> None:
    block.conv1.weight.detach().numpy()[0, 0] = 2


def set_transposed_view(block: nn.Module) -> None:
    """The same bytes at the same address, read in another order."""
    block.conv2.weight.data = block.conv2.weight.data.transpose(0, 1)


def exchange_rows(block: nn.Module) -> None:
    """The same values in other places."""
    block.bn2.weight.data.copy_(block.bn2.weight.data.flip(0))


def exchange_vectors(block: nn.Module) -> None:
    block.bn2.weight.data, block.bn2.bias.data = block.bn2.bias.data, block.bn2.weight.data


def dilate(block: nn.Module) -> None:
    block.conv2.padding = block.conv2.dilation = (2, 2)


def double(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.mul_(2)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight in place": lambda b: b.conv1.weight.mul_(1.5),
    "last weight in place": lambda b: b.bn2.weight.mul_(-1.5),
    "projection in place": lambda b: b.downsample[0].weight.add_(0.3),
    "whole tensor through .data": lambda b: b.conv2.weight.data.mul_(2),
    "one entry through .data": set_single_entry,
    "one bit through .data": lambda b: b.bn1.bias.data.view(torch.int32).bitwise_xor_(1 << 22),
    ".data replaced": lambda b: setattr(b.conv1.weight, "data", 2 * b.conv1.weight.data),
    "numpy": set_through_numpy,
    "transposed view": set_transposed_view,
    "rows exchanged": exchange_rows,
    "vectors exchanged": exchange_vectors,
    "parameter replaced": lambda b: setattr(b.conv1, "weight", nn.Parameter(torch.ones_like(b.conv1.weight) / 9)),
    "sliced parameter": lambda b: setattr(b.conv2, "weight", nn.Parameter(torch.randn(12, 24, 3, 3)[:, ::2])),
    "running mean": lambda b: b.bn2.running_mean.add_(1),
    "running variance through .data": lambda b: b.downsample[1].running_var.data.mul_(3),
    "buffer replaced": lambda b: setattr(b.bn1, "running_var", torch.full_like(b.bn1.running_var, 2.0)),
    "statistics reset": lambda b: b.bn1.reset_running_stats(),
    "state dict": lambda b: b.load_state_dict({k: v * 2 for k, v in b.state_dict().items()}),
    "state dict assigned": lambda b: b.load_state_dict({k: v * 2 for k, v in b.state_dict().items()}, assign=True),
    "optimizer": optimizer_step,
    "training": train_step_without_gradients,
    "eps": lambda b: setattr(b.bn1, "eps", 0.5),
    "dilation": dilate,
    "bias added": lambda b: setattr(b.conv1, "bias", nn.Parameter(torch.ones(12))),
    "channels_last": lambda b: b.to(memory_format=torch.channels_last),
    "hook": lambda b: b.bn1.register_forward_hook(lambda _, __, y: 2 * y),
    "another activation": lambda b: setattr(b, "relu", nn.LeakyReLU(0.5)),
    "another projection": lambda b: setattr(b, "downsample", copy.deepcopy(b.downsample).apply(double)),
    "projection with a hook": lambda b: b.downsample[1].register_forward_hook(lambda _, __, y: 2 * y),
    "a forward of its own": lambda b: setattr(b.bn2, "forward", torch.zeros_like),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_folded_weights_follow(change: str, engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(FusedBasicBlock, 8, 12, 2))
    x = batch(2, 8, 6, 5)
    before = [fused(x) for _ in range(2)][-1]
    for module in (fused, eager):
        torch.manual_seed(3)
        CHANGES[change](module)
    assert_accurate(output_results(fused, eager, x))
    assert change == "channels_last" or not torch.equal(fused(x), before)
    fused(x)
    for module in (fused, eager):
        module.bn1.weight.data.mul_(1.25)
    assert_accurate(output_results(fused, eager, x))


@torch.no_grad()
def test_moves_between_dtypes_are_followed(engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(FusedBottleneck, 8, 4, 2))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        fused.to(dtype), eager.to(dtype)
        for _ in range(2):
            x = batch(2, 8, 6, 5, dtype=dtype)
            if dtype == torch.float64:
                torch.testing.assert_close(fused(x), eager(x), rtol=1e-10, atol=1e-10)
            else:
                assert_accurate(output_results(fused, eager, x), stored=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == torch.bfloat16
    assert_accurate(output_results(fused, eager, x))


@torch.no_grad()
def test_sizes_of_batch_and_map_may_alternate(engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(FusedBottleneck, 8, 4, 2))
    for size in ((2, 8, 6, 5), (1, 8, 6, 5), (2, 8, 9, 9), (2, 8, 6, 5), (2, 8, 1, 1)):
        assert_accurate(output_results(fused, eager, batch(*size)))


def forward_ops(module: nn.Module, x: Tensor) -> dict[str, int]:
    return ops_called(lambda: module(x))


def runs_folded(module: nn.Module, x: Tensor) -> bool:
    """Whether a forward folds BN into its convs, in the weights or as the native kernels run."""
    ops = forward_ops(module, x)
    return ops["fusedres::bn_fold"] + ops["fusedres_cpu::eval_chain"] > 0


@needs_native
@needs_native
@torch.no_grad()
def test_a_repeated_call_is_recalled_and_another_is_not(engine: str) -> None:
    block, _ = (m.eval() for m in block_twins(FusedBasicBlock, 8, 12, 2))
    pairs, projection = block.pairs, block.projection
    x = batch(2, 8, 6, 5)

    def recalled(x: Tensor) -> bool:
        return recall.recall(x, pairs, projection, True, [block.relu]) is not None

    assert not recalled(x)
    y = block(x)
    assert recalled(x)
    assert torch.equal(block(x), y)
    assert not recalled(batch(1, 8, 6, 5))
    assert not recalled(x.contiguous())
    assert not recalled(x.double())
    with torch.enable_grad():
        assert not recalled(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not recalled(x)
    block.bn1.train()
    assert not recalled(x)


@torch.no_grad()
@pytest.mark.parametrize("build", [lambda: block_twins(FusedBottleneck, 8, 4, 2)[0], lambda: FusedConvBNReLU(8, 8)])
def test_frozen_weights_are_folded_once_for_all_batches(build: Callable[[], nn.Module]) -> None:
    module, x = folding.freeze(build().eval()), batch(2, 8, 6, 5)
    assert forward_ops(module, x)["fusedres::bn_fold"] > 0
    assert forward_ops(module, x)["fusedres::bn_fold"] == 0
    module(batch(2, 8, 6, 5, seed=9))
    assert forward_ops(module, x)["fusedres::bn_fold"] == 0
    assert forward_ops(module, batch(5, 8, 6, 5))["fusedres::bn_fold"] == 0
    assert forward_ops(module, batch(2, 8, 7, 5))["fusedres::bn_fold"] > 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_frozen_batches_of_any_size_take_turns(groups: int, dtype: torch.dtype, engine: str) -> None:
    fused, eager = (m.to(dtype).eval() for m in block_twins(FusedBottleneck, 32, 8, groups=groups, base_width=128))
    folding.freeze(fused)
    for n in (2, 1, 5, 0, 2):
        assert_accurate(output_results(fused, eager, batch(n, 32, 6, 5, dtype=dtype)))


@needs_native
@torch.no_grad()
def test_native_convolutions_read_the_parameters_at_every_call() -> None:
    module, x = shake(FusedBottleneck(8, 2)).eval(), batch(2, 8, 6, 5)
    for _ in range(2):
        ops = forward_ops(module, x)
        assert ops["fusedres_cpu::eval_chain"] == 1
        assert sum(ops[f"fusedres_cpu::{name}"] for name in ("fingerprint", "conv_pack")) == 0
        assert ops["fusedres::bn_fold"] == 0


def test_folding_serves_whoever_needs_no_gradient(engine: str) -> None:
    module, x = shake(FusedBasicBlock(8, 8)).eval(), batch(2, 8, 6, 5)
    assert not runs_folded(module, x)
    for p in module.parameters():
        p.requires_grad_(False)
    assert not module(x).requires_grad
    assert runs_folded(copy.deepcopy(module), x)
    assert not runs_folded(module, x.requires_grad_())


@torch.no_grad()
def test_one_batch_norm_in_training_keeps_the_chain_unfolded(engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(FusedBasicBlock, 8, 8))
    fused.bn2.train(), eager.bn2.train()
    assert not runs_folded(copy.deepcopy(fused), batch(2, 8, 6, 5))
    assert_accurate(output_results(fused, copy.deepcopy(eager), batch(2, 8, 6, 5)))


def test_parameters_are_left_as_they_were(engine: str) -> None:
    module = shake(FusedBottleneck(8, 2)).eval()
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        module(batch(2, 8, 6, 5))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def through_pickle(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_copies_share_nothing_with_the_original(
    duplicate: Callable[[nn.Module], nn.Module], training: bool, engine: str
) -> None:
    module, x = block_twins(FusedBottleneck, 8, 4, 2)[0].train(training), batch(2, 8, 6, 5)
    y = module(x)  # the graph is alive while the module is copied
    with torch.no_grad():
        module.eval()(x)
    attributes = set(module.__dict__), {name: set(m.__dict__) for name, m in module.named_modules()}
    twin = duplicate(module)
    assert y.requires_grad
    assert attributes == (set(twin.__dict__), {name: set(m.__dict__) for name, m in twin.named_modules()})
    assert len(list(twin.parameters())) == len(list(module.parameters()))
    assert len(list(twin.buffers())) == len(list(module.buffers()))
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(twin(x), expected)
        twin.conv1.weight.data.mul_(2)
        assert torch.equal(module(x), expected)
        assert not torch.equal(twin(x), expected)


@torch.no_grad()
def test_forgotten_modules_leave_nothing_behind(engine: str) -> None:
    gc.collect()
    before = len(folding._entries)
    module = FusedBasicBlock(8, 8).eval()
    module(batch(2, 8, 6, 5))
    del module
    gc.collect()
    assert len(folding._entries) == before


def test_threads_may_share_a_module_while_its_weights_change(engine: str) -> None:
    module, x = shake(FusedBottleneck(8, 2)).eval(), batch(2, 8, 6, 5)
    with torch.no_grad():
        expected = module(x)
    wrong: list[Tensor] = []

    def serve(size: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                y = module(x[:size])
                if not torch.allclose(y, expected[:size], rtol=1e-5, atol=1e-5):
                    wrong.append(y)

    threads = [threading.Thread(target=serve, args=(size,)) for size in (1, 2, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_frozen_models_follow_version_counters(engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(FusedBottleneck, 8, 4, 2))
    assert folding.freeze(fused) is fused
    x = batch(2, 8, 6, 5)
    fused(x)
    for module in (fused, eager):
        module.bn3.weight.mul_(2)
    assert_accurate(output_results(fused, eager, x))
    state = {k: v * 2 for k, v in eager.state_dict().items()}
    for module in (fused, eager):
        module.load_state_dict(state)
    assert_accurate(output_results(fused, eager, x))
    for module in (fused, eager):
        module.double()
    torch.testing.assert_close(fused(x.double()), eager(x.double()), rtol=1e-10, atol=1e-10)


def test_frozen_models_born_in_inference_mode_follow_changes_without_counters(engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(FusedBasicBlock, 8, 8))
    x = batch(2, 8, 6, 5)
    with torch.inference_mode():
        born_there = folding.freeze(copy.deepcopy(fused))
        born_there(x)
        for module in (born_there, eager):
            module.bn1.weight.mul_(2)
        torch.testing.assert_close(born_there(x), eager(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_a_cuda_graph_reads_stays_and_what_it_folds_is_not_kept(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a capture goes, on this device; tests/gpu captures."""
    blocks = [folding.freeze(FusedBasicBlock(8, 8).eval())]
    x, other = batch(2, 8, 6, 5), batch(2, 8, 7, 5)

    def weights(is_captured: bool) -> weakref.ref[Callable]:
        with monkeypatch.context() as patch:
            for module in (folding, recall):
                patch.setattr(module, "is_capturing", lambda device: is_captured)
            blocks[0](x)
        return weakref.ref(folding._entries[blocks[0].conv1].run)

    def survives_another_size(run: weakref.ref[Callable]) -> bool:
        blocks[0](other)
        gc.collect()
        return run() is not None

    launched = weights(is_captured=False)
    assert not survives_another_size(launched)
    weights(is_captured=False)
    recall._chains.clear()
    looked_at_anew = weights(is_captured=True)
    assert survives_another_size(looked_at_anew)
    weights(is_captured=False)
    recalled = weights(is_captured=True)
    assert survives_another_size(recalled)
    of_other_size = weakref.ref(folding._entries[blocks[0].conv1].run)
    assert weights(is_captured=True) == of_other_size  # what the capture folds only its graph can tell
    blocks.clear()
    gc.collect()
    assert looked_at_anew() is recalled() is None


@torch.no_grad()
def test_copies_of_frozen_models_are_not_frozen(engine: str) -> None:
    fused, eager = (m.eval() for m in block_twins(FusedBasicBlock, 8, 8))
    twin, x = copy.deepcopy(folding.freeze(fused)), batch(2, 8, 6, 5)
    twin(x)
    for module in (twin, eager):
        module.bn1.weight.data.mul_(2)
    assert_accurate(output_results(twin, eager, x))


def test_a_call_under_autocast_is_recalled_there_and_nowhere_else() -> None:
    block, x = FusedBottleneck(16, 4).eval(), batch(2, 16, 7, 7, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, again = block(x), block(x)
    assert torch.equal(first, again)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"the input is torch\.bfloat16, the weight torch\.float32"):
        block(x)

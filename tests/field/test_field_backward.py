"""Field cases of the backward: constants in eval, graphs run twice, foreign gradients and inputs left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from field_nets import Place, assert_all_near, assert_near, eager_net, gradients, resnet18, same_bits, saved
from oracles import batch, block_twins
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedres import FusedBasicBlock, FusedBottleneck

kinds = pytest.mark.parametrize("kind", [FusedBasicBlock, FusedBottleneck])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def twins(kind: type[nn.Module], training: bool, place: Place) -> tuple[nn.Module, nn.Module]:
    """Blocks of eight channels with an identity shortcut."""
    return place.put(*(block.train(training) for block in block_twins(kind, 8, 8 // kind.expansion)))


@pytest.mark.case("F18")
def test_statistics_are_constants_for_the_gradients_of_a_network_in_eval(drop_in: Callable, place: Place) -> None:
    eager = eager_net(resnet18).eval()
    fused, eager = place.put(drop_in(resnet18, eager), eager)
    before = saved(fused)
    x = place.put(batch(4, 3, 64, 64))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, leaf in zip((fused, eager), inputs, strict=True):
        model(leaf).square().sum().backward()
    assert_near(inputs[0].grad, inputs[1].grad, 100 * place.tolerance)
    assert_all_near(gradients(fused), gradients(eager), 1e3 * place.tolerance)
    alone = x[:1].clone().requires_grad_()
    fused(alone).square().sum().backward()
    assert_near(alone.grad, inputs[0].grad[:1], 100 * place.tolerance)
    assert same_bits(fused, before)


@pytest.mark.case("F18")
@pytest.mark.kernel
@kinds
def test_samples_do_not_couple_in_the_backward_of_a_block_in_eval(kind: type[nn.Module], place: Place) -> None:
    fused, eager = twins(kind, False, place)
    x = place.put(batch(4, 8, 4, 3))
    whole, alone, other = (t.clone().requires_grad_() for t in (x, x[:1], x))
    for model, leaf in ((fused, whole), (eager, other), (copy.deepcopy(fused), alone)):
        model(leaf).square().sum().backward()
    assert_near(whole.grad, other.grad, 10 * place.tolerance)
    assert_near(alone.grad, whole.grad[:1], 10 * place.tolerance)
    assert_all_near(gradients(fused), gradients(eager), 10 * place.tolerance)


@pytest.mark.case("F25")
@pytest.mark.parametrize("memory", ["standard", "recompute"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@kinds
def test_checkpointed_block_moves_statistics_as_often_as_eager(
    kind: type[nn.Module], use_reentrant: bool, memory: str, place: Place
) -> None:
    fused, eager = place.put(*block_twins(kind, 8, 8 // kind.expansion, memory=memory))
    plain = copy.deepcopy(fused)
    x = place.put(batch(2, 8, 5, 4))
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    for model, leaf in zip((fused, eager), inputs, strict=False):
        checkpoint(model, leaf, use_reentrant=use_reentrant).square().sum().backward()
    plain(inputs[2]).square().sum().backward()
    assert_near(inputs[0].grad, inputs[2].grad, place.tolerance)
    assert_all_near(gradients(fused), gradients(plain), place.tolerance)
    assert_all_near(fused.named_buffers(), eager.named_buffers(), place.tolerance)
    assert fused.bn1.num_batches_tracked.item() == 2


@pytest.mark.case("F25")
@pytest.mark.kernel
@kinds
def test_two_forwards_then_one_backward_equal_eager(kind: type[nn.Module], place: Place) -> None:
    fused, eager = twins(kind, True, place)
    for model in (fused, eager):
        (
            model(place.put(batch(2, 8, 4, 3))).sum() + model(place.put(batch(2, 8, 4, 3, seed=2))).square().sum()
        ).backward()
    assert_all_near(gradients(fused), gradients(eager), 10 * place.tolerance)
    assert_all_near(fused.named_buffers(), eager.named_buffers(), place.tolerance)
    assert fused.bn1.num_batches_tracked.item() == 2


#: Gradients of the output that are no dense memory of their own.
FOREIGN = {
    "sum": lambda y: None,
    "expanded": lambda y: torch.ones(1, dtype=y.dtype, device=y.device).expand_as(y),
    "sliced": lambda y: torch.ones(y.shape[0], 2 * y.shape[1], *y.shape[2:], dtype=y.dtype, device=y.device)[:, ::2],
    "flipped": lambda y: torch.ones_like(y).transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.case("F30")
@pytest.mark.kernel
@kinds
@modes
def test_gradients_of_any_strides_are_read_right_and_left_alone(
    kind: type[nn.Module], training: bool, place: Place
) -> None:
    fused, eager = twins(kind, training, place)
    x = place.put(batch(2, 8, 4, 3))

    def backward(model: nn.Module, form: str) -> list[tuple[str, Tensor]]:
        model, leaf = copy.deepcopy(model), x.clone().requires_grad_()
        y = model(leaf)
        g = FOREIGN[form](y)
        if g is None:
            y.sum().backward(retain_graph=True)
        else:
            kept = g.clone()
            y.backward(g, retain_graph=True)
            assert torch.equal(g, kept)
        first = [("x", leaf.grad.clone()), *((name, grad.clone()) for name, grad in gradients(model))]
        y.sum().backward()
        for (name, once), (_, twice) in zip(first, [("x", leaf.grad), *gradients(model)], strict=True):
            assert_near(twice, 2 * once, 1e-6, name)
        return first

    expected = backward(eager, "sum")
    for form in ("sum", "expanded", "flipped") if place.is_interpreted else FOREIGN:
        assert_all_near(backward(fused, form), expected, 10 * place.tolerance)


@pytest.mark.case("F33")
@pytest.mark.kernel
@kinds
@modes
def test_block_never_writes_into_its_input(kind: type[nn.Module], training: bool, place: Place) -> None:
    fused, eager = twins(kind, training, place)
    x = place.put(batch(2, 8, 4, 3))
    kept = x.clone()
    with torch.no_grad():
        fused(x)
        fused(x)
    assert torch.equal(x, kept)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    eager.load_state_dict(fused.state_dict())
    for model, leaf in zip((fused, eager), leaves, strict=True):
        (model(leaf) + 2 * leaf).sum().backward()
        assert torch.equal(leaf.detach(), kept)
    assert_near(leaves[0].grad, leaves[1].grad, 10 * place.tolerance)


@pytest.mark.case("F33")
@modes
def test_layer_and_stem_never_write_into_their_input(training: bool, drop_in: Callable, place: Place) -> None:
    fused = drop_in(resnet18, eager_net(resnet18)).to(place.device).train(training)
    x = batch(2, 3, 64, 64).to(place.device)
    kept = x.clone()
    fused(x).sum().backward()
    with torch.no_grad():
        fused(x)
    assert torch.equal(x, kept)


@pytest.mark.case("F35")
@pytest.mark.kernel
@modes
def test_second_derivative_is_eagers_or_an_error(training: bool, place: Place) -> None:
    fused, eager = place.put(*(block.train(training) for block in block_twins(FusedBottleneck, 4, 1)))

    def penalty(model: nn.Module) -> Tensor:
        x = place.put(batch(2, 4, 3, 3)).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return x.grad

    expected = penalty(eager)
    try:
        found = penalty(fused)
    except RuntimeError as error:
        assert "differentiable once" in str(error)  # noqa: PT017  (an error or the right number, nothing else)
    else:
        assert_near(found, expected, 10 * place.tolerance)

"""What follows a call further than one backward: torch.func, forward-mode AD, second derivatives. Eager's numbers come
out, or one clear error; never another number, and never a gradient that lacks a part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import small_twins
from oracles import batch, block_twins, is_fused, shake
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU

pytestmark = pytest.mark.usefixtures("one_thread")

double = torch.float64
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
#: Eager refuses to move running statistics inside a transform.
batch_statistics = partial(nn.BatchNorm2d, track_running_stats=False)


def layer_twins(norm_layer: Callable[[int], nn.Module]) -> tuple[nn.Module, nn.Module]:
    fused = shake(FusedConvBNReLU(4, 6, bias=True, norm_layer=norm_layer))
    return fused, nn.Sequential(*map(copy.deepcopy, (fused.conv, fused.bn, fused.relu)))


#: name -> (twins for a kind of norm, size of their input)
TWINS: dict[str, tuple[Callable[[Any], tuple[nn.Module, nn.Module]], tuple[int, ...]]] = {
    "layer": (layer_twins, (2, 4, 3, 4)),
    "basic": (lambda norm: block_twins(FusedBasicBlock, 4, 4, norm_layer=norm), (2, 4, 3, 4)),
    "bottleneck": (lambda norm: block_twins(FusedBottleneck, 4, 2, 2, norm_layer=norm), (2, 4, 5, 4)),
    "network": (lambda norm: small_twins("basic", norm_layer=norm), (2, 3, 33, 33)),
}


def loss(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().sum()


def per_sample(net: nn.Module, x: Tensor) -> Any:
    def of_one(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(net, parameters, (sample[None],)).square().sum()

    return vmap(grad(of_one), (None, 0))({name: p.detach() for name, p in net.named_parameters()}, x)


def dual(net: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(net(forward_ad.make_dual(x, x.cos()))))


def gradient_penalty(net: nn.Module, x: Tensor) -> Any:
    """A second derivative of two kinds: torch.func's gradient, differentiated by autograd."""
    x = x.clone().requires_grad_()
    penalty = grad(partial(loss, net))(x).square().sum()
    return torch.autograd.grad(loss(net.eval(), x.detach()) + penalty, [x, *net.parameters()], allow_unused=True)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda net, x: grad(partial(loss, net))(x),
    "vjp": lambda net, x: vjp(net, x)[1](net(x).cos()),
    "vmap": lambda net, x: vmap(net)(torch.stack([x, x.cos()])),
    "jvp": lambda net, x: jvp(net, (x,), (x.cos(),)),
    "dual": dual,
    "grad of grad": lambda net, x: grad(lambda x: grad(partial(loss, net))(x).square().sum())(x),
    "gradient penalty": gradient_penalty,
}
JACOBIANS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "jacrev": lambda net, x: jacrev(lambda x: net(x).sum((2, 3)))(x),
    "jacfwd": lambda net, x: jacfwd(lambda x: net(x).sum((2, 3)))(x),
    "hessian": lambda net, x: hessian(partial(loss, net))(x),
    "gradients per sample": per_sample,
}


def assert_twins_agree(name: str, transform: Callable[[nn.Module, Tensor], Any], training: bool) -> None:
    make, shape = TWINS[name]
    x = batch(*shape, dtype=double)
    results = []
    for net in make(batch_statistics if training else nn.BatchNorm2d):
        net.double().train(training)
        with torch.no_grad():
            net(x)  # what is remembered of plain calls must not serve transformed ones
        results.append(pytree.tree_leaves(transform(net, x)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@modes
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", TWINS)
def test_transform_gives_eagers_numbers(name: str, transform: str, training: bool) -> None:
    assert_twins_agree(name, TRANSFORMS[transform], training)


@pytest.mark.parametrize("transform", JACOBIANS)
@pytest.mark.parametrize("name", ["layer", "bottleneck"])
def test_jacobians_and_hessians_are_eagers(name: str, transform: str) -> None:
    assert_twins_agree(name, JACOBIANS[transform], training=False)


@modes
@pytest.mark.parametrize("transform", ["vmap", "jvp", "dual"])
def test_transform_without_gradients_gives_eagers_numbers(transform: str, training: bool) -> None:
    with torch.no_grad():
        assert_twins_agree("network", TRANSFORMS[transform], training)


@modes
def test_gradient_inside_a_compiled_function_is_eagers(training: bool) -> None:
    def compiled(net: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.reset()
        return torch.compile(grad(partial(loss, net)), backend="aot_eager")(x)

    assert_twins_agree("bottleneck", compiled, training)


def test_modules_run_fused_again_after_a_transform() -> None:
    block = block_twins(FusedBottleneck, 4, 2, 2)[0].eval()
    x = batch(2, 4, 5, 4)
    grad(partial(loss, block))(x)
    assert is_fused(lambda: block(x))


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss(net, x), x, create_graph=True)[0].square().sum()


SECOND: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "backward": lambda net, x: penalty(net, x).backward(),
    "of x by name": lambda net, x: torch.autograd.grad(penalty(net, x), x, allow_unused=True),
    "beside a loss": lambda net, x: torch.autograd.grad(loss(net, x) + penalty(net, x), list(net.parameters())),
    "product": lambda net, x: torch.autograd.functional.hvp(partial(loss, net), x, x.cos()),
}


@modes
@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("name", ["bottleneck", "network"])
def test_second_derivative_is_refused_however_it_is_asked_for(name: str, way: str, training: bool, engine: str) -> None:
    make, shape = TWINS[name]
    net = make(nn.BatchNorm2d)[0].double().train(training)
    x = batch(*shape, dtype=double).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        SECOND[way](net, x)


def test_second_derivative_in_the_stem_alone_is_refused() -> None:
    net = small_twins()[0]
    x = batch(2, 3, 33, 33, dtype=double).requires_grad_()
    y = fusedres.functional.stem(x, net.conv1, net.bn1, net.relu, net.maxpool)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def batched(y: Tensor, x: Tensor) -> object:
    return torch.autograd.grad(y, x, torch.stack([y, y]).detach(), is_grads_batched=True)


def mapped(y: Tensor, x: Tensor) -> object:
    return vmap(lambda dy: torch.autograd.grad(y, x, dy))(torch.stack([y, y]).detach())


def with_tangents(y: Tensor, x: Tensor) -> object:
    with forward_ad.dual_level():
        return torch.autograd.grad(y, x, forward_ad.make_dual(y.detach(), y.detach()))


@pytest.mark.parametrize("backward", [batched, mapped, with_tangents])
@pytest.mark.parametrize("name", ["basic", "network"])
def test_backward_of_a_plain_forward_can_be_neither_batched_nor_carry_tangents(
    name: str, backward: Callable[[Tensor, Tensor], object]
) -> None:
    make, shape = TWINS[name]
    x = batch(*shape, dtype=double).requires_grad_()
    with pytest.raises(RuntimeError, match=r"neither be batched|inside of vmap"):
        backward(make(nn.BatchNorm2d)[0].double()(x), x)

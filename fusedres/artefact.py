"""A trained network for inference alone: BN folded into its convs, in one safetensors file that says how to use it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fusedres import ops
from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.card import Card
from fusedres.functional import ConvBN
from fusedres.layers import FusedConvBNReLU
from fusedres.resnet import StagedNet


def read_card(path: Path) -> Card | None:
    """The card of the safetensors file at ``path``; None where it has none. ValueError where that is damaged."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return Card.of(file.metadata() or {}, path)


def to_bytes(folded: nn.Module, card: Card) -> bytes:
    """The artefact of a network that ``fold`` made, as the content of a safetensors file."""
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in state(folded).items()}, card.metadata())


def state(folded: nn.Module) -> dict[str, Tensor]:
    """The tensors that matter of a folded network: its convs' and its classifier's, none of its BNs'."""
    norms = tuple(f"{name}." for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d))
    return {name: tensor for name, tensor in folded.state_dict().items() if not name.startswith(norms)}


def fold(model: StagedNet) -> nn.Module:
    """A copy of ``model`` in eval with the same numbers, computed by its convs alone: every BN is the identity.

    It runs on the same fused kernels as ``model``. Folded in float64, cast once to the dtype of each weight.
    """
    folded = hollow(model)
    for (conv, bn), (target, _) in zip(_pairs(model), _pairs(folded), strict=True):
        constants = ops.bn_constants(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps, torch.float64)
        bias = None if conv.bias is None else conv.bias.double()
        target.weight, target.bias = map(_final, ops.bn_fold(conv.weight.double(), bias, constants))
    return folded.to(model.conv1.weight.dtype)


def hollow(model: StagedNet) -> nn.Module:
    """A copy of ``model`` in eval that can hold folded weights: every conv has a bias, every BN is the identity.

    ``scale = weight / sqrt(var + eps)`` is 1 to the bit with eps 0, so that nothing is rounded once more.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for conv, bn in _pairs(model):
        conv.bias = _final(conv.weight.new_zeros(conv.out_channels))
        bn.reset_parameters()
        bn.eps = 0.0
    return model


def _final(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def without_norms(folded: nn.Module) -> nn.Module:
    """A copy of a folded network whose BNs, the identity by now, are gone: for whoever records its modules."""
    model = copy.deepcopy(folded)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


def _pairs(model: nn.Module) -> Iterator[ConvBN]:
    """Every conv of a network of this package, with the BN behind it."""
    for module in model.modules():
        if isinstance(module, StagedNet):
            yield ConvBN(module.conv1, module.bn1)
        elif isinstance(module, FusedConvBNReLU):
            yield from module.pairs
        elif isinstance(module, (FusedBasicBlock, FusedBottleneck)):
            yield from module.pairs
            if module.projection is not None:
                yield module.projection

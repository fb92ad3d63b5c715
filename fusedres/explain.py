"""What runs how: for every block and conv-BN-ReLU layer of a model, the engine that serves it, and why not another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fusedres import dispatch
from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.engines import EvalChain, FoldedConv
from fusedres.functional import unit_spec
from fusedres.inspection import checked_module
from fusedres.layers import FusedConvBNReLU

#: The ops that every block is made of, its convolutions first.
_OPS = ("conv_fprop", "conv_dgrad", "conv_wgrad", "scale_shift_add_relu", "drelu_dbn")


class Row(NamedTuple):
    """One fused module of a model.

    ``engine`` is the engine of its convolutions, or "eager" where its modules run one by one; ``folded`` the one that
    runs it in eval without gradients, BN folded. ``reason`` says why modules run one by one, why preferred engines were
    passed over for some op or for the folded form, and why a downsample runs by itself; it is empty where nothing does.
    """

    name: str
    kind: str
    engine: str
    folded: str
    reason: str


def explain(model: nn.Module) -> list[Row]:
    """A row for every fused block or layer of ``model``, in order, judged by its parameters' device and dtype.

    TypeError where ``model`` is no module.
    """
    kinds = (FusedBasicBlock, FusedBottleneck, FusedConvBNReLU)
    return [_row(name, module) for name, module in checked_module(model).named_modules() if isinstance(module, kinds)]


def _row(name: str, module: FusedBasicBlock | FusedBottleneck | FusedConvBNReLU) -> Row:
    kind = type(module).__name__
    reason = module.reason()
    if reason is not None:
        return Row(name, kind, "eager", "eager", reason)
    weight = next(module.parameters(), torch.empty(0))
    choices = [dispatch.choose(op, weight.device.type, weight.dtype) for op in _OPS]
    folded = dispatch.choose_folded(_outline(module))
    reasons = [f"{engine}: {why}" for choice in (*choices, folded) for engine, why in choice.passed_over]
    downsample_reason = None if isinstance(module, FusedConvBNReLU) else module.downsample_reason()
    if downsample_reason is not None:
        reasons.append(f"downsample: {downsample_reason}")
    return Row(name, kind, choices[0].engine.name, folded.engine.name, "; ".join(dict.fromkeys(reasons)))


def _outline(module: FusedBasicBlock | FusedBottleneck | FusedConvBNReLU) -> EvalChain[FoldedConv]:
    """The kind of chain that the module folds to, with its weights as they are: engines look at their sizes alone."""
    convs = tuple(FoldedConv(pair.conv.weight, None, *unit_spec(pair).conv) for pair in module.pairs)
    if isinstance(module, FusedConvBNReLU):
        return EvalChain(convs, None, False, isinstance(module.relu, nn.ReLU))
    pair = module.projection
    projection = FoldedConv(pair.conv.weight, None, *unit_spec(pair).conv) if pair else None
    return EvalChain(convs, projection, module.downsample is None, True)

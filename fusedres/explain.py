"""What runs how: for every block and conv-BN-ReLU layer of a model, the engine that serves it, and why not another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fusedres import dispatch
from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.layers import FusedConvBNReLU


class Row(NamedTuple):
    """One fused module of a model.

    ``engine`` is the engine of its convolutions, or "eager" where its modules run one by one; ``reason`` says why they
    do, or why preferred engines were passed over, and is empty where nothing was.
    """

    name: str
    kind: str
    engine: str
    reason: str


def explain(model: nn.Module) -> list[Row]:
    """A row for every fused block or layer of ``model``, in order, judged by its parameters' device and dtype."""
    kinds = (FusedBasicBlock, FusedBottleneck, FusedConvBNReLU)
    return [_row(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def _row(name: str, module: FusedBasicBlock | FusedBottleneck | FusedConvBNReLU) -> Row:
    kind = type(module).__name__
    reason = module.reason()
    if reason is not None:
        return Row(name, kind, "eager", reason)
    weight = next(module.parameters(), torch.empty(0))
    choice = dispatch.choose("conv_fprop", weight.device.type, weight.dtype)
    return Row(name, kind, choice.engine.name, "; ".join(f"{engine}: {why}" for engine, why in choice.passed_over))

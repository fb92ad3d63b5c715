"""Blocks of a stage, one behind another, in one autograd Function: where that pays, and nobody looks in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres import autocast, dispatch, folding
from fusedres.autograd import stage
from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.functional import ConvBN, check_chain, is_fusable_input, unit_spec, unit_tensors
from fusedres.inspection import is_traced, is_transformed, plain_reason
from fusedres.specs import ChainSpec, Residual

Block = FusedBasicBlock | FusedBottleneck

#: So many blocks share a Function: what they saved is let go of, and their parameters' gradients are ready, at once.
MOST_BLOCKS = 4


class _Like(NamedTuple):
    """What checks look at of a tensor that is not there yet."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def run_stage(blocks: nn.Module, x: Tensor, chained: bool | None) -> Tensor:
    """``blocks(x)``: x (N, C, H, W) -> (N, K, P, Q).

    ``chained``: whether to join fused blocks in a Function; None where the engine is known to gain by it.
    """
    if not _may_chain(x, chained) or plain_reason(blocks, nn.Sequential) is not None:
        return blocks(x)
    chain = list(blocks.children())
    if len(chain) < 2 or not all(map(_is_plain, chain)) or not is_fusable_input(x, _convs(chain[0])):
        return blocks(x)
    for first in range(0, len(chain), MOST_BLOCKS):
        x = _run(chain[first : first + MOST_BLOCKS], x)
    return x


def _may_chain(x: Tensor, chained: bool | None) -> bool:
    if chained is False or not (torch.is_grad_enabled() and type(x) is Tensor):
        return False
    if torch.compiler.is_compiling() or is_traced() or is_transformed():
        return False
    if not x.is_contiguous(memory_format=torch.channels_last) or x.dtype != autocast.compute_dtype(x):
        return False
    return bool(chained) or dispatch.choose("conv_fprop", x.device.type, x.dtype).engine.chains_blocks


def _is_plain(block: nn.Module) -> bool:
    """Whether the block's forward is one chain, and calling it is no more than that."""
    if plain_reason(block, FusedBasicBlock, FusedBottleneck) is not None:
        return False
    assert isinstance(block, Block)
    return block.reason() is None and (block.downsample is None or block.projection is not None)


def _convs(block: Any) -> list[ConvBN]:
    """Those of the chain, a projection's last."""
    return [*block.pairs, *([block.projection] if block.projection else [])]


def _run(blocks: Sequence[Any], x: Tensor) -> Tensor:
    """``blocks`` are plain."""
    specs = _specs(blocks, x)
    if specs is None or len(blocks) < 2 or folding.serves(specs[0], x, None, _convs(blocks[0])):
        for block in blocks:
            x = block(x)
        return x
    with autocast.suspended(x.device.type):
        return stage(specs, x, [[unit_tensors(pair) for pair in _convs(block)] for block in blocks])


def _specs(blocks: Sequence[Block], x: Tensor) -> list[ChainSpec] | None:
    """Of each block, its input checked; None where an identity does not have the shape of its branch."""
    specs = []
    at: Any = x
    for block in blocks:
        units = [unit_spec(pair) for pair in _convs(block)]
        projection = block.projection
        shape = check_chain(at, block.pairs, units, projection)
        if projection is None and shape != at.shape:
            return None
        branch, side = tuple(units[: block.depth]), units[-1] if projection else None
        residual: Residual = "projection" if projection else "input"
        specs.append(ChainSpec(branch, side, residual, True, block.memory))
        at = _Like(shape, x.dtype, x.device)
    return specs

"""Blocks of a stage, one behind another, in one autograd Function: where that pays, and nobody looks in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres import autocast, dispatch, folding
from fusedres.autograd import stage
from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.functional import ConvBN, chain_reason, check_chain, is_fusable_input, unit_spec, unit_tensors
from fusedres.inspection import is_followed, plain_reason
from fusedres.specs import ChainSpec, Residual

Block = FusedBasicBlock | FusedBottleneck

#: So many blocks share a Function: what they saved is let go of, and their parameters' gradients are ready, at once.
MOST_BLOCKS = 4


class _Like(NamedTuple):
    """What checks look at of a tensor that is not there yet."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _Member(NamedTuple):
    """A block, and the modules of its chain, read once a call."""

    block: Block
    pairs: list[ConvBN]
    projection: ConvBN | None

    @classmethod
    def of(cls, block: nn.Module) -> _Member | None:
        """Where the block's forward is one chain, and calling it is no more than that."""
        if plain_reason(block, FusedBasicBlock, FusedBottleneck) is not None:
            return None
        assert isinstance(block, Block)
        pairs, projection = block.pairs, block.projection
        is_chain = block.downsample is None or projection is not None
        return cls(block, pairs, projection) if is_chain and chain_reason(pairs, [block.relu]) is None else None

    @property
    def convs(self) -> list[ConvBN]:
        """Those of the chain, a projection's last."""
        return [*self.pairs, *([self.projection] if self.projection else [])]


def run_stage(blocks: nn.Module, x: Tensor, chained: bool | None) -> Tensor:
    """``blocks(x)``: x (N, C, H, W) -> (N, K, P, Q).

    ``chained``: whether to join fused blocks in a Function; None where the engine is known to gain by it.
    """
    if not _may_chain(x, chained) or plain_reason(blocks, nn.Sequential) is not None:
        return blocks(x)
    members = list(map(_Member.of, blocks.children()))
    chain = [member for member in members if member is not None]
    if len(chain) < max(2, len(members)) or not is_fusable_input(x, chain[0].convs):
        return blocks(x)
    for first in range(0, len(chain), MOST_BLOCKS):
        x = _run(chain[first : first + MOST_BLOCKS], x)
    return x


def _may_chain(x: Tensor, chained: bool | None) -> bool:
    if chained is False or not (torch.is_grad_enabled() and type(x) is Tensor) or is_followed():
        return False
    if not x.is_contiguous(memory_format=torch.channels_last) or x.dtype != autocast.compute_dtype(x):
        return False
    return bool(chained) or dispatch.choose("conv_fprop", x.device.type, x.dtype).engine.chains_blocks


def _run(chain: Sequence[_Member], x: Tensor) -> Tensor:
    specs = _specs(chain, x)
    if specs is None or len(chain) < 2 or folding.serves(specs[0], x, None, chain[0].convs):
        for member in chain:
            x = member.block(x)
        return x
    with autocast.suspended(x.device.type):
        return stage(specs, x, [[unit_tensors(pair) for pair in member.convs] for member in chain])


def _specs(chain: Sequence[_Member], x: Tensor) -> list[ChainSpec] | None:
    """Of each block, its input checked; None where an identity does not have the shape of its branch."""
    specs = []
    at: Any = x
    for member in chain:
        block, pairs, projection = member
        units = [unit_spec(pair) for pair in member.convs]
        shape = check_chain(at, pairs, units, projection)
        if projection is None and shape != at.shape:
            return None
        branch, side = tuple(units[: len(pairs)]), units[-1] if projection else None
        residual: Residual = "projection" if projection else "input"
        specs.append(ChainSpec(branch, side, residual, True, block.memory))
        at = _Like(shape, x.dtype, x.device)
    return specs

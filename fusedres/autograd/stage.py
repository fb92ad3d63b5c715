"""One autograd Function for chains of one stage, one behind another.

In backward the first conv of a chain then applies, as it stores, the ReLU and the BN sums of the chain before, whose
output it read: the gradient between two chains is never written unmasked, nor read again for the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import autocast, dispatch, replay
from fusedres.autograd.backward import ChainBackward
from fusedres.autograd.chain import chain_forward, keep_parameters
from fusedres.autograd.needs import ChainNeeds, requires_grad
from fusedres.autograd.once import refuse_followers
from fusedres.autograd.unit import ParameterDtypes, Saved, unit_tensors
from fusedres.specs import ChainSpec, UnitTensors


class Link(NamedTuple):
    """One chain of a stage, and what of it is needed."""

    spec: ChainSpec
    needs: ChainNeeds

    @property
    def units(self) -> int:
        """Convs, a projection's included."""
        return len(self.needs.units)


class Backward(NamedTuple):
    """What the backward of a link knows beside tensors."""

    link: Link
    input_size: torch.Size
    dtypes: tuple[ParameterDtypes, ...]


def stage(specs: Sequence[ChainSpec], x: Tensor, chains: Sequence[Sequence[UnitTensors]]) -> Tensor:
    """Run chains that all need gradients and end in a ReLU, none with a given residual, one behind another.

    ``x`` (N, C, H, W) -> (N, K, P, Q), both channels_last; ``chains``: the tensors of each one's units, a projection's
    last.
    """
    links, is_needed = [], requires_grad(x)
    for spec, units in zip(specs, chains, strict=True):
        links.append(Link(spec, ChainNeeds.of(spec, is_needed, False, units)))
        is_needed = links[-1].needs.any
    return StageFunction.apply(tuple(links), x, *(t for units in chains for unit in units for t in unit))[0]


def _forward(links: tuple[Link, ...], x: Tensor, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
    """The stage's output, those of the chains before the last, and what the units of every chain keep for backward."""
    outputs: list[Tensor] = []
    saved: list[Tensor | None] = []
    at = 0
    for link in links:
        size = link.units * len(UnitTensors._fields)
        y, *kept = chain_forward(*link, outputs[-1] if outputs else x, None, *flat[at : at + size])
        assert y is not None
        outputs.append(y)
        saved += kept
        at += size
    return outputs[-1], *outputs[:-1], *saved


def _backward(settings: tuple[Backward, ...], dy: Tensor, *saved: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of x, and of the tensors of every unit in order.

    ``saved``: x and every output; then for each chain its convs' own parameters and what its units keep.
    """
    x, outputs, at = saved[0], saved[1 : 1 + len(settings)], 1 + len(settings)
    chains = []
    for (link, input_size, dtypes), y in zip(settings, outputs, strict=True):
        size = link.units * (2 + len(Saved._fields))
        chains.append(ChainBackward(*link, input_size, dtypes, (x, y, *saved[at : at + size])))
        x, at = y, at + size
    dx, tail = None, chains[-1].tail(dy)
    for chain, before in zip(reversed(chains), [*reversed(chains[:-1]), None], strict=True):
        dx, following = chain.run(tail, None if before is None else before.tail_operands())
        if following is None:
            break
        tail = following
    return dx, *(gradient for chain in chains for gradient in chain.unit_gradients())


class StageFunction(torch.autograd.Function):
    """``apply(links, x, *unit tensors of every chain) -> (y, *saved)``; the saved tensors are for backward alone."""

    @staticmethod
    def forward(ctx: Any, links: tuple[Link, ...], x: Tensor, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        y, *saved = replay.call(_forward, (links,), (x, *flat))
        ctx.mark_non_differentiable(*(t for t in saved if t is not None))
        ctx.set_materialize_grads(False)
        outputs, saved_by_units = [*saved[: len(links) - 1], y], saved[len(links) - 1 :]
        tensors, settings, kept, at, unit = unit_tensors(flat), [], [], 0, 0
        for link, a in zip(links, [x, *outputs], strict=False):
            assert a is not None
            of_units = tensors[unit : unit + link.units]
            size = link.units * len(Saved._fields)
            settings.append(Backward(link, a.shape[2:], tuple(map(ParameterDtypes.of, of_units))))
            kept += [*keep_parameters(link.needs, of_units, x.dtype), *saved_by_units[at : at + size]]
            unit, at = unit + link.units, at + size
        ctx.settings, ctx.spec = tuple(settings), links[0].spec
        ctx.save_for_backward(x if links[0].needs.reads_x else None, *outputs, *kept)
        return y, *saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_followers()
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        with dispatch.as_in_forward(ctx.spec.engine, ctx.spec.tunes), autocast.suspended(dy.device.type):
            return None, *replay.call(_backward, (ctx.settings,), (dy, *ctx.saved_tensors))

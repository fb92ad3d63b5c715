"""Which gradients of a chain somebody needs: what backward computes, and what is kept for it, follow from that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.specs import ChainSpec, UnitSpec, UnitTensors


class UnitNeeds(NamedTuple):
    """Which gradients of a conv and its BN are needed; ``input``: that of the conv's input, by what lies before it."""

    w: bool
    conv_bias: bool
    weight: bool
    bias: bool
    input: bool

    @classmethod
    def of(cls, t: UnitTensors, input: bool) -> UnitNeeds:
        w, conv_bias, weight, bias, *_ = map(requires_grad, t)
        return cls(w, conv_bias, weight, bias, input)

    @property
    def any(self) -> bool:
        """Whether the gradient at the BN's output is needed at all."""
        return any(self)

    @property
    def dz(self) -> bool:
        """Whether the gradient at the conv's output is needed."""
        return self.w or self.input

    def sums(self, unit: UnitSpec) -> bool:
        """Whether the BN's ``dgamma`` is needed, which is summed with ``z``; ``dbeta`` comes without it."""
        return self.weight or (unit.batch_stats and self.dz)


class Kept(NamedTuple):
    """What the backward of a unit reads: ``z``, which it makes ``again`` where that is not stored, and its input."""

    z: bool
    again: bool
    input: bool


class ChainNeeds(NamedTuple):
    """The needs of a chain's input, of its residual and of every unit (a projection last), and what those read."""

    x: bool
    residual: bool
    units: tuple[UnitNeeds, ...]
    kept: tuple[Kept, ...]
    reads_x: bool  # the values of the chain's input, by its first conv or the projection

    @classmethod
    def of(cls, spec: ChainSpec, x: bool, residual: bool, tensors: Sequence[UnitTensors]) -> ChainNeeds:
        """``x``, ``residual``: whether the gradients of the chain's inputs are needed."""
        units, before = [], x
        for t in tensors[: len(spec.units)]:
            units.append(UnitNeeds.of(t, before))
            before = units[-1].any
        if spec.projection is not None:
            units.append(UnitNeeds.of(tensors[-1], x))
        kept = _kept(spec, units, tensors)
        reads_x = kept[0].input or (spec.projection is not None and kept[-1].input)
        return cls(x, residual, tuple(units), kept, reads_x)

    @property
    def any(self) -> bool:
        return self.x or self.residual or any(unit.any for unit in self.units)


def requires_grad(t: Tensor | None) -> bool:
    """Whether anybody may ask for the gradient of ``t``."""
    return t is not None and t.requires_grad and torch.is_grad_enabled()


def _kept(spec: ChainSpec, needs: Sequence[UnitNeeds], tensors: Sequence[UnitTensors]) -> tuple[Kept, ...]:
    """What every unit keeps, from the last to the first, for a unit's ``z`` is the input of the next.

    "recompute" makes again what one conv brings back: the output of a pointwise first conv, the last, the projection.
    """
    last = len(spec.units) - 1
    stored = (
        range(1 if tensors[0].w.shape[2:] == (1, 1) else 0, last) if spec.memory == "recompute" else range(last + 2)
    )
    kept: list[Kept] = []
    if spec.projection is not None:
        kept.append(_of_unit(needs[-1].sums(spec.projection), last + 1 in stored, needs[-1]))
    is_read = False
    for i in reversed(range(last + 1)):
        masks = i < last and needs[i].any  # by the sign of what the ReLU after it saw
        kept.insert(0, _of_unit(needs[i].sums(spec.units[i]) or masks or is_read, i in stored, needs[i]))
        is_read = kept[0].input
    return tuple(kept)


def _of_unit(z: bool, stored: bool, needs: UnitNeeds) -> Kept:
    again = z and not stored
    return Kept(z, again, needs.w or again)

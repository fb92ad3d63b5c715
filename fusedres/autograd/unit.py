"""One conv and its BN inside a chain: what runs, and what stays for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import dispatch, ops
from fusedres.layout import acc_dtype
from fusedres.specs import UnitSpec, UnitTensors, is_closed


class Saved(NamedTuple):
    """What one unit keeps for backward: ``z`` if stored, ``moments`` if closed, neither if it is to be recomputed."""

    bn: Tensor
    z: Tensor | None
    moments: Tensor | None


class Parameters(NamedTuple):
    """The parameters of a unit that backward reads; the bias of its BN is not among them."""

    w: Tensor
    conv_bias: Tensor | None
    weight: Tensor | None


class UnitNeeds(NamedTuple):
    """Which gradients of a unit somebody asked for."""

    w: bool
    conv_bias: bool
    weight: bool
    bias: bool


class Operand(NamedTuple):
    """A conv's input ``p(x)``: with ``bn`` it is ``relu(scale*x + shift)`` and has not been materialised."""

    x: Tensor
    bn: Tensor | None


def unit_tensors(flat: Sequence[Any]) -> list[UnitTensors]:
    """The tensors of each unit from the flat arguments of a Function."""
    width = len(UnitTensors._fields)
    return [UnitTensors(*flat[i : i + width]) for i in range(0, len(flat), width)]


def closes(unit: UnitSpec, t: UnitTensors, x: Tensor) -> bool:
    """Whether the unit runs closed on ``x``: its shapes allow it and the engine of its conv wants it."""
    return is_closed(unit, x.shape, t.w.shape) and dispatch.closes_units(x.device.type, x.dtype)


def materialise(operand: Operand) -> Operand:
    """The operand as the engine's conv wants it: activated once, if its conv does not apply the prologue itself."""
    if operand.bn is None or dispatch.fuses_prologue("conv_fprop", operand.x.device.type, operand.x.dtype):
        return operand
    return Operand(ops.scale_shift_add_relu(operand.x, operand.bn, None, None, True), None)


def bn_vectors(unit: UnitSpec, t: UnitTensors, stats: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The unit's ``bn`` (4, K): from batch statistics, moving the running ones, or from those as constants."""
    if stats is None:
        assert t.running_mean is not None
        assert t.running_var is not None
        return ops.bn_constants(t.running_mean, t.running_var, t.weight, t.bias, unit.eps, acc_dtype(dtype))
    return ops.bn_finalize(
        stats, t.weight, t.bias, t.running_mean, t.running_var, t.num_batches_tracked, unit.momentum, unit.eps
    )


def run_conv(unit: UnitSpec, t: UnitTensors, a: Operand, genstats: bool) -> tuple[Tensor, Tensor]:
    """The conv alone: (z, its statistics if asked for)."""
    return ops.conv_fprop(a.x, t.w, t.conv_bias, None, a.bn, *unit.conv, False, genstats)


def stored_unit(unit: UnitSpec, t: UnitTensors, a: Operand) -> tuple[Tensor, Tensor]:
    """Conv and BN vectors: (z, bn)."""
    z, stats = run_conv(unit, t, a, unit.batch_stats)
    return z, bn_vectors(unit, t, stats if unit.batch_stats else None, z.dtype)


def output_gradient(
    g: Tensor, z: Tensor, bn: Tensor, sums: Tensor, inv_count: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
    """``dz`` as the first five arguments of conv_dgrad and conv_wgrad: lazily, or materialised for both at once."""
    if dispatch.fuses_prologue("conv_dgrad", g.device.type, g.dtype):
        return g, z, bn, sums, inv_count
    return ops.dbn(g, z, bn, sums, inv_count), None, None, None, 0.0


def parameter_gradients(
    unit: UnitSpec, needs: UnitNeeds, parameters: Parameters, bn: Tensor, dw: Tensor | None, sums: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of w, conv_bias, weight and bias. A BN that uses batch statistics absorbs the conv's bias."""
    w, conv_bias, weight = parameters
    dbeta, dgamma = sums.unbind(0)
    d_conv_bias = None
    if needs.conv_bias and conv_bias is not None:
        d_conv_bias = torch.zeros_like(conv_bias) if unit.batch_stats else (bn[2] * dbeta).to(conv_bias.dtype)
    affine = w.dtype if weight is None else weight.dtype
    return (
        dw if needs.w else None,
        d_conv_bias,
        dgamma.to(affine) if needs.weight else None,
        dbeta.to(affine) if needs.bias else None,
    )

"""One conv and its BN inside a chain: what runs, and what stays for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import dispatch, ops
from fusedres.autograd.needs import UnitNeeds
from fusedres.distributed import mean_sums, merge_stats
from fusedres.layout import acc_dtype, pixels
from fusedres.problem import ConvProblem
from fusedres.specs import UnitSpec, UnitTensors, is_closed

#: The gradient of a conv's output, as the first five arguments of ``conv_dgrad`` and ``conv_wgrad``.
OutputGradient = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]


class Saved(NamedTuple):
    """What one unit keeps for backward: ``z`` if stored, ``moments`` if closed, neither if it is to be recomputed or
    nobody reads it; and the conv's parameters where they are copies in the dtype of the activations."""

    bn: Tensor | None
    z: Tensor | None
    moments: Tensor | None
    w: Tensor | None = None
    conv_bias: Tensor | None = None


class ParameterDtypes(NamedTuple):
    """The dtypes of a conv's weight and bias, and of its BN's parameters."""

    w: torch.dtype
    conv_bias: torch.dtype
    bn: torch.dtype

    @classmethod
    def of(cls, t: UnitTensors) -> ParameterDtypes:
        conv_bias = t.w.dtype if t.conv_bias is None else t.conv_bias.dtype
        affine = t.bias if t.weight is None else t.weight
        return cls(t.w.dtype, conv_bias, t.w.dtype if affine is None else affine.dtype)


class Operand(NamedTuple):
    """A conv's input ``p(x)``: with ``bn`` it is ``relu(scale*x + shift)`` and has not been materialised."""

    x: Tensor
    bn: Tensor | None


def unit_tensors(flat: Sequence[Any]) -> list[UnitTensors]:
    """The tensors of each unit from the flat arguments of a Function."""
    width = len(UnitTensors._fields)
    return [UnitTensors(*flat[i : i + width]) for i in range(0, len(flat), width)]


def cast_conv(t: UnitTensors, dtype: torch.dtype) -> UnitTensors:
    """Conv parameters in the compute dtype, as autocast casts them; BN's stay as they are."""
    return t._replace(w=_cast(t.w, dtype), conv_bias=None if t.conv_bias is None else _cast(t.conv_bias, dtype))


def _cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return parameter if parameter.dtype == dtype else ops.cast(parameter, dtype)


def closes(unit: UnitSpec, needs: UnitNeeds, t: UnitTensors, x: Tensor) -> bool:
    """Whether the unit runs closed on ``x``: its shapes allow it, and on the engine of its conv it pays.

    A closed unit draws ``dgamma`` from its weight gradient, so one whose weight needs none had better keep ``z``.
    """
    if needs.any and not needs.w:
        return False
    problem = ConvProblem.of(x, t.w, *unit.conv)
    return is_closed(unit, problem, x.element_size(), dispatch.flops_per_byte(x.device.type, x.dtype))


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
    if unit.sync is not None:
        stats = merge_stats(stats, unit.sync)
    return z, bn_vectors(unit, t, stats if unit.batch_stats else None, z.dtype)


def output_gradient(unit: UnitSpec, g: Tensor, z: Tensor | None, bn: Tensor, sums: Tensor) -> OutputGradient:
    """``dz``, lazily or materialised for both products at once."""
    operands: OutputGradient
    if not unit.batch_stats:
        operands = g, None, bn, None, 0.0
    elif unit.sync is None:
        operands = g, z, bn, sums, inv_count(unit, g)
    else:
        operands = g, z, bn, mean_sums(sums, pixels(g), unit.sync), 1.0
    if dispatch.fuses_prologue("conv_dgrad", g.device.type, g.dtype):
        return operands
    return ops.dbn(*operands), None, None, None, 0.0


def inv_count(unit: UnitSpec, g: Tensor) -> float:
    """1/(N*P*Q) of a BN that used the statistics of this batch, 0.0 where they were constants."""
    return 1 / pixels(g) if unit.batch_stats else 0.0


def parameter_gradients(
    unit: UnitSpec, needs: UnitNeeds, bn: Tensor, dw: Tensor | None, sums: Tensor, dtypes: ParameterDtypes
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of w, conv_bias, weight and bias. A BN that uses batch statistics absorbs the conv's bias.

    ``sums`` (2, K), or (1, K) where no ``dgamma`` is needed.
    """
    dbeta, d_conv_bias = sums[0], None
    if needs.conv_bias:  # absorbed it is zero, but for what is no number
        d_conv_bias = (bn[2] * dbeta * (0 if unit.batch_stats else 1)).to(dtypes.conv_bias)
    return (
        None if dw is None or not needs.w else _cast(dw, dtypes.w),
        d_conv_bias,
        sums[1].to(dtypes.bn) if needs.weight else None,
        dbeta.to(dtypes.bn) if needs.bias else None,
    )

"""One autograd Function for a whole chain of conv-BN-ReLU units with a shortcut: its forward and what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import autocast, dispatch, ops, replay
from fusedres.autograd.backward import chain_backward
from fusedres.autograd.needs import ChainNeeds, Kept, UnitNeeds, requires_grad
from fusedres.autograd.once import refuse_followers
from fusedres.autograd.unit import (
    Operand,
    ParameterDtypes,
    Saved,
    bn_vectors,
    cast_conv,
    closes,
    materialise,
    stored_unit,
    unit_tensors,
)
from fusedres.problem import ConvProblem
from fusedres.specs import ChainSpec, UnitSpec, UnitTensors


def chain(
    spec: ChainSpec, x: Tensor, residual: Tensor | None, units: Sequence[UnitTensors], projection: UnitTensors | None
) -> Tensor:
    """Run a chain differentiably: ``x`` (N, C, H, W) -> (N, K, P, Q), both channels_last."""
    tensors = [*units, *([projection] if projection else [])]
    needs = ChainNeeds.of(spec, requires_grad(x), requires_grad(residual), tensors)
    flat = [t for unit in tensors for t in unit]
    if not needs.any:
        y = replay.call(chain_forward, (spec, needs), (x, residual, *flat))[0]
        assert y is not None
        return y
    return ChainFunction.apply(spec, needs, x, residual, *flat)[0]


class ClosedUnit(NamedTuple):
    moments: Tensor
    bn: Tensor
    w: Tensor
    bias: Tensor


def _closed_unit(unit: UnitSpec, t: UnitTensors, a: Operand) -> ClosedUnit:
    """BN vectors and the folded conv of a closed unit, before its conv has run."""
    problem = ConvProblem.of(a.x, t.w, *unit.conv)
    moments = ops.input_moments(a.x, a.bn, unit.stride)
    bn = bn_vectors(unit, t, ops.pointwise_stats(moments, t.w, t.conv_bias, problem.gemm_m), a.x.dtype)
    return ClosedUnit(moments, bn, *ops.bn_fold(t.w, t.conv_bias, bn))


def _projection(spec: ChainSpec, needs: UnitNeeds, t: UnitTensors, x: Tensor) -> tuple[Saved, Tensor, Tensor | None]:
    """The projection shortcut: what it saves, and the residual with the ``bn`` that is still to be applied to it."""
    unit = spec.projection
    assert unit is not None
    if closes(unit, needs, t, x):
        closed = _closed_unit(unit, t, Operand(x, None))
        residual, _ = ops.conv_fprop(x, closed.w, closed.bias, None, None, *unit.conv, False, False)
        return Saved(closed.bn, None, closed.moments), residual, None
    z, bn = stored_unit(unit, t, Operand(x, None))
    return Saved(bn, z, None), z, bn


def chain_forward(
    spec: ChainSpec, needs: ChainNeeds, x: Tensor, residual: Tensor | None, *flat: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The chain's output, and what each unit (the projection last) keeps for backward."""
    parameters, saved = unit_tensors(flat), []
    tensors = [cast_conv(t, x.dtype) for t in parameters]
    a = Operand(x, None)
    for unit, t in zip(spec.units[:-1], tensors, strict=False):
        z, bn = stored_unit(unit, t, a)
        saved.append(Saved(bn, z, None))
        a = materialise(Operand(z, bn))
    residual_bn = None
    if spec.residual == "input":
        residual = x
    elif spec.residual == "projection":
        projection_saved, residual, residual_bn = _projection(spec, needs.units[-1], tensors[-1], x)
    i = len(spec.units) - 1
    y, last = _last_unit(spec, needs.units[i], tensors[i], a, residual, residual_bn)
    saved.append(last)
    if spec.residual == "projection":
        saved.append(projection_saved)
    kept = map(_keep, needs.units, needs.kept, saved, tensors, parameters)
    return y, *(t for unit in kept for t in unit)


def _last_unit(
    spec: ChainSpec,
    needs: UnitNeeds,
    t: UnitTensors,
    a: Operand,
    residual: Tensor | None,
    residual_bn: Tensor | None,
) -> tuple[Tensor, Saved]:
    """The last conv with BN, residual and ReLU: in one op where the unit is closed, else conv and tail."""
    unit = spec.units[-1]
    if closes(unit, needs, t, a.x):
        if residual is not None and residual_bn is not None:
            residual = ops.scale_shift_add_relu(residual, residual_bn, None, None, False)
        closed = _closed_unit(unit, t, a)
        y, _ = ops.conv_fprop(a.x, closed.w, closed.bias, residual, a.bn, *unit.conv, spec.relu, False)
        return y, Saved(closed.bn, None, closed.moments)
    z, bn = stored_unit(unit, t, a)
    return ops.scale_shift_add_relu(z, bn, residual, residual_bn, spec.relu), Saved(bn, z, None)


def _keep(needs: UnitNeeds, kept: Kept, saved: Saved, t: UnitTensors, parameters: UnitTensors) -> Saved:
    """What of ``saved`` is still there in backward, and the conv's parameters if they are not its own."""
    w, conv_bias = keep_conv(needs, kept, t)
    return Saved(
        saved.bn if needs.any or kept.z else None,
        saved.z if kept.z and not kept.again else None,
        saved.moments if needs.any else None,
        None if w is parameters.w else w,
        None if conv_bias is parameters.conv_bias else conv_bias,
    )


def keep_parameters(needs: ChainNeeds, tensors: Sequence[UnitTensors], dtype: torch.dtype) -> list[Tensor | None]:
    """Every conv's own weight and bias, where backward reads them and not copies in ``dtype``."""
    kept = [t for unit in zip(needs.units, needs.kept, tensors, strict=True) for t in keep_conv(*unit)]
    return [t if t is not None and t.dtype == dtype else None for t in kept]


def keep_conv(needs: UnitNeeds, kept: Kept, t: UnitTensors) -> tuple[Tensor | None, Tensor | None]:
    """The conv's weight and bias, where backward reads them."""
    return t.w if needs.dz or kept.again else None, t.conv_bias if kept.again else None


class ChainFunction(torch.autograd.Function):
    """``apply(spec, needs, x, residual, *unit tensors) -> (y, *saved)``; the saved tensors are for backward alone."""

    @staticmethod
    def forward(
        ctx: Any, spec: ChainSpec, needs: ChainNeeds, x: Tensor, residual: Tensor | None, *flat: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        y, *saved = replay.call(chain_forward, (spec, needs), (x, residual, *flat))
        ctx.spec, ctx.needs = spec, needs
        ctx.mark_non_differentiable(*(t for t in saved if t is not None))
        ctx.set_materialize_grads(False)
        tensors = unit_tensors(flat)
        ctx.input_size, ctx.dtypes = x.shape[2:], tuple(map(ParameterDtypes.of, tensors))
        parameters = keep_parameters(needs, tensors, x.dtype)
        ctx.save_for_backward(x if needs.reads_x else None, y if spec.relu else None, *parameters, *saved)
        return y, *saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_followers()
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        with dispatch.as_in_forward(ctx.spec.engine, ctx.spec.tunes), autocast.suspended(dy.device.type):
            settings = ctx.spec, ctx.needs, ctx.input_size, ctx.dtypes
            return None, None, *replay.call(chain_backward, settings, (dy, *ctx.saved_tensors))

"""One autograd Function for the stem of a ResNet: conv, BN, ReLU and max-pool, with the conv's output kept alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres import autocast, dispatch, ops, replay, tuning
from fusedres.autograd.needs import UnitNeeds
from fusedres.autograd.once import refuse_followers
from fusedres.autograd.unit import (
    Operand,
    ParameterDtypes,
    cast_conv,
    inv_count,
    parameter_gradients,
    stored_unit,
    unit_tensors,
)
from fusedres.distributed import mean_sums
from fusedres.layout import BN, channels_last, pixels
from fusedres.specs import PoolSpec, UnitSpec, UnitTensors


def stem_chain(unit: UnitSpec, pool: PoolSpec, x: Tensor, t: UnitTensors) -> Tensor:
    """Run the stem differentiably: ``x`` (N, C, H, W) -> (N, K, P, Q) after pooling, both channels_last."""
    needs = UnitNeeds.of(t, torch.is_grad_enabled() and x.requires_grad)
    if not needs.any:
        y = replay.call(_forward, (unit, needs, pool), (x, *t))[0]
        assert y is not None
        return y
    return StemFunction.apply(unit, needs, pool, dispatch.forced(), tuning.is_on(), x, *t)[0]


def _forward(
    unit: UnitSpec, needs: UnitNeeds, pool: PoolSpec, x: Tensor, *flat: Tensor | None
) -> tuple[Tensor | None, ...]:
    """(y, tap, z, bn, the weight where backward reads a copy of it)."""
    (parameters,) = unit_tensors(flat)
    t = cast_conv(parameters, x.dtype)
    z, bn = stored_unit(unit, t, Operand(x, None))
    return *ops.bn_relu_maxpool(z, bn, *pool), z, bn, t.w if needs.input and t.w is not parameters.w else None


def _output_gradient(
    unit: UnitSpec, pool: PoolSpec, dy: Tensor, tap: Tensor, z: Tensor, bn: Tensor
) -> tuple[Tensor, Tensor]:
    """``dz`` (N, K, H, W), and the sums of the BN over this process's pixels."""
    dy = channels_last(dy)
    if unit.sync is None:
        return ops.bn_relu_maxpool_backward(dy, tap, z, bn, *pool, inv_count(unit, z))
    # With the sums of all processes yet to come, BN first counts as constant and gives scale*g. What is missing is a
    # BN backward of that, by a BN whose scale is 1.
    scaled, sums = ops.bn_relu_maxpool_backward(dy, tap, z, bn, *pool, 0.0)
    rows = BN.rows(bn)
    unscaled = torch.stack(rows._replace(scale=torch.ones_like(rows.scale)))
    return ops.dbn(scaled, z, unscaled, rows.scale * mean_sums(sums, pixels(z), unit.sync), 1.0), sums


def _backward(
    unit: UnitSpec,
    needs: UnitNeeds,
    pool: PoolSpec,
    input_size: torch.Size,
    kernel_size: torch.Size,
    dtypes: ParameterDtypes,
    dy: Tensor,
    x: Tensor | None,
    own_w: Tensor | None,
    tap: Tensor,
    z: Tensor,
    bn: Tensor,
    cast_w: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``x`` and of the unit's tensors."""
    dz, sums = _output_gradient(unit, pool, dy, tap, z, bn)
    lazy = (dz, None, None, None, 0.0)
    dw = dx = None
    if needs.w:
        assert x is not None
        dw = ops.conv_wgrad(*lazy, x, None, kernel_size, *unit.conv)
    if needs.input:
        w = own_w if cast_w is None else cast_w
        assert w is not None
        dx, _ = ops.conv_dgrad(*lazy, w, input_size, *unit.conv, None, (1, 1), None, None)
    gradients = parameter_gradients(unit, needs, bn, dw, sums, dtypes)
    return dx, *gradients, *(None,) * (len(UnitTensors._fields) - len(gradients))


class StemFunction(torch.autograd.Function):
    """``apply(unit, needs, pool, engine, tunes, x, *unit tensors) -> (y, *saved)``, these for backward alone."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: UnitSpec,
        needs: UnitNeeds,
        pool: PoolSpec,
        engine: str | None,
        tunes: bool,
        x: Tensor,
        *flat: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        y, *saved = replay.call(_forward, (unit, needs, pool), (x, *flat))
        (t,) = unit_tensors(flat)
        ctx.unit, ctx.needs, ctx.pool, ctx.engine, ctx.tunes = unit, needs, pool, engine, tunes
        ctx.mark_non_differentiable(*(t for t in saved if t is not None))
        ctx.set_materialize_grads(False)
        ctx.input_size, ctx.kernel_size, ctx.dtypes = x.shape[2:], t.w.shape[2:], ParameterDtypes.of(t)
        own_w = t.w if needs.input and t.w.dtype == x.dtype else None
        ctx.save_for_backward(x if needs.w else None, own_w, *saved)
        return y, *saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_followers()
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        settings = ctx.unit, ctx.needs, ctx.pool, ctx.input_size, ctx.kernel_size, ctx.dtypes
        with dispatch.as_in_forward(ctx.engine, ctx.tunes), autocast.suspended(dy.device.type):
            return *(None,) * 5, *replay.call(_backward, settings, (dy, *ctx.saved_tensors))

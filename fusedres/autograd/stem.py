"""One autograd Function for the stem of a ResNet: conv, BN, ReLU and max-pool, with the conv's output kept alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedres import autocast, dispatch, ops
from fusedres.autograd.needs import UnitNeeds
from fusedres.autograd.unit import (
    Operand,
    ParameterDtypes,
    inv_count,
    parameter_gradients,
    stored_unit,
    unit_tensors,
)
from fusedres.layout import channels_last
from fusedres.specs import PoolSpec, UnitSpec, UnitTensors


def stem_chain(unit: UnitSpec, pool: PoolSpec, x: Tensor, t: UnitTensors) -> Tensor:
    """Run the stem differentiably: ``x`` (N, C, H, W) -> (N, K, P, Q) after pooling, both channels_last."""
    needs = UnitNeeds.of(t, torch.is_grad_enabled() and x.requires_grad)
    if not needs.any:
        return _forward(unit, pool, x, t)[0]
    return StemFunction.apply(unit, needs, pool, dispatch.forced(), x, *t)[0]


def _forward(unit: UnitSpec, pool: PoolSpec, x: Tensor, t: UnitTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, bn = stored_unit(unit, t, Operand(x, None))
    return *ops.bn_relu_maxpool(z, bn, *pool), z, bn


class StemFunction(torch.autograd.Function):
    """``apply(unit, needs, pool, engine, x, *unit tensors) -> (y, tap, z, bn)``; the last three are for backward."""

    @staticmethod
    def forward(
        unit: UnitSpec, needs: UnitNeeds, pool: PoolSpec, engine: str | None, x: Tensor, *flat: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(unit, pool, x, *unit_tensors(flat))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.unit, ctx.needs, ctx.pool, ctx.engine, x, *flat = inputs
        (t,) = unit_tensors(flat)
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.input_size, ctx.kernel_size, ctx.dtypes = x.shape[2:], t.w.shape[2:], ParameterDtypes.of(t)
        ctx.save_for_backward(x if ctx.needs.w else None, t.w if ctx.needs.input else None, *saved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, w, tap, z, bn = ctx.saved_tensors
        unit, needs = ctx.unit, ctx.needs
        with dispatch.as_in_forward(ctx.engine), autocast.suspended(dy.device.type):
            count = inv_count(unit, z)
            dz, sums = ops.bn_relu_maxpool_backward(channels_last(dy), tap, z, bn, *ctx.pool, count)
            lazy = (dz, None, None, None, 0.0)
            dw = ops.conv_wgrad(*lazy, x, None, ctx.kernel_size, *unit.conv) if needs.w else None
            dx = None
            if needs.input:
                dx, _ = ops.conv_dgrad(*lazy, w, ctx.input_size, *unit.conv, None, (1, 1), None, None)
        gradients = parameter_gradients(unit, needs, bn, dw, sums, ctx.dtypes)
        return *(None,) * 4, dx, *gradients, *(None,) * (len(UnitTensors._fields) - len(gradients))

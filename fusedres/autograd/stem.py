"""One autograd Function for the stem of a ResNet: conv, BN, ReLU and max-pool, with the conv's output kept alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedres import autocast, dispatch, ops
from fusedres.autograd.unit import Operand, Parameters, UnitNeeds, parameter_gradients, stored_unit, unit_tensors
from fusedres.layout import channels_last
from fusedres.specs import PoolSpec, UnitSpec, UnitTensors


def stem_chain(unit: UnitSpec, pool: PoolSpec, x: Tensor, t: UnitTensors) -> Tensor:
    """Run the stem differentiably: ``x`` (N, C, H, W) -> (N, K, P, Q) after pooling, both channels_last."""
    if not torch.is_grad_enabled():
        return _forward(unit, pool, x, t)[0]
    return StemFunction.apply(unit, pool, dispatch.forced(), x, *t)[0]


def _forward(unit: UnitSpec, pool: PoolSpec, x: Tensor, t: UnitTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, bn = stored_unit(unit, t, Operand(x, None))
    return *ops.bn_relu_maxpool(z, bn, *pool), z, bn


class StemFunction(torch.autograd.Function):
    """``apply(unit, pool, engine, x, *unit tensors) -> (y, tap, z, bn)``; all but ``y`` are for backward alone."""

    @staticmethod
    def forward(
        unit: UnitSpec, pool: PoolSpec, engine: str | None, x: Tensor, *flat: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(unit, pool, x, *unit_tensors(flat))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.unit, ctx.pool, ctx.engine, x, *flat = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *flat[:3], *saved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, w, conv_bias, weight, tap, z, bn = ctx.saved_tensors
        unit, needs_x, needs = ctx.unit, ctx.needs_input_grad[3], UnitNeeds(*ctx.needs_input_grad[4:8])
        with dispatch.as_in_forward(ctx.engine), autocast.suspended(dy.device.type):
            inv_count = 1 / (z.shape[0] * z.shape[2] * z.shape[3]) if unit.batch_stats else 0.0
            dz, sums = ops.bn_relu_maxpool_backward(channels_last(dy), tap, z, bn, *ctx.pool, inv_count)
            lazy = (dz, None, None, None, 0.0)
            dw = ops.conv_wgrad(*lazy, x, None, w.shape[2:], *unit.conv) if needs.w else None
            dx = None
            if needs_x:
                dx, _ = ops.conv_dgrad(*lazy, w, x.shape[2:], *unit.conv, None, (1, 1), None, None)
        gradients = parameter_gradients(unit, needs, Parameters(w, conv_bias, weight), bn, dw, sums)
        return None, None, None, dx, *gradients, *(None,) * (len(UnitTensors._fields) - len(gradients))
